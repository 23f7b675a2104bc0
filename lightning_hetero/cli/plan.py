"""`lightning-hetero plan`: which part of a model would run where, why, and what a step would take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_hetero.cli.application import run_application
from lightning_hetero.errors import InfeasiblePlanError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_hetero.cli.planner import Planned, Planner

_FORMATS = ("table", "json", "html")
_PAGE = "plan.html"  # where nothing says where to write it
_LIMIT_S = 0.7  # for each plan that is only looked at to propose something


def main(argv: Sequence[str]) -> int:
    """Plan as the arguments say: `model=transformer_7b 'devices=2x24GiB+cpu'`, `format=html`, `--help`.

    Returns:
        0; 1 after a failure that was explained on stderr, also where nothing fits.
    """
    return run_application("plan", plan, argv)


def plan(cfg: DictConfig) -> None:
    """Make the plan and show it.

    Args:
        cfg: The configuration `plan`, composed by Hydra.

    Raises:
        InfeasiblePlanError: Nothing fits; the text has a table of what would.
        HeteroError: The configuration makes no sense.
    """
    from lightning_hetero.cli.output import output_of
    from lightning_hetero.cli.planner import Planner  # torch and Lightning, which --help should not wait for
    from lightning_hetero.cli.saved import save_planned
    from lightning_hetero.config import check_groups
    from lightning_hetero.report.canvas import require_matplotlib
    from lightning_hetero.strategy.options import one_of

    check_groups(cfg)
    form = one_of("format", cfg.format, _FORMATS)
    if form == "html":
        require_matplotlib()  # before anything takes time
    output, save = output_of("output", cfg.output, "shown.txt"), output_of("save", cfg.save, "plan.json")
    planner = Planner(cfg)
    try:
        planned = planner.plan()
    except InfeasiblePlanError as error:
        raise InfeasiblePlanError(f"{error}\n{_what_would_fit(planner)}") from error
    if save is not None:
        save_planned(planned, save)
    _show(planned, form, output)


def _show(planned: Planned, form: str, output: str | None) -> None:
    from lightning_hetero.cli.output import plan_text, write_or_print
    from lightning_hetero.cli.report import write_planned

    if form == "html":
        print(f"wrote {write_planned(output or _PAGE, planned)}", file=sys.stderr)
        return
    first = planned.plans[0]
    write_or_print(first.to_json() if form == "json" else plan_text(first), output)


def _what_would_fit(planner: Planner) -> str:
    """Plans for easier circumstances, as a table with what to write for each."""
    from dataclasses import replace

    from lightning_hetero.cli.planner import variants
    from lightning_hetero.errors import HeteroError
    from lightning_hetero.plan.explain import format_seconds, text_table

    rows = []
    for words, other in variants(planner.circumstances).items():
        if planner.is_hopeless(other):
            continue
        quick = replace(other, terms=replace(other.terms, time_limit_s=_LIMIT_S))
        try:
            found = planner.plan(quick).plans[0]
        except InfeasiblePlanError:
            continue
        except HeteroError:  # such as a constraint that these circumstances break
            continue
        seconds = "?" if found.forecast is None else format_seconds(found.forecast.step_s)
        rows.append((words, ", ".join(device.name for device in found.used), seconds))
    if not rows:
        return "None of the usual ways to need less memory is enough: 16-bit parameters, SGD, one row, inference."
    return f"What would fit, by estimate:\n{text_table(('add', 'on', 'step'), rows)}"
