"""The benchmarks; a package, so that no other package of this name in the environment hides it."""
