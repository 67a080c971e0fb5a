"""The demo's models and data; no part of the package."""
