"""What the callback is made of: the clock, the choice of the model, the samples, waiting ranks, the end of the run."""
