"""Models and data of the demo; not part of the package."""
