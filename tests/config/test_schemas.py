"""The groups `devices` and `placement` refuse names and types that mean nothing."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from lightning_hetero._conf import conf_dir
from lightning_hetero.config import check_groups, store_schemas
from lightning_hetero.errors import InventoryError, PlacementError, UsageError


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*overrides])


@pytest.mark.parametrize("word", ["placement.polcy=even", "devices.requests=[cpu]"])
def test_a_misspelt_key_is_refused(word: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{key}'"):
        composed(word)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("placement.no_split=7", "int"),
        ("placement.plan=[a]", "Cannot convert 'list' to string"),
    ],
)
def test_a_wrong_type_is_refused(word: str, why: str) -> None:
    with pytest.raises(ConfigCompositionException, match=word.partition("=")[0]) as caught:
        composed(word)
    assert why in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        (
            "+placement.polcy=even",
            UsageError,
            "nothing reads 'placement.polcy'; known are policy, device_map, no_split, constraints, objective, plan, "
            "profile, replan, time_limit_s, device_profile. Did you mean 'placement.policy'?",
        ),
        ("+devices.zzz=1", UsageError, "nothing reads 'devices.zzz'; known are request, memory."),
        (
            "devices.memory=10GiB",
            InventoryError,
            r"devices.memory='10GiB' is not a mapping; write for example 'devices.memory={cuda\:0: 10GiB}'",
        ),
        ("placement.device_map=cpu", PlacementError, "placement.device_map='cpu' is not a mapping; write for example "),
        ("placement=manual", PlacementError, "placement 'manual' needs a device map; write for example "),
    ],
)
def test_what_hydra_lets_pass_is_refused_before_a_job(word: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_groups(composed(word))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["experiment=digits", "devices=emulated"],
        ["placement=manual", "placement.device_map={features: cpu}"],
        ["placement.policy={_target_: lightning_hetero.placement.EvenPolicy}"],
        ["~placement", "trainer.strategy=auto"],
    ],
    ids=str,
)
def test_what_means_something_passes(words: list[str]) -> None:
    check_groups(composed(*words))


def test_storing_the_schemas_again_changes_nothing() -> None:
    before = composed()
    store_schemas()
    assert composed() == before
