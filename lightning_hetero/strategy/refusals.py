"""What is refused before training, because Lightning or torch cannot do it over several devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.plan import Plan
from lightning_hetero.strategy._compat import prunes_globally


def check_callbacks(callbacks: Iterable[Any], plan: Plan | None) -> None:
    """Refuse callbacks that join the parameters of all layers into one tensor.

    Raises:
        UnsupportedError: Global pruning with a plan over several devices of torch.
    """
    if plan is None or len(plan.torch_devices) < 2:
        return
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if "ModelPruning" in names and prunes_globally(callback):
            raise UnsupportedError(
                "ModelPruning(use_global_unstructured=True) ranks the weights of all layers in one tensor, which torch "
                f"refuses over {', '.join(plan.torch_devices)}. Set use_global_unstructured=False, which prunes layer "
                "by layer, or use placement='single'."
            )
