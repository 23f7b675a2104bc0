"""Tracing without real tensors, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def test_fake_tensors_keep_their_device_and_take_no_memory(device: str) -> None:
    with FakeTensorMode():
        x = torch.empty(10**9, 10**6, device=device)
        assert str((x + x).device) == device


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_run_without_inductor(device: str, backend: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(device), torch.randn(3, 4).to(device)
    expected = module(x)
    try:
        assert torch.equal(torch.compile(module, backend=backend)(x), expected)
    finally:
        torch.compiler.reset()
