"""The benches; a package, so that no other of its name in the environment stands before it."""
