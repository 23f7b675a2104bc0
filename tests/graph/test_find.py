"""Where a model may be split, and what stays together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.find import find_units
from lightning_hetero.testing.models import MODELS, Attention, TiedTransformer


def names(module: nn.Module, *no_split: str) -> tuple[str, ...]:
    return find_units(module, no_split).names


def test_a_module_without_tensors_below_it_is_a_unit() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    assert names(model) == ("0", "2.0")


def test_modules_of_torch_nn_that_use_their_childrens_weights_stay_whole() -> None:
    graph = find_units(Attention())
    assert graph.names == ("embed", "attention", "head")
    assert graph.whole == (
        ("attention", "MultiheadAttention of torch.nn may use the weights of its children directly"),
    )
    assert names(nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2)})) == ("layer",)


def test_a_transformer_encoder_is_split_at_its_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert names(nn.Sequential(encoder)) == ("0.layers.0", "0.layers.1")


class WithOwnParameter(nn.Module):
    """Like an adapter around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.base = nn.Linear(2, 2)


class Backbone(nn.Module):
    """Like a vision transformer: a parameter next to a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(5))
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_a_module_that_owns_parameters_stays_whole_unless_it_holds_a_list_of_modules() -> None:
    assert names(nn.Sequential(WithOwnParameter())) == ("0",)
    graph = find_units(nn.Sequential(Backbone()))
    assert graph.names == ("0.blocks.0", "0.blocks.1")
    assert graph.loose_parameter_bytes == 20


def test_parameters_of_the_root_are_loose() -> None:
    graph = find_units(WithOwnParameter())
    assert graph.names == ("base",)
    assert graph.loose_parameter_bytes == 4


def test_parameter_lists_belong_to_the_module_above() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.ParameterList([nn.Parameter(torch.ones(3))])
            self.layer = nn.Linear(2, 2)

    assert names(Model()) == ("layer",)
    assert names(nn.Sequential(Model())) == ("0",)


def test_units_that_share_a_parameter_are_tied_and_count_it_once() -> None:
    model = TiedTransformer()
    graph = find_units(model)
    assert graph["head"].tied_to == "embed"
    assert graph["head"].parameters == 0
    assert sum(unit.parameters for unit in graph.units) + 48 == sum(p.numel() for p in model.parameters())
    assert [unit.name for unit in graph.groups[0]] == ["embed", "head"]


def test_ties_reach_across_several_units() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    model[1].weight = model[3].weight
    model[2].bias = model[3].bias
    graph = find_units(model)
    assert [unit.tied_to for unit in graph.units] == ["0", "1", "1", "1"]


def test_a_module_registered_twice_is_one_unit_with_an_alias() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2), "c": layer})
    graph = find_units(model)
    assert graph.names == ("a", "b")
    assert graph["c"] is graph["a"]


def test_units_without_parameters_follow_their_neighbour() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    graph = find_units(model)
    assert graph.names == ("0", "1", "2")
    assert len(graph.groups) == 1


def test_no_split_takes_names_and_classes_and_models_may_declare_their_own() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    assert names(model, "body") == ("body", "head")
    assert names(model, "Sequential") == ("body", "head")
    model._no_split_modules = ["Sequential"]
    assert names(model) == ("body", "head")


def test_a_wrong_no_split_names_the_nearest_module() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    with pytest.raises(
        PlacementError, match=r"no_split='bodi' is neither the name nor the class .* Did you mean 'body'"
    ):
        find_units(model, ["bodi"])


def test_scripted_and_compiled_modules_stay_whole() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"compiled": torch.compile(inner, backend="eager"), "plain": nn.Linear(2, 2)})
    graph = find_units(model)
    assert graph.names == ("compiled", "plain")
    assert dict(graph.whole)["compiled"] == "it is compiled as a whole"


def test_metrics_and_modules_placed_by_others_are_no_units() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    spread = nn.Linear(2, 2)
    spread.hf_device_map = {"": 0}
    model = nn.ModuleDict({"metric": torchmetrics.MeanMetric(), "spread": spread, "own": nn.Linear(2, 2)})
    graph = find_units(model)
    assert graph.names == ("own",)
    assert graph.loose_parameter_bytes == 0


def test_frozen_parameters_need_no_gradient() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    unit = find_units(nn.Sequential(layer)).units[0]
    assert (unit.parameter_bytes, unit.trainable_bytes) == (24, 8)


@pytest.mark.parametrize("name", MODELS)
def test_looking_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    find_units(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_on_the_meta_device_can_be_planned() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000))
    assert find_units(model).units[0].parameter_bytes == 4 * (100_000**2 + 100_000)


def test_equal_models_have_equal_fingerprints() -> None:
    assert find_units(Attention()).fingerprint == find_units(Attention()).fingerprint
    assert find_units(Attention()).fingerprint != find_units(TiedTransformer()).fingerprint
