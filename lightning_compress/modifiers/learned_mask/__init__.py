"""Learned N:M masks: the modifier, and the choice of a pattern with gradients."""
