"""What torch.compile and TorchScript make of parts of a model, and of all of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn

from lightning_hetero import HeteroStrategy
from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.runtime.compiled import Compiled
from lightning_hetero.testing.lightning_module import Classifier, data

pytestmark = [
    pytest.mark.usefixtures("devices_measured_once"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Looks(Classifier):
    """Looks at itself in the middle of a run."""

    def on_train_epoch_end(self) -> None:
        self.keys = list(self.state_dict())
        self.names = [name for name, _ in self.named_modules()]
        self.rows = list(summarize(self, max_depth=-1).layer_names)
        forwards = (module.__dict__.get("forward") for module in self.modules())
        self.compiled = sum(isinstance(forward, Compiled) for forward in forwards)
        self.copied = copy.deepcopy(self.net)
        self.pickled = pickle.loads(pickle.dumps(self.net))


SHORT = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1}
STAGE = pytest.mark.feature("compile: HeteroStrategy(compile='stage')", note="With the backend of your choice.")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Adam would make steps of its own of gradients that are rounding alone, as that of a bias before a BatchNorm."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@STAGE
@pytest.mark.parametrize(
    ("devices", "name"),
    # Of the emulated accelerator the compiler cannot ask which kind of attention to take.
    [("emulated", "convnet"), ("emulated", "tied_transformer"), ("accelerator", "convnet")],
    indirect=["devices"],
)
def test_each_stage_in_one_piece(name: str, both: Any) -> None:
    runs = both(
        lambda: Looks(name, sgd),
        run=lambda trainer, model: trainer.fit(model, data(name), data(name)),
        strategy={"compile": {"backend": "aot_eager"}},
        **SHORT,
    )
    runs.check_parity()
    model, alone = runs.spread.model, runs.alone.model
    assert model.compiled >= 3
    assert (model.keys, model.names, model.rows) == (alone.keys, alone.names, alone.rows)
    assert not any("_orig_mod" in name for name in [*model.names, *runs.spread.trainer.strategy.plan.device_of])
    assert not any(isinstance(vars(module).get("forward"), Compiled) for module in model.modules())  # afterwards


@STAGE
def test_copies_are_whole_modules_of_their_own(hostile: Any) -> None:
    model = Looks()
    hostile(strategy={"compile": {"backend": "eager"}}).fit(model, data())
    x = next(iter(data()))[0]
    for twin in (model.copied.cpu(), model.pickled.cpu()):
        nn.init.zeros_(twin.third.weight)
        nn.init.zeros_(twin.third.bias)
        assert twin(x).abs().max() == 0.0
    assert model(x).abs().max() > 0.0


@STAGE
@pytest.mark.parametrize(
    "options",
    [{"rematerialize": True}, {"micro_batching": "step", "micro_batches": 4}, {"profile": "always"}],
    ids=str,
)
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_with_other_options(options: dict[str, Any], both: Any) -> None:
    both(Classifier, strategy={"compile": {"backend": "aot_eager"}, **options}, **SHORT).check_parity()


@STAGE
def test_user_code_may_still_mix_devices(both: Any) -> None:
    class Mixes(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 1e-3 * sum(p.abs().sum() for p in self.parameters())

    both(Mixes, strategy={"compile": {"backend": "aot_eager"}}, **SHORT).check_parity()


@STAGE
@pytest.mark.slow
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_with_the_compiler_of_torch(both: Any) -> None:
    both(Classifier, strategy={"compile": "stage"}, **SHORT).check_parity()


@STAGE
@pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
def test_devices_that_the_compiler_does_not_know(both: Any, caplog: pytest.LogCaptureFixture) -> None:
    both(Classifier, strategy={"compile": "stage", "placement": {"": "dev:0"}}, spread=False).check_parity()
    assert (
        "net is not compiled: torch's compiler inductor does not know 'dev' devices; compile={'backend'" in caplog.text
    )


@STAGE
def test_what_is_compiled_already_stays_as_it_is(both: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.first = torch.compile(self.net.first, backend="eager")  # type: ignore[assignment]
            self.net.second = torch.jit.script(self.net.second)

    both(Mixed, strategy={"compile": {"backend": "eager"}}, **SHORT).check_parity()
    assert "net.first is not compiled: it is compiled already" in caplog.text
    assert "net.second is not compiled: TorchScript has compiled it already" in caplog.text


@STAGE
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_replicas_run_as_they_are(both: Any, caplog: pytest.LogCaptureFixture) -> None:
    shares = {"net.second": {"emulated:0": 1, "emulated:1": 1}, "": "emulated:2"}
    both(Classifier, strategy={"compile": {"backend": "eager"}, "placement": shares}, **SHORT).check_parity()
    assert "net.second is not compiled: it has replicas" in caplog.text


@pytest.mark.feature("compile: HeteroStrategy(compile='stage') with activation_checkpointing", "refused")
def test_stages_that_run_again(hostile: Any) -> None:
    trainer = hostile(strategy={"compile": "stage", "activation_checkpointing": True})
    with pytest.raises(
        UnsupportedError, match=r"cannot be compiled as one piece and have layers that run again.*Leave"
    ):
        trainer.fit(Classifier(), data())


@pytest.mark.feature("compile: HeteroStrategy(compile='stage') with other arguments than those of torch", "refused")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("model", r"compile='model' is not known; it may be 'stage', a mapping of torch.compile's arguments"),
        (True, r"compile=True is not known"),
        ({"bakend": "eager"}, r"'bakend' is no argument of torch.compile; those are backend, mode"),
    ],
)
def test_words_that_are_not_known(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        HeteroStrategy(compile=given)


class Quiet(Classifier):
    """Without `self.log`, which torch 2.13 cannot trace in a step of Lightning 2.6."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.feature("compile: torch.compile of the LightningModule", note="Where Lightning itself can; runs whole.")
def test_the_whole_lightning_module(both: Any) -> None:
    both(lambda: torch.compile(Quiet(), backend="aot_eager"), **SHORT).check_parity()


@pytest.mark.feature("compile: module.compile() of the LightningModule")
def test_the_whole_lightning_module_in_place(both: Any) -> None:
    def make() -> Quiet:
        model = Quiet()
        model.compile(backend="eager")
        return model

    both(make, **SHORT).check_parity()
