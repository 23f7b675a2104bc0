"""What a sweep came to: `sweep.csv` in its folder, a table, and an exit code."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from lightning_hetero.cli import PROGRAM
from lightning_hetero.cli.sweep_job import rows_folder
from lightning_hetero.cli.sweep_row import OK, SweepRow, read_rows, settings, varied
from lightning_hetero.errors import TargetError

CSV_FILE = "sweep.csv"
CHART_FILE = "sweep.png"

Cell = str | int | float | None


class Sweeps:
    """Folders of rows that the sweeps of a command fill, and what they came to.

    Attributes:
        code: 0, or 1 if a job of a sweep failed.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.code = 0


_OPEN: ContextVar[Sweeps | None] = ContextVar("sweeps that write their results down", default=None)


class SweepResults(Callback):
    """Tells `sweeps` where the rows will be. Hydra makes it, from `hydra.callbacks` in `conf/train.yaml`."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Forget the rows of an earlier sweep in the same folder."""
        folder = rows_folder(config.hydra)
        for path in folder.glob("*.json"):
            path.unlink()
        current = _OPEN.get()
        if current is not None:
            current.folders.append(folder)


@contextmanager
def sweeps() -> Iterator[Sweeps]:
    """Write down what the sweeps within the block came to, also if one of them is stopped."""
    results = Sweeps()
    token = _OPEN.set(results)
    try:
        yield results
    finally:
        _OPEN.reset(token)
        for folder in results.folders:
            rows = read_rows(folder)
            if rows:
                results.code |= _tell(rows, folder.parent)


def _tell(rows: Sequence[SweepRow], folder: Path) -> int:
    from lightning_hetero.cli.output import table_text

    path = folder / CSV_FILE
    write_csv(rows, path)
    header, cells = table(rows)
    words = {"status", *varied(rows), "peak memory", "plan"}
    print(table_text(f"Sweep of {len(rows)} jobs", header, cells, left=words), end="")
    bad = [row for row in rows if row.status != OK]
    for row in bad:
        print(f"job {row.job} {row.status}: {_first_line(row.reason)}")
    print(f"wrote {path}")
    chart = _chart(rows, folder / CHART_FILE)
    if chart is not None:
        print(f"wrote {chart}")
    if bad:
        text = f"{len(bad)} of {len(rows)} jobs came to nothing; the reasons are in {path}"
        print(f"{PROGRAM} train: {text}", file=sys.stderr)
    return int(bool(bad))


def records(rows: Sequence[SweepRow]) -> list[dict[str, Cell]]:
    """The rows with the columns of the file: those of what varied and of devices depend on the sweep."""
    keys = varied(rows)
    measured = dict.fromkeys(name for row in rows for name in row.peak_bytes)
    predicted = dict.fromkeys(name for row in rows for name in row.predicted_peak_bytes)
    found = []
    for row in rows:
        said = settings(row)
        record: dict[str, Cell] = {"job": row.job, "status": row.status}
        record |= {key: said.get(key) for key in keys}
        record |= {
            "metric_name": row.metric_name,
            "metric": row.metric,
            "predicted_step_s": row.predicted_step_s,
            "estimated": row.estimated if row.estimated is None else int(row.estimated),
            "measured_step_s": row.measured_step_s,
            "samples_per_s": row.samples_per_s,
        }
        record |= {f"peak_bytes/{name}": row.peak_bytes.get(name) for name in measured}
        record |= {f"predicted_peak_bytes/{name}": row.predicted_peak_bytes.get(name) for name in predicted}
        record |= {"plan_hash": row.plan_hash, "overrides": " ".join(row.overrides), "reason": row.reason}
        found.append(record)
    return found


def write_csv(rows: Sequence[SweepRow], path: Path) -> None:
    """One line for each job, numbers as Python writes them; what is not known is empty."""
    found = records(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*found[0]])
        writer.writeheader()
        writer.writerows(found)


def table(rows: Sequence[SweepRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for people; "~" stands before seconds that are estimates, and before predicted memory."""
    keys = varied(rows)
    name = next((row.metric_name for row in rows if row.metric_name), "metric")
    header = ["job", *keys, "status", name, "predicted step", "measured step", "samples/s", "peak memory", "plan"]
    return header, [_cells(row, keys) for row in rows]


def _cells(row: SweepRow, keys: Sequence[str]) -> list[str]:
    said = settings(row)
    metric = "" if row.metric is None else f"{row.metric:.4g}"
    return [str(row.job), *(said.get(key, "") for key in keys), row.status, metric, *cells_of(row)]


def cells_of(row: SweepRow) -> list[str]:
    """Predicted and measured seconds, samples per second, memory and plan, as texts; empty where not known."""
    from lightning_hetero.plan.explain import format_seconds

    predicted = "" if row.predicted_step_s is None else format_seconds(row.predicted_step_s)
    if row.estimated:
        predicted = f"~{predicted}"
    measured = "" if row.measured_step_s is None else format_seconds(row.measured_step_s)
    rate = "" if row.samples_per_s is None else f"{row.samples_per_s:.0f}"
    return [predicted, measured, rate, _memory(row), row.plan_hash or ""]


def _memory(row: SweepRow) -> str:
    """A line for each device; "~" before what is predicted and not measured."""
    from lightning_hetero.units import format_bytes

    names = dict.fromkeys((*row.predicted_peak_bytes, *row.peak_bytes))
    measured: Mapping[str, int] = row.peak_bytes
    return "\n".join(
        f"{name} {format_bytes(measured[name])}"
        if name in measured
        else f"{name} ~{format_bytes(row.predicted_peak_bytes[name])}"
        for name in names
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _chart(rows: Sequence[SweepRow], path: Path) -> Path | None:
    """Draw the sweep, each job named by what varied; None where nothing that draws is installed."""
    keys = varied(rows)
    names = [" ".join(f"{key}={settings(row).get(key, '')}" for key in keys) for row in rows]
    points = [{**record, "overrides": name} for record, name in zip(records(rows), names, strict=True)]
    try:
        import_module("lightning_hetero.report").write_table_chart(points, path)
    except (ImportError, AttributeError, TargetError):
        return None
    return path
