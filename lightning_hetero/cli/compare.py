"""`lightning-hetero compare`: policies side by side, predicted and measured."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_hetero.cli.application import run_application
from lightning_hetero.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_hetero.cli.sweep_row import SweepRow

_FORMATS = ("table", "json")
_FEWEST, _MOST = 5, 50  # measured steps: a trial of plans takes turns of fewer; the clock stops after so many
_SPARE = 100  # steps in which the model is measured and plans are tried
_LEFT_OUT = ("manual", "measured")  # the one needs a device map, the other tries the others itself
HEADER = ("policy", "status", "predicted step", "measured step", "ratio", "samples/s", "peak memory", "plan")


def main(argv: Sequence[str]) -> int:
    """Compare as the arguments say: `experiment=digits devices=emulated 'policies=[single,even]'`, `--help`.

    Returns:
        0; 1 after a failure that was explained on stderr, and where no policy could be measured.

    Raises:
        Exception: Everything, if HYDRA_FULL_ERROR=1 is set.
    """
    return run_application("compare", compare, argv)


def compare(cfg: DictConfig) -> None:
    """Train with each policy, and show what came out.

    Args:
        cfg: The configuration `compare`, composed by Hydra.

    Raises:
        UsageError: A key has a value that makes no sense, or no policy could be measured.
        PlacementError: There is no such policy.
    """
    from lightning_hetero.cli.output import output_of, write_or_print
    from lightning_hetero.strategy.options import one_of

    form = one_of("format", cfg.format, _FORMATS)
    if isinstance(cfg.steps, bool) or not isinstance(cfg.steps, int) or not _FEWEST <= cfg.steps <= _MOST:
        raise UsageError(f"steps={cfg.steps!r} must be a whole number from {_FEWEST} to {_MOST}")
    names = _names(cfg)
    output = output_of("output", cfg.output, "compared.txt")
    rows = []
    for index, name in enumerate(names):
        print(f"{name} ({index + 1} of {len(names)})", file=sys.stderr)
        rows.append(_row(cfg, index, name))
    write_or_print(_text(rows, form), output)
    if not any(row.measured_step_s for row in rows):
        raise UsageError(f"none of the policies could be measured; the first one: {rows[0].reason}")


def _names(cfg: DictConfig) -> list[str]:
    from omegaconf import ListConfig

    from lightning_hetero.placement import get_policy, policy_names

    given = cfg.policies
    if given is None:
        return [name for name in policy_names() if name not in _LEFT_OUT]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, ListConfig)) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"policies={given!r} must be a list of names, such as 'policies=[single,even,auto]'")
    for name in names:
        get_policy(name)
    return [*dict.fromkeys(names)]


def _row(cfg: DictConfig, index: int, name: str) -> SweepRow:
    from lightning_hetero.cli import job
    from lightning_hetero.cli.forecast import forecast_of
    from lightning_hetero.cli.sweep_row import SweepRow, failed

    row = SweepRow(job=index, overrides=[f"placement={name}"])
    with tempfile.TemporaryDirectory() as folder:
        changed = _only_steps(cfg, name, folder)
        try:
            clock = job.run_steps(changed, cfg.steps)
            row.take(clock, forecast_of(changed, clock))
        except Exception as error:  # whatever one policy runs into, the others are still of interest
            failed(row, error, "compare")
    return row


def _only_steps(cfg: DictConfig, name: str, folder: str) -> DictConfig:
    """The configuration with a Trainer that trains, and leaves nothing."""
    from omegaconf import OmegaConf, open_dict

    changed = copy.deepcopy(cfg)
    with open_dict(changed):
        changed.placement.policy = name
        if OmegaConf.is_dict(changed.trainer.strategy):
            changed.trainer.strategy.verbose = False
        changed.trainer.update(
            default_root_dir=folder,
            max_steps=cfg.steps + _SPARE,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=None,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    return changed


def _text(rows: Sequence[SweepRow], form: str) -> str:
    from lightning_hetero.cli.output import table_text
    from lightning_hetero.cli.sweep import records

    if form == "json":
        return json.dumps(records(rows), indent=2)
    text = table_text("Policies side by side", HEADER, map(_cells, rows), left=("policy", "status", *HEADER[-2:]))
    reasons = [f"{_policy(row)} {row.status}: {row.reason.strip().splitlines()[0]}\n" for row in rows if row.reason]
    return text + "".join(reasons)


def _cells(row: SweepRow) -> list[str]:
    from lightning_hetero.cli.sweep import cells_of

    predicted_s, measured_s = row.predicted_step_s, row.measured_step_s
    ratio = f"{measured_s / predicted_s:.2f}" if predicted_s and measured_s else ""
    predicted, measured, *others = cells_of(row)
    return [_policy(row), row.status, predicted, measured, ratio, *others]


def _policy(row: SweepRow) -> str:
    return row.overrides[0].partition("=")[2]
