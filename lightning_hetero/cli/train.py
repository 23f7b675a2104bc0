"""`lightning-hetero train`: trains and tests a configured model, once or in a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.cli.application import run_application
from lightning_hetero.cli.sweep import sweeps
from lightning_hetero.cli.sweep_job import run


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say: `experiment=digits devices=emulated`, `-m` for sweeps, `--cfg job`, `--help`.

    Returns:
        0; 1 after a failure that was explained on stderr, also that of a single job of a sweep.

    Raises:
        Exception: What the user's own code raised, outside of sweeps; and everything, if HYDRA_FULL_ERROR=1 is set.
    """
    with sweeps() as results:
        code = run_application("train", run, argv)
    return code or results.code
