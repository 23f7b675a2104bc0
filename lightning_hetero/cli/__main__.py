"""`python -m lightning_hetero.cli`, for a checkout without the console script."""

from __future__ import annotations

import sys

from lightning_hetero.cli import main

if __name__ == "__main__":
    sys.exit(main())
