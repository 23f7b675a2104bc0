"""What is in effect while a trial compares a module with itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def uncompiled() -> AbstractContextManager[Any]:
    """Within the block, what torch.compile has made runs as it was written: it would be compiled for every part."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, the modules are in evaluation mode; by their flag, so that no `train` of user code runs."""
    modes = [(part, part.training) for part in modules]
    try:
        for part, _ in modes:
            _set_mode(part, False)
        yield
    finally:
        for part, mode in modes:
            _set_mode(part, mode)


def _set_mode(module: nn.Module, training: bool) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.train(training)  # the flag is in C++
    else:
        module.__dict__["training"] = training
