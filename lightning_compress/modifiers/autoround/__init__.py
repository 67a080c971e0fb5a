"""AutoRound: rounding that is learned for all weights of a block at once."""
