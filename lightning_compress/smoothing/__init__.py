"""Scales moved from activations into weights: which modules form a pair, folding, and the statistics to choose by."""
