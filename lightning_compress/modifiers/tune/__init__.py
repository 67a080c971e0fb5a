"""What is continuous in a compressed model, trained end to end."""
