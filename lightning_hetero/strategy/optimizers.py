"""What the strategy does to optimizers: measures their state, keeps it beside its parameter, refuses some."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.graph.find import tensor_bytes
from lightning_hetero.runtime.transfer import to_device

log = logging.getLogger(__name__)

ADAM_FACTOR = 2.0  # two moments of the parameter's size

# How many tensors of the parameter's size an optimizer keeps for it, by its settings. Not measured for these: a step of
# an optimizer that nobody asked for is seen by whatever user code has put around the class.
_TENSORS_OF_STATE: dict[type[Optimizer], Callable[[Mapping[str, Any]], int]] = {
    torch.optim.SGD: lambda group: 1 if group.get("momentum") else 0,
    torch.optim.Adam: lambda group: 3 if group.get("amsgrad") else 2,
    torch.optim.AdamW: lambda group: 3 if group.get("amsgrad") else 2,
    torch.optim.Adagrad: lambda group: 1,
    torch.optim.Adadelta: lambda group: 2,
    torch.optim.Adamax: lambda group: 2,
    torch.optim.NAdam: lambda group: 2,
    torch.optim.RAdam: lambda group: 2,
    torch.optim.RMSprop: lambda group: 1 + bool(group.get("centered")) + bool(group.get("momentum")),
    torch.optim.Rprop: lambda group: 2,
    torch.optim.ASGD: lambda group: 1,
}


def state_factor(optimizers: Iterable[Optimizer]) -> float:
    """Bytes of optimizer state for each byte of trained parameter, over all optimizers together.

    Known for most optimizers of torch; of others it is measured by a step on a parameter of 4 x 4 zeros. Where that
    fails (an optimizer with a step of its own), Adam's factor of 2 is assumed.
    """
    trained_bytes = state_bytes = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            size = sum(tensor_bytes(p) for p in group["params"] if p.requires_grad)
            trained_bytes += size
            state_bytes += size * _factor(optimizer, group)
    return state_bytes / trained_bytes if trained_bytes else 0.0


def _factor(optimizer: Optimizer, group: dict[str, Any]) -> float:
    for cls in type(optimizer).__mro__:
        if cls in _TENSORS_OF_STATE:
            return float(_TENSORS_OF_STATE[cls](group))
    settings = {key: value for key, value in group.items() if key in optimizer.defaults}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            probe = nn.Parameter(torch.zeros(4, 4))
            probe.grad = torch.zeros(4, 4)
            twin = type(optimizer)([probe], **settings)
            twin.step()
            state = twin.state[probe]
    except Exception as error:
        log.debug("the state of %s could not be measured (%s); Adam's is assumed", type(optimizer).__name__, error)
        return ADAM_FACTOR
    full_size = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    return sum(map(tensor_bytes, full_size)) / tensor_bytes(probe)


def keep_state_beside_parameters(optimizers: Iterable[Optimizer]) -> None:
    """Move each parameter's optimizer state to the parameter's device.

    Step counters that are on the CPU stay there, where torch wants them, unless the optimizer is `capturable` or
    `fused`. ASGD has its own beside the parameter.
    """
    for optimizer in optimizers:
        on_device = {
            id(parameter): bool(group.get("capturable") or group.get("fused"))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for parameter, state in optimizer.state.items():
            if not isinstance(state, MutableMapping) or not isinstance(parameter, Tensor):
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if key == "step" and value.device.type == "cpu" and not on_device.get(id(parameter), False):
                    continue
                state[key] = to_device(value, parameter.device)


class StateFollows:
    """While it is open, optimizers that the strategy does not know have their state beside parameters that have moved.

    Such are optimizers that `configure_optimizers` does not return, and those inside of one that it returns. They are
    seen when they step.

    Args:
        module: The model whose parameters move.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: set[int] = set()
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        self.moved()

    def moved(self) -> None:
        """Parameters are elsewhere now."""
        self._own = set(map(id, self._module.parameters()))
        self._followed.clear()

    def close(self) -> None:
        """Look at no optimizer any more. Those that were seen follow to where parameters are now."""
        self._hook.remove()
        keep_state_beside_parameters(self._followed)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in self._followed:
            return
        if any(id(parameter) in self._own for group in optimizer.param_groups for parameter in group["params"]):
            keep_state_beside_parameters([optimizer])
            self._followed.add(optimizer)


def exchange_parameters(optimizers: Iterable[Optimizer], replaced: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Give optimizers the new Parameter objects where a move could not keep the old ones."""
    new_of = {id(old): (old, new) for old, new in replaced}
    if not new_of:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new_of[id(p)][1] if id(p) in new_of else p for p in group["params"]]
        for old, new in new_of.values():
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)


def check_optimizers(optimizers: Iterable[Optimizer], *, alone: bool = True) -> None:
    """Refuse, before training, optimizers that torch cannot run over several devices or processes.

    Args:
        optimizers: Of the run.
        alone: Whether this is the only process.

    Raises:
        UnsupportedError: LBFGS over several devices or processes, or `capturable=True` with parameters on the CPU.
    """
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        devices = sorted({str(p.device) for p in parameters})
        if isinstance(optimizer, torch.optim.LBFGS) and not alone:
            raise UnsupportedError(
                "LBFGS decides by the loss how often to run the step, and each process knows the loss of its own rows "
                "only, so they would come out of step. Use another optimizer, or one process."
            )
        if isinstance(optimizer, torch.optim.LBFGS) and len(devices) > 1:
            raise UnsupportedError(
                f"LBFGS joins all parameters into one vector, which cannot be done over {', '.join(devices)}. "
                "Use placement='single', or another optimizer, or let it train parameters of one device only."
            )
        for group in optimizer.param_groups:
            if group.get("capturable") and len(devices) > 1 and any(p.device.type == "cpu" for p in group["params"]):
                raise UnsupportedError(
                    f"{type(optimizer).__name__}(capturable=True) is for CUDA graphs and refuses the parameters that "
                    "the plan placed on the CPU. Leave out capturable=True, or leave the CPU out of `devices`."
                )
