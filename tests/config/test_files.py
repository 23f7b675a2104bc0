"""Every configuration file composes, and says in its first lines which command uses it."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lightning_hetero._conf import conf_dir
from lightning_hetero.cli.requests import with_device_requests
from lightning_hetero.config import SCHEMAS, check_groups

OURS = sorted(path for path in conf_dir().rglob("*.yaml") if path.parent.name != "hetero")
GROUP_FILES = [path for path in OURS if path.parent != conf_dir()]


def composed(*overrides: str, command: str = "train") -> DictConfig:
    words = with_device_requests(overrides)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, [*words])  # the file in `conf/` that has the name of the command


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every `lightning-hetero` in the comment on top of a file."""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            return
        if line.startswith("#     lightning-hetero "):
            _, command, *words = shlex.split(line.removeprefix("#"))
            yield command, words


def group_of(path: Path) -> str:
    return path.parent.relative_to(conf_dir()).as_posix()


def name_of(path: Path) -> str:
    return path.relative_to(conf_dir()).with_suffix("").as_posix()


def need_plugin(path: Path) -> None:
    if group_of(path) == "hydra/sweeper":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra 'sweeps' is not installed")


@pytest.mark.parametrize("path", GROUP_FILES, ids=name_of)
def test_every_file_of_a_group_composes(path: Path) -> None:
    need_plugin(path)
    assert composed(f"{group_of(path)}={path.stem}").seed == 1


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_every_file_opens_with_commands_that_use_it_and_that_compose(path: Path) -> None:
    need_plugin(path)
    shown = [*commands(path)]
    assert shown
    for command, words in shown:
        # A sweep composes once for each of its values; the first stands for the others.
        sweep = words[:1] == ["-m"]
        first = [re.sub(r",\w+$", "", word) if sweep else word for word in words if word != "-m"]
        cfg = composed(*first, command=command)
        if command in ("train", "plan", "compare"):
            check_groups(cfg)
    if path in GROUP_FILES:
        assert any(f"{group_of(path)}={path.stem}" in words for _, words in shown) or path.parent.name == "trainer"


@pytest.mark.parametrize("path", GROUP_FILES, ids=name_of)
def test_no_file_repeats_a_default_of_the_python_code(path: Path) -> None:
    if path.parent.name in ("data", "model"):
        given = yaml.safe_load(path.read_text())
        defaults = inspect.signature(get_class(given.pop("_target_"))).parameters
        assert all(defaults[name].default != value for name, value in given.items())
    if path.parent.name in ("devices", "placement", "schedule"):
        given = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "defaults"}
        plain = vars(SCHEMAS[path.parent.name]())
        assert all(plain[key] != value for key, value in given.items())


@pytest.mark.parametrize("policy", ["auto", "single", "even", "memory_first", "measured"])
def test_a_placement_file_means_the_policy_of_its_name(policy: str) -> None:
    assert composed(f"placement={policy}").trainer.strategy.placement == policy


def test_placement_by_hand_hands_the_map_to_the_strategy() -> None:
    cfg = composed("placement=manual", r"placement.device_map={features.0: cpu, head: cuda\:0, *: auto}")
    assert cfg.trainer.strategy.placement == {"features.0": "cpu", "head": "cuda:0", "*": "auto"}


def test_the_groups_reach_the_strategy() -> None:
    cfg = composed(
        "devices.request=[cuda:0,cpu]",
        r"devices.memory={cuda\:0: 10GiB}",
        "placement.no_split=[Block]",
        "placement.plan=p.json",
    )
    strategy: Any = OmegaConf.to_container(cfg.trainer.strategy, resolve=True)
    assert strategy == {
        "_target_": "lightning_hetero.HeteroStrategy",
        "devices": ["cuda:0", "cpu"],
        "memory": {"cuda:0": "10GiB"},
        "placement": "auto",
        "no_split": ["Block"],
        "plan": "p.json",
        "constraints": None,
        "objective": "step_time",
        "profile": "auto",
        "replan": "never",
        "planning_limit_s": 10.0,
        "device_profile": None,
        "micro_batches": None,
        "micro_batching": "forward",
        "schedule": None,
        "rematerialize": False,
        "activation_checkpointing": None,
        "compile": None,
        "batch_norm": "whole",
    }


def test_a_schedule_file_reaches_the_strategy() -> None:
    strategy = composed("schedule=1f1b", "schedule.micro_batches=16").trainer.strategy
    assert (strategy.micro_batches, strategy.micro_batching, strategy.schedule) == (16, "step", "1f1b")
    assert composed("schedule=forward", "schedule.rematerialize=true").trainer.strategy.rematerialize
    chosen = composed("schedule=1f1b", "schedule.activation_checkpointing=[cuda:1]").trainer.strategy
    assert chosen.activation_checkpointing == ["cuda:1"]


def test_an_experiment_may_choose_the_placement_and_the_command_line_still_wins() -> None:
    assert composed("experiment=digits").placement.policy == "even"
    assert composed("experiment=digits", "placement=auto").placement.policy == "auto"
    assert composed("placement=auto", "experiment=digits").placement.policy == "auto"
    assert composed("experiment=digits").trainer.max_epochs == 6
    assert composed("trainer.max_epochs=1", "experiment=digits").trainer.max_epochs == 1


def test_plain_lightning_is_one_override_away() -> None:
    assert composed("experiment=digits", "devices=emulated", "trainer.strategy=auto").trainer.strategy == "auto"


def test_the_emulated_devices_are_three_unequal_ones() -> None:
    from lightning_hetero import resolve_devices

    request = OmegaConf.to_container(composed("devices=emulated").devices.request)
    inventory = resolve_devices(request)
    assert [(d.name, d.speed, d.memory_bytes, d.threads) for d in inventory] == [
        ("emulated:0", 1.0, 2 * 2**30, 1),
        ("emulated:1", 0.5, 2**30, 1),
        ("emulated:2", 0.25, 2**29, 1),
    ]


def lines_of_the_docs() -> list[str]:
    pages = (conf_dir().parent / "docs" / name for name in ("cli.md", "hydra.md"))
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [line for line in lines if re.match("lightning-hetero (plan|simulate|compare) ", line)]


@pytest.mark.parametrize("line", lines_of_the_docs())
def test_every_command_of_the_docs_composes(line: str) -> None:
    _, command, *words = shlex.split(line, comments=True)
    cfg = composed(*words, command=command)
    if command != "simulate":
        check_groups(cfg)
