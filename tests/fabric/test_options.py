"""What Fabric cannot have is refused before anything runs, in words that say what to do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from torch import nn

from lightning_hetero import FabricStrategy
from lightning_hetero.errors import InventoryError, UnknownArgumentError, UnsupportedError, UsageError


@pytest.mark.feature("Fabric: micro_batching='step', profile='always', replan='auto'", "refused", "for the Trainer")
@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"micro_batching": "step"}, "Fabric has no training_step to run in parts"),
        ({"profile": "always"}, "Fabric does not say when a step begins"),
        ({"replan": "auto"}, "Fabric does not say when a step begins"),
    ],
    ids=str,
)
def test_what_only_a_trainer_can_do(option: dict[str, str], why: str) -> None:
    ((name, word),) = option.items()
    with pytest.raises(UnsupportedError) as refused:
        FabricStrategy(**option)  # type: ignore[arg-type]
    assert str(refused.value) == (
        f"{name}={word!r} is for the Trainer: {why}. Leave it out, or use Trainer(strategy='hetero')."
    )


def test_words_that_are_not_known() -> None:
    with pytest.raises(UsageError, match=r"^profile='sometimes' is not known; it may be 'auto' or 'never'$"):
        FabricStrategy(profile="sometimes")


@pytest.mark.feature("Fabric: unknown arguments of FabricStrategy", "refused", "The nearest name is suggested")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"microbatches": 4}, r"FabricStrategy has no argument 'microbatches'. Did you mean 'micro_batches'\? Its arg"),
        ({"schedule": "1f1b"}, r"no argument 'schedule'. .*arguments are: devices, placement, memory"),
    ],
)
def test_unknown_arguments(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownArgumentError, match=says) as caught:
        FabricStrategy(**given)
    assert isinstance(caught.value, TypeError)
    assert "placement" in inspect.signature(FabricStrategy).parameters  # what tools read is as it was


@pytest.mark.feature("Fabric: several processes or machines", "refused", "use the Trainer")
def test_several_machines() -> None:
    with pytest.raises(UnsupportedError, match=r"drives the devices of one machine from one process.*num_nodes=1"):
        Fabric(strategy="hetero", num_nodes=2)


class Two(LightningEnvironment):
    """A launcher that started two processes."""

    def world_size(self) -> int:
        """Two."""
        return 2


def test_several_processes() -> None:
    environment: ClusterEnvironment = Two()
    with pytest.raises(UnsupportedError, match="and several are meant here"):
        Fabric(strategy=FabricStrategy(devices="cpu"), plugins=environment)


@pytest.mark.feature("Fabric: accelerator='hetero' without the strategy", "refused")
def test_the_accelerator_without_the_strategy() -> None:
    fabric = Fabric(accelerator="hetero", devices="cpu")
    with pytest.raises(UsageError, match=r'Fabric\(accelerator="hetero", devices=\.\.\., strategy="hetero"\)\.$'):
        fabric.setup(nn.Linear(2, 2))


def test_devices_that_are_not_there() -> None:
    with pytest.raises(InventoryError):
        Fabric(strategy=FabricStrategy(devices="cuda:99"))


def test_a_strategy_without_fabric_says_what_to_do() -> None:
    strategy: Any = FabricStrategy(devices="cpu")
    with pytest.raises(UsageError, match=r"hand it to Fabric\(strategy=\.\.\.\)"):
        strategy.module_to_device(nn.Linear(2, 2))
