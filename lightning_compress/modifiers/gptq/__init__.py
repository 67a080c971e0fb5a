"""GPTQ: the modifier, the solver with its column loop, refinement, and what is chosen on held-out data."""
