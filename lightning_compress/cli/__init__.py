"""The console command ``lightning-compress``: a file for each subcommand, each a thin caller of the package."""

from lightning_compress.cli.command import main

__all__ = ["main"]
