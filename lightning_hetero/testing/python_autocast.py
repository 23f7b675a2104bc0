"""Autocast on the devices of the Python backend: excerpts from CUDA's lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lightning_hetero.testing.backend import NAME
from lightning_hetero.testing.python_fallback import on_device, overload

_LOWER_PRECISION = (
    *("mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "addbmm", "matmul", "linear", "prelu"),
    *("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "scaled_dot_product_attention"),
    *("lstm_cell", "gru_cell"),
)
_FULL_PRECISION = (
    *("exp", "expm1", "log", "log1p", "log2", "log10", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt"),
    *("layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "softplus", "logsumexp"),
    *("sum", "sum.dim_IntList", "cumsum", "cumprod", "prod", "prod.dim_int", "cosine_similarity", "cdist"),
    *("nll_loss", "nll_loss2d", "l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "kl_div"),
    *("binary_cross_entropy_with_logits", "poisson_nll_loss", "soft_margin_loss", "multi_margin_loss"),
)


def register(everything: torch.library.Library, aten: torch.library.Library) -> None:
    """Register the casts.

    Args:
        everything: Library of the namespace `_`.
        aten: Library of the namespace `aten`.
    """
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _LOWER_PRECISION:
        aten.impl(name, _with_inputs_as(None, overload(name)), "AutocastPrivateUse1")
    for name in _FULL_PRECISION:
        aten.impl(name, _with_inputs_as(torch.float32, overload(name)), "AutocastPrivateUse1")


def _with_inputs_as(dtype: torch.dtype | None, op: Any) -> Callable[..., Any]:
    """An autocast kernel; `None` stands for the dtype that the user gave to `torch.autocast`."""
    autocast = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype or torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            if on_device(value) and value.is_floating_point() and value.dtype is not torch.float64:
                return value.to(wanted)
            return value

        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
