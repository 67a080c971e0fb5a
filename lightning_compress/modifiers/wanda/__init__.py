"""Wanda, and what Wanda++ adds to it: gradients of the block in the score, weights refined on its output."""
