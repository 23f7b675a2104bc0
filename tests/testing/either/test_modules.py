"""Modules on a device compute what they compute on the CPU, bit for bit, forwards and backwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetero.testing.models import MODELS

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]

LAYERS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "bilinear": (lambda: Call(nn.Bilinear(6, 6, 4), lambda m, x: m(x, x)), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, dilation=2), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv2d_same": (lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    "batch_norm": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "batch_norm_eval": (lambda: nn.BatchNorm1d(3).eval(), (4, 3)),
    "layer_norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance_norm": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "rms_norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "local_response_norm": (lambda: nn.LocalResponseNorm(2), (3, 4, 5)),
    "embedding": (lambda: Call(nn.Embedding(7, 4, padding_idx=0), lambda m, x: m(whole(x)[:, 0]) * x), (5, 4)),
    "embedding_bag": (lambda: Call(nn.EmbeddingBag(7, 4), lambda m, x: m(whole(x))), (5, 4)),
    "max_pool": (lambda: nn.MaxPool2d(2), (2, 3, 6, 6)),
    "avg_pool": (lambda: nn.AvgPool2d(3, padding=1), (2, 3, 6, 6)),
    "adaptive_pool": (lambda: nn.AdaptiveAvgPool2d(3), (2, 3, 7, 7)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 4)),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), (2, 8, 3, 3)),
    "pad": (lambda: nn.ReflectionPad2d(1), (2, 3, 4, 4)),
    "flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 3, 4)),
    "gru_cell": (lambda: nn.GRUCell(6, 4), (3, 6)),
    "lstm_cell": (lambda: Call(nn.LSTMCell(6, 4), lambda m, x: m(x)[0]), (3, 6)),
    "rnn": (lambda: Call(nn.RNN(6, 4, nonlinearity="relu"), lambda m, x: m(x)[0]), (5, 3, 6)),
    "lstm": (lambda: Call(nn.LSTM(6, 4, 2, bidirectional=True), lambda m, x: m(x)[0]), (5, 3, 6)),
    "lstm_projection": (lambda: Call(nn.LSTM(6, 4, proj_size=2, batch_first=True), lambda m, x: m(x)[0]), (5, 3, 6)),
    "lstm_no_bias": (lambda: Call(nn.LSTM(6, 4, bias=False), lambda m, x: m(x)[1][1]), (5, 3, 6)),
    "gru": (lambda: Call(nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), lambda m, x: m(x)[0]), (3, 5, 6)),
    "packed_gru": (lambda: Call(nn.GRU(6, 4, 2, bidirectional=True), lambda m, x: packed(m, x)), (5, 3, 6)),
    "packed_lstm": (lambda: Call(nn.LSTM(6, 4, 2, bidirectional=True), lambda m, x: packed(m, x)), (5, 3, 6)),
    "attention": (lambda: Call(nn.MultiheadAttention(6, 2), lambda m, x: m(x, x, x)[0]), (5, 3, 6)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (3, 5, 6)),
    "encoder_eval": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), (3, 5, 6)),
    "decoder_layer": (lambda: Call(nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0), lambda m, x: m(x, x)), (5, 3, 6)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (3, 6)),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(F, name)
        for name in (
            *(
                "relu",
                "gelu",
                "silu",
                "mish",
                "elu",
                "selu",
                "celu",
                "softplus",
                "hardswish",
                "hardsigmoid",
                "logsigmoid",
            ),
            *("leaky_relu", "hardtanh", "softsign", "tanhshrink", "softshrink", "hardshrink", "sigmoid", "tanh"),
        )
    },
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 0),
    "glu": lambda x: F.glu(x, -1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cross_entropy": lambda x: F.cross_entropy(x, whole(x)[:, 0] % 8, label_smoothing=0.1),
    "nll_loss": lambda x: F.nll_loss(x, whole(x)[:, 0] % 8, ignore_index=1),
    "mse_loss": lambda x: F.mse_loss(x, x.detach().flip(0)),
    "l1_loss": lambda x: F.l1_loss(x, x.detach().flip(0), reduction="sum"),
    "huber_loss": lambda x: F.huber_loss(x, x.detach().flip(0)),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), x.detach().softmax(-1), reduction="batchmean"),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0)),
    "cdist": lambda x: torch.cdist(x, x.flip(1)),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.view(2, 3, 2, 4),) * 3, is_causal=True),
    "masked_attention": lambda x: F.scaled_dot_product_attention(*(x.view(2, 3, 2, 4),) * 3, x[:2, :2] > 0.2),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "index_put": lambda x: x.index_put((whole(x)[:, 0] % 3,), x, accumulate=True),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(0, whole(x) % 3, x),
    "gather": lambda x: x.gather(1, whole(x) % 8),
    "sort": lambda x: x.sort(0).values,
    "topk": lambda x: x.topk(3).values,
    "cumsum": lambda x: x.cumsum(0),
    "var": lambda x: x.var(0),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, 0)),
    "where": lambda x: torch.where(x > 0, x, x * 2),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "stack": lambda x: torch.stack([x, x * 2]).sum(0),
    "inverse": lambda x: torch.linalg.inv(x @ x.t() + torch.eye(6, dtype=x.dtype, device=x.device)),
    "determinant": lambda x: torch.linalg.det(x @ x.t()),
    "svd": lambda x: torch.linalg.svdvals(x),
    "fft": lambda x: torch.fft.rfft(x, dim=0).abs(),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x.flip(0)) * torch.complex(x, x)),
}


class Call(nn.Module):
    """A layer whose call takes more than one tensor, or returns more than one."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def whole(x: Tensor) -> Tensor:
    """Integers from 0 to 6, taken from the values of `x`."""
    return (x.detach() * 7).abs().long() % 7


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5, 2]), enforce_sorted=False)
    output, hidden = layer(sequences)
    states = hidden if isinstance(hidden, tuple) else (hidden,)
    return nn.utils.rnn.pad_packed_sequence(output)[0].sum() + sum(state.sum() for state in states)


def moved(module: nn.Module, device: str) -> nn.Module:
    """A copy on another device, tied parameters still tied, which plain `.to` does not do for foreign device types."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return copy.deepcopy(module).to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def forward_and_backward(module: nn.Module, x: Tensor, device: str) -> list[Tensor]:
    """Output, gradients and buffers, all on the CPU, of a copy of the module on `device`."""
    module, x = moved(module, device), x.clone().to(device)
    x.requires_grad_(x.is_floating_point())
    output = module(x)
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=device)
    (output * weights.view(output.shape)).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    found = [output.detach(), *(g for g in gradients if g is not None), *module.buffers()]
    assert {str(tensor.device) for tensor in found} == {device}
    return [tensor.cpu() for tensor in found]


def assert_equal_to_the_cpu(module: nn.Module, x: Tensor, device: str) -> None:
    expected, found = (forward_and_backward(module, x, where) for where in ("cpu", device))
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_cpu(device: str, name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    assert_equal_to_the_cpu(make().double(), normal(*shape), device)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_equals_the_cpu(device: str, name: str) -> None:
    assert_equal_to_the_cpu(Call(nn.Identity(), lambda _, x: FUNCTIONS[name](x)), normal(6, 8), device)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_the_cpu(device: str, name: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    assert_equal_to_the_cpu(make().double(), inputs(4, torch.Generator().manual_seed(1)), device)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_inference_takes_the_same_shortcuts_as_on_the_cpu(device: str, name: str) -> None:
    """Without autograd, attention and encoder layers run as one operator each."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), inputs(4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved(model, device)(x.to(device)).cpu(), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d", "batch_norm", "layer_norm", "encoder_layer", "gru"])
def test_other_precisions_equal_the_cpu_too(device: str, name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    assert_equal_to_the_cpu(make().to(dtype), normal(*shape).to(dtype), device)


def test_a_tie_is_one_parameter_still_if_it_is_swapped_on_the_move(device: str) -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    one, two = moved(nn.Sequential(one, two), device)
    assert one.weight is two.weight
    assert str(one.weight.device) == device
