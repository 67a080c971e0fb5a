"""Structured pruning: what hangs together in any network, a cut tried on a copy, the modifier."""
