"""Files and folders that are there whole or not at all, and the removal of what a killed process left half-written."""
