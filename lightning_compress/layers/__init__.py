"""What a layer is: a module with a weight matrix, how it is named and matched, how its forward pass is patched."""
