"""The face that all benchmarks share: one switch, a table for people, and one line of JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


def is_quick(description: str | None) -> bool:
    """Read the command line, whose only switch is `--quick`.

    Args:
        description: What `--help` says; the benchmark's docstring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, under 40 s: does it run, not how fast")
    return bool(parser.parse_args().quick)


def report(figures: Mapping[str, float]) -> None:
    """Print the figures, and as the last line the same as JSON: {"figures": {name: number}}."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:10.4f}")
    print(json.dumps({"figures": {name: round(value, 6) for name, value in figures.items()}}))
