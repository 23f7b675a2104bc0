"""Shows the plan once, and leaves it as JSON beside the run's logs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import HEADER, outlook, stage_rows, title

PLAN_FILE = "hetero_plan.json"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the table of stages, the reasons, and what the plan will take to the standard output."""
    table = Table(title=title(plan), title_justify="left", title_style="bold")
    for column in HEADER:
        table.add_column(column, justify="right" if column in ("parameters", "memory", "capacity", "used") else "left")
    for row in stage_rows(plan):
        table.add_row(*row)
    console = console or Console(soft_wrap=False)
    console.print(table)
    for note in plan.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    for lines in outlook(plan):
        console.print(lines, highlight=False, markup=False)


def save_plan(plan: Plan, folder: Path) -> Path:
    """Write the plan to `folder`, all of it or nothing.

    Returns:
        Path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{PLAN_FILE}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(plan.to_json())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
