"""Rotating a model: follow a run, see which weights share a basis, turn that basis; the model computes as before."""
