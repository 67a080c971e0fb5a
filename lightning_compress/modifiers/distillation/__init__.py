"""Distillation: the loss, the teacher, the cache of its answers, learned projections."""
