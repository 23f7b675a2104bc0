"""A real GPU and the CPU together, against either of them alone. Skipped where torch sees no CUDA device.

Two devices never give equal bits: cuBLAS, cuDNN and the CPU's libraries add up the terms of a product in different
orders, and the functions of their mathematical libraries differ in the last bit. The bounds come from what another
order alone does on the CPU, in as many steps of the same models:

* float64 with Adam, the rows of a batch in another order: losses differ by 9e-16, weights by 1.5e-10. So large are
  weights apart whose gradient is nothing but rounding, as that of a bias ahead of a BatchNorm: Adam divides its 5e-17
  by 1e-8. A gradient that is wrong, lost or late moves a weight by the learning rate, 1e-2, at once.
* float32 against float64 with SGD: losses differ by 3e-7, weights by 4e-7. Adam is not compared in float32: there a
  gradient of pure rounding is as large as Adam's 1e-8, and becomes a step of the learning rate in a random direction.
* A plan with everything on cuda:0 is the same kernels in the same order: no difference at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import InfeasiblePlanError, ModelParallel, ModelParallelConfig
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.models import MODELS

pytestmark = pytest.mark.cuda

GPU = "cuda:0"
LOSS_BOUND, WEIGHT_BOUND = 1e-12, 1e-8  # in float64
SINGLE_BOUND = 1e-5  # in float32
PLACES = [[GPU, "cpu"], ["cpu", GPU]]
MakeTrainer = Callable[..., pl.Trainer]


@pytest.fixture
def trainer(tmp_path: Path) -> MakeTrainer:
    """`trainer("cpu")` and `trainer("gpu")` use one device, `trainer([GPU, "cpu"])` both, with borders everywhere."""

    def make(
        where: str | list[str], max_epochs: int = 2, strategy: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        if isinstance(where, str):
            options = {"accelerator": where, "devices": 1, **options}
        else:
            chosen = {"placement": "round_robin", "verbose": False, **(strategy or {})}
            options = {"strategy": HeteroStrategy(devices=where, **chosen), **options}
        return pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=max_epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )

    return make


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lets cuDNN round the inputs of float32 convolutions to ten bits unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.feature("devices: CUDA devices, alone and with the CPU", note="Run by hand on one H100; CI has no GPU.")
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_float64_over_both_gives_the_numbers_of_each_alone(name: str, places: list[str], trainer: MakeTrainer) -> None:
    spread = Classifier(name)
    run = trainer(places)
    run.fit(spread, data(name))
    assert isinstance(run.strategy, HeteroStrategy)
    assert run.strategy.plan is not None
    assert {stage.device for stage in run.strategy.plan.stages} == {GPU, "cpu"}
    for place in ("cpu", "gpu"):
        alone = Classifier(name)
        trainer(place).fit(alone, data(name))
        torch.testing.assert_close(spread.losses, alone.losses, rtol=0, atol=LOSS_BOUND)
        assert difference(spread, alone) < WEIGHT_BOUND


class Single(Classifier):
    """In float32, trained by SGD."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        self.float()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if x.is_floating_point() else x)


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied_transformer"])
def test_float32_over_both_stays_within_rounding_of_each_alone(name: str, trainer: MakeTrainer) -> None:
    spread = Single(name)
    trainer([GPU, "cpu"]).fit(spread, data(name))
    for place in ("cpu", "gpu"):
        alone = Single(name)
        trainer(place).fit(alone, data(name))
        torch.testing.assert_close(spread.losses, alone.losses, rtol=0, atol=SINGLE_BOUND)
        assert difference(spread, alone) < SINGLE_BOUND


def test_a_plan_on_the_gpu_alone_gives_its_very_numbers(trainer: MakeTrainer) -> None:
    spread, alone = Classifier(), Classifier()
    trainer([GPU, "cpu"], strategy={"placement": "single"}).fit(spread, data())
    trainer("gpu").fit(alone, data())
    assert spread.losses == alone.losses
    assert difference(spread, alone) == 0.0


def test_equal_runs_over_both_are_equal_bit_for_bit(trainer: MakeTrainer) -> None:
    first, second = Classifier(), Classifier()
    for model in (first, second):
        trainer([GPU, "cpu"]).fit(model, data())
    assert difference(first, second) == 0.0


class Wide(pl.LightningModule):
    """Four layers of 16 MiB each, of 64 MiB with gradients and the state of Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(12, 2048)), batch_size=4)


MIB = 1 << 20


def test_a_memory_limit_keeps_layers_with_all_that_belongs_to_them_off_the_gpu(trainer: MakeTrainer) -> None:
    """256 MiB are needed and 150 allowed, so two of the four layers stay on the CPU."""

    def peak_bytes(limit: str) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)
        limited = {"placement": "memory_first", "memory": {GPU: limit}}
        trainer([GPU, "cpu"], max_epochs=1, strategy=limited).fit(Wide())
        return torch.cuda.max_memory_allocated(GPU)

    whole, limited = peak_bytes("1GiB"), peak_bytes("150MiB")
    assert whole >= 256 * MIB
    # The difference does not see what both runs need alike, such as the workspaces of cuBLAS.
    assert whole - limited >= 128 * MIB


def test_a_limit_that_no_placement_can_keep_is_refused_before_training(trainer: MakeTrainer) -> None:
    limited = {"placement": "auto", "memory": {GPU: "100MiB", "cpu": "100MiB"}}
    with pytest.raises(InfeasiblePlanError, match=r"(?s)needed +limit.*too much"):
        trainer([GPU, "cpu"], strategy=limited).fit(Wide())


def devices_in(obj: Any) -> set[str]:
    if isinstance(obj, Tensor):
        return {obj.device.type}
    values = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return set().union(*map(devices_in, values))


@pytest.mark.parametrize("first", ["cpu", "gpu", "both"])
@pytest.mark.parametrize("second", ["cpu", "gpu", "both"])
def test_a_checkpoint_names_no_device_and_resumes_on_any(
    first: str, second: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    def where(word: str) -> str | list[str]:
        return [GPU, "cpu"] if word == "both" else word

    whole, started, resumed = (Classifier("convnet") for _ in range(3))
    trainer("cpu", max_epochs=4).fit(whole, data("convnet"))
    run = trainer(where(first))
    run.fit(started, data("convnet"))
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    if first == "both":
        assert devices_in(torch.load(path, weights_only=True)) == {"cpu"}
    trainer(where(second), max_epochs=4).fit(resumed, data("convnet"), ckpt_path=path)
    torch.testing.assert_close(started.losses + resumed.losses, whole.losses, rtol=0, atol=LOSS_BOUND)
    assert difference(resumed, whole) < WEIGHT_BOUND


def test_bf16_mixed_computes_in_bf16_on_both(trainer: MakeTrainer) -> None:
    class Records(Single):
        def __init__(self) -> None:
            super().__init__("mlp")
            self.computed: set[tuple[str, torch.dtype]] = set()
            for layer in self.net.children():
                layer.register_forward_hook(lambda m, a, out: self.computed.add((out.device.type, out.dtype)))

    model = Records()
    trainer([GPU, "cpu"], precision="bf16-mixed").fit(model, data())
    assert model.computed == {("cuda", torch.bfloat16), ("cpu", torch.bfloat16)}


@pytest.mark.feature(
    "precision: 16-mixed over CUDA devices and the CPU", note="Run by hand on one H100; CI has no GPU."
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer", ["first", "second"])  # one on each device
def test_infinite_gradients_on_either_leave_the_step_out(layer: str, fused: bool, trainer: MakeTrainer) -> None:
    class Overflows(Single):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3:
                loss = loss + getattr(self.net, layer).bias.to(loss.device).sum() * 1e38 * 1e38
            return loss

    model = Overflows("mlp")
    model.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=fused)
    run = trainer([GPU, "cpu"], precision="16-mixed")
    run.fit(model, data())
    assert {parameter.isfinite().all().item() for parameter in model.parameters()} == {True}
    assert run.precision_plugin.scaler.get_scale() == 2.0**14  # from 2 ** 16, halved in each of two epochs


@pytest.mark.parametrize("torchscript", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "nccl"])
def test_a_plain_loop_over_both_gives_the_numbers_of_the_cpu(backend: str, torchscript: bool) -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        found = []
        for x, y in data("convnet"):
            optimizer.zero_grad()
            output = model(x)
            loss = nn.functional.cross_entropy(output, y.to(output.device))
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    alone, apart = Classifier("convnet").net, Classifier("convnet").net
    parameters = [*apart.parameters()]
    config = ModelParallelConfig(
        model=apart, device_ids=[0, "cpu"], backend=backend, placement="round_robin", torchscript=torchscript
    )
    with ModelParallel(config) as model:
        assert str(model.output_device) == GPU
        assert {str(parameter.device) for parameter in parameters} == {GPU, "cpu"}
        torch.testing.assert_close(losses(model), losses(alone), rtol=0, atol=LOSS_BOUND)
    assert all(now is then for now, then in zip(apart.parameters(), parameters, strict=True))
    assert {parameter.device.type for parameter in parameters} == {"cpu"}
    assert difference(apart, alone) < WEIGHT_BOUND
