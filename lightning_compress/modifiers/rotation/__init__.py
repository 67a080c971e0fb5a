"""Rotating a model: which weights share a basis, turning that basis; the model computes as before."""
