"""GPTQ in parts: the column loop, the choice of scales, refinement, and what is chosen on held-out data."""
