"""Scales moved from activations into weights: SmoothQuant, logarithmic equalization, AWQ."""
