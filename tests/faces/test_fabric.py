"""Lightning's Fabric has no such strategy, and says so itself."""

from __future__ import annotations

from typing import Any

import lightning
import pytest

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy


@pytest.mark.parametrize("strategy", ["hetero", HeteroStrategy(placement="even")], ids=["name", "object"])
def test_a_strategy_for_the_trainer_is_refused_by_fabric(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"invalid strategy name: `strategy=.*instance of `lightning\.fabric"):
        lightning.Fabric(strategy=strategy, accelerator="cpu")
