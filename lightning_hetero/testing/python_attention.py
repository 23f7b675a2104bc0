"""Attention on the devices of the Python backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_hetero.testing.python_tensors import to_host

_aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`aten::scaled_dot_product_attention` with the algorithm that the host would choose."""

    def twin(tensor: Tensor) -> Tensor:
        return to_host(tensor).requires_grad_(tensor.requires_grad)

    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    mask = None if attn_mask is None else twin(attn_mask)
    choice = torch._fused_sdp_choice(
        twin(query), twin(key), twin(value), mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if choice == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value):
        flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
        attended: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return attended
    maths = _aten._scaled_dot_product_attention_math.default
    result: Tensor = maths(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return result
