"""Writes a compressed model for transformers and vLLM, and reads it back."""
