"""`lightning-hetero simulate`: what every device does when, and what would change that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_hetero.cli.application import run_application
from lightning_hetero.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_hetero.cli.what_if import Outcome

_FORMATS = ("table", "json", "trace")
HEADER = ("micro-batches", "devices", "links", "step", "bubble", "fullest device", "bound by")


def main(argv: Sequence[str]) -> int:
    """Simulate as the arguments say: `plan=plan.json 'micro_batches=[1,2,4]'`, `format=trace`, `--help`.

    Returns:
        0; 1 after a failure that was explained on stderr.
    """
    return run_application("simulate", simulate, argv)


def simulate(cfg: DictConfig) -> None:
    """Predict a plan under all combinations of what is asked for, and show it.

    Args:
        cfg: The configuration `simulate`, composed by Hydra.

    Raises:
        HeteroError: The plan cannot be read, or a key has a value that makes no sense.
    """
    from omegaconf import OmegaConf

    from lightning_hetero.cli.output import output_of, text_of, write_or_print
    from lightning_hetero.cli.saved import load_planned
    from lightning_hetero.cli.what_if import outcomes
    from lightning_hetero.strategy.options import one_of

    form = one_of("format", cfg.format, _FORMATS)
    path = None if OmegaConf.is_missing(cfg, "plan") else text_of("plan", cfg.plan, "plan.json")
    if path is None:
        raise UsageError(
            "no plan is given; make one with `lightning-hetero plan ... save=plan.json`, then write plan=plan.json"
        )
    output = output_of("output", cfg.output, "simulated.txt")
    found = outcomes(load_planned(path), cfg)
    write_or_print(_text(found, form, cfg.width), output)


def _text(found: Sequence[Outcome], form: str, width: int) -> str:
    import json

    from lightning_hetero.cli.output import table_text
    from lightning_hetero.schedule import chrome_trace, draw

    if form == "trace":
        return chrome_trace({each.title: each.prediction.timeline for each in found})
    if form == "json":
        return json.dumps([each.to_dict() for each in found], indent=1) + "\n"
    if not isinstance(width, int) or width < 1:
        raise UsageError(f"width={width!r} must be a number of columns, at least 1")
    drawn = draw(found[0].prediction.timeline, width=width)
    words = (*HEADER[1:3], *HEADER[-2:])
    return f"{found[0].title}\n{drawn}\n{table_text(None, HEADER, [each.row() for each in found], words)}"
