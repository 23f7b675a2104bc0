"""The code in README and docs runs as it stands there, page by page."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from torch import nn

import lightning_hetero
import lightning_hetero.config
from lightning_hetero._conf import conf_dir
from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.devices import resolve_devices
from lightning_hetero.devices.profile_files import read_device_profile
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A piece of a page."""

    page: str
    language: str
    code: str
    line: int


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[1] in languages:
                yield Block(str(page.relative_to(ROOT)), match[1], match[2], text[: match.start()].count("\n") + 2)


def pages_with_python() -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in blocks("python"):
        found.setdefault(block.page, []).append(block)
    return found


@pytest.fixture
def names(accelerator: EmulatedAccelerator) -> dict[str, Any]:
    """What the snippets take for granted: a user's model, which was trained, and data."""
    model, datamodule = DigitsCNN(), DigitsDataModule()
    strategy = lightning_hetero.HeteroStrategy(devices="cpu@speed=1,cpu@speed=1", placement="even")
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(strategy=strategy, max_steps=1, limit_val_batches=0, **quiet).fit(model, datamodule)
    return {
        "pl": pl,
        "torch": torch,
        "nn": nn,
        "model": model,
        "datamodule": datamodule,
        "optimizer": torch.optim.Adam(model.parameters()),
        "images": torch.rand(3, 1, 8, 8),
        "strategy": strategy,
        "net": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        "HeteroStrategy": lightning_hetero.HeteroStrategy,
    }


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
@pytest.mark.parametrize("page", pages_with_python())
def test_python_runs(page: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER_FAST_DEV_RUN", "2")
    for block in pages_with_python()[page]:
        code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
        exec(code, names)


def commands(program: str) -> list[tuple[str, str]]:
    lines = [(block.page, line) for block in blocks("", "bash") for line in block.code.splitlines()]
    return [(page, line) for page, line in lines if line.startswith(program)]


@pytest.mark.parametrize(("page", "line"), commands("lightning-hetero train"))
def test_overrides_of_the_command_line_compose(page: str, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True)[2:] if "=" in word]
    singles = [word.partition(",")[0] if "[" not in word else word for word in words]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        assert compose("train", singles)


def test_device_profiles_are_read(tmp_path: Path) -> None:
    found = [block for block in blocks("json") if "lightning_hetero device profile" in block.code]
    assert found
    for block in found:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(json.loads(block.code)))
        assert read_device_profile(path)


def test_inventories_are_read(tmp_path: Path) -> None:
    found = [block for block in blocks("yaml") if "devices" in yaml.safe_load(block.code)]
    assert found
    for block in found:
        path = tmp_path / "devices.yaml"
        path.write_text(block.code)
        assert resolve_devices(str(path), must_exist=False)


def test_the_example_of_a_recording_draws_a_step(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in pages_with_python()["docs/micro_batches.md"]:
        exec(block.code, names)
    strategy = lightning_hetero.HeteroStrategy(devices="cpu@speed=1,cpu@speed=1", placement="even", micro_batches=2)
    trainer = pl.Trainer(
        strategy=strategy, max_steps=6, logger=False, enable_checkpointing=False, callbacks=[names["Draw"]()]
    )
    trainer.fit(Classifier(), data(rows=48))

    drawn = capsys.readouterr().out
    assert re.search(r"emulated:0 .*F", drawn), drawn
