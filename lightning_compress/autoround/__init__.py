"""Rounding that is learned for all weights of a block at once (see modifiers/autoround.py)."""
