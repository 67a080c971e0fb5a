"""Mixtures of experts whose weights lie in one tensor: seen as a Linear per expert and projection."""
