"""`lightning-hetero report`: everything that is known of a plan as one page of HTML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hetero.cli import PROGRAM
from lightning_hetero.errors import HeteroError, UsageError

if TYPE_CHECKING:
    from lightning_hetero.cli.planner import Planned
    from lightning_hetero.schedule import Timeline


def main(argv: Sequence[str]) -> int:
    """Write the report of a plan file.

    Returns:
        0; 1 after a failure that was explained on stderr.
    """
    arguments = _parser().parse_args(argv)
    try:
        path = _report(arguments)
    except HeteroError as error:
        print(f"{PROGRAM} report: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}", file=sys.stderr)
    return 0


def write_planned(path: str | Path, planned: Planned, measured: Timeline | None = None) -> Path:
    """Write the report of a plan whose costs are known: with a predicted step, and what passes between stages.

    Raises:
        HeteroError: matplotlib is not installed, or the file cannot be written.
    """
    from lightning_hetero.report import borders_of, write_html
    from lightning_hetero.simulate import Costs, predict

    plan, *others = planned.plans
    profile = planned.workload.profile(planned.graph, planned.inventory)
    costs = Costs(planned.graph, planned.inventory, profile, plan.training, plan.optimizer_factor)
    return write_html(
        path,
        plan,
        inventory=planned.inventory,
        predicted=predict(costs, plan.device_of, plan.execution, plan.shares_of).timeline,
        measured=measured,
        alternatives=others,
        borders=borders_of(costs, plan),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report",
        description="Write one page of HTML about a plan: stages and reasons, what was rejected, the partition of the "
        "model, a step of each device, memory. Costs that `lightning-hetero plan ... save=PLAN` left beside the plan "
        "add a predicted step.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="a plan file, of `lightning-hetero plan` or a training run")
    parser.add_argument("--timeline", metavar="FILE", help="a measured step: what Timeline.to_json() wrote")
    parser.add_argument("--output", metavar="FILE", help="the page; by default it has the name of the plan")
    return parser


def _report(arguments: argparse.Namespace) -> Path:
    from lightning_hetero.cli.saved import costs_path, load_planned
    from lightning_hetero.report import write_html
    from lightning_hetero.report.canvas import require_matplotlib
    from lightning_hetero.strategy.planning import read_plan

    require_matplotlib()
    path = Path(arguments.plan)
    output = Path(arguments.output or path.with_suffix(".html"))
    if output.resolve() == path.resolve():
        raise UsageError(f"--output {str(output)!r} is the plan itself; choose another name for the page")
    measured = None if arguments.timeline is None else _timeline(Path(arguments.timeline))
    if costs_path(path).exists():
        return write_planned(output, load_planned(path), measured)
    return write_html(output, read_plan(path), measured=measured)


def _timeline(path: Path) -> Timeline:
    from lightning_hetero.errors import ScheduleError
    from lightning_hetero.schedule import Timeline

    try:
        return Timeline.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--timeline {str(path)!r} cannot be read: {error}") from error
    except ScheduleError as error:
        raise UsageError(f"--timeline {str(path)!r}: {error}") from error
