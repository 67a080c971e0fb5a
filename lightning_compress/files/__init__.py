"""Files and folders that are written atomically, and the removal of what a killed process left half-written."""
