"""What a recipe will do to a model, before it is done: modules, sizes, memory, seconds, and who can load the result."""
