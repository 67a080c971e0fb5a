"""Removing parts of a model for real: what hangs together, the cut, and the record that repeats it on a dense model."""
