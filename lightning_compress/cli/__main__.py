"""``python -m lightning_compress.cli``: the console command without its installed script."""

import sys

from lightning_compress.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
