"""Removing units of a model: which places belong together, the cut, and the record that repeats it on a dense model."""
