"""Bits for each module: how much the loss depends on it, against the bytes that it takes."""
