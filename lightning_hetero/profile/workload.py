"""What a model has to do, whatever does it: operations and bytes of its units, and the costs that follow for devices.

Numbers and names only, so that it is saved beside a plan and the plan can be simulated on other devices, without the
model and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.devices.origins import DATA_SHEET
from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.profile.costs import OWN_CODE, Curve, Flow, Line, ModelProfile, UnitCost
from lightning_hetero.profile.estimate import ADAM_ACCESSES, flops_per_s

# Parts of the rates that matrix products and copies of ordinary sizes reach, where rates are those of a data sheet.
_REACHED_FLOPS, _REACHED_BYTES = 0.5, 0.8
# Where nothing is known of a device of speed 1, as in `estimate_profile`.
_FLOPS_PER_S, _BYTES_PER_S = 1e11, 1e10
_NONE = Line()
_EAGER_S = 8e-6  # of Python, dispatch and autograd for each operation in training; an exported model has none of it
_CALL_OVERHEAD_S = 250e-6  # of the runtime for each call of a stage, see benchmarks/overhead.py


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWork:
    """What one unit does in one call.

    Attributes:
        name: Its name.
        calls: How often it is called in a step.
        operations_per_row: Floating-point operations of the forward for each row of the batch.
        weights_bytes: Bytes of its parameters, read in every call.
        moved_bytes: Bytes of inputs and outputs.
        launches: Operations of torch in a forward, each of which a device has to start.
        trains: Whether gradients of its parameters are computed.
        passes_gradient: Whether a gradient goes on to its inputs.
        saved_bytes: And all further fields: see `UnitCost`.
    """

    name: str
    calls: int = 1
    operations_per_row: float = 0.0
    weights_bytes: int = 0
    moved_bytes: Line = _NONE
    launches: int = 1
    trains: bool = True
    passes_gradient: bool = True
    saved_bytes: Line = _NONE
    saved_output_bytes: Line = _NONE
    saved_input_bytes: Line = _NONE
    temporary_bytes: Line = _NONE
    backward_bytes: Line = _NONE

    def named(self, name: str, calls: int) -> UnitWork:
        """The work of another unit of the same sort."""
        return replace(self, name=name, calls=calls)

    def cost(self, devices: tuple[DeviceSpec, ...], rows: int, training: bool, dtype: str) -> UnitCost:
        """Seconds and bytes on some devices."""
        counts = sorted({1, max(2, rows), *(max(1, rows // parts) for parts in (2, 4, 8))})
        forward = {d.name: Curve(tuple((n, self._seconds(d, n, dtype, training)) for n in counts)) for d in devices}
        passes = int(self.trains) + int(self.passes_gradient)
        return UnitCost(
            name=self.name,
            calls=self.calls,
            forward_s=forward,
            backward_s={name: curve.scaled(passes) for name, curve in forward.items()} if training else {},
            saved_bytes=self.saved_bytes if training else Line(),
            saved_output_bytes=self.saved_output_bytes if training else Line(),
            saved_input_bytes=self.saved_input_bytes if training else Line(),
            temporary_bytes=self.temporary_bytes,
            backward_bytes=self.backward_bytes,
        )

    def _seconds(self, device: DeviceSpec, rows: int, dtype: str, training: bool) -> float:
        """The roofline (Williams et al., CACM 2009): as long as its operations or its bytes take, whichever is more."""
        compute_s = rows * self.operations_per_row / reached_flops_per_s(device, dtype)
        memory_s = (self.weights_bytes + self.moved_bytes(rows)) / reached_bytes_per_s(device)
        launch_s = max(device.launch_s or 0.0, _EAGER_S if training else 0.0)
        return self.calls * (max(compute_s, memory_s) + self.launches * launch_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a model does in one step.

    Attributes:
        rows: Rows of a batch.
        training: Whether there is a backward.
        units: In the order of their first call.
        flows: What passes between them.
        sees_batch: Names of units that see the batch, see `ModelProfile`.
        out_of_sight: Names of units of which nobody knows what they are called with.
        own_saved_bytes: What autograd keeps of the model's own code, the loss included.
        own_temporary_bytes: What that code needs for a moment.
        dtype: Of the parameters: "float32".
        coupled: Names of modules that make rows depend on each other, see `ModelProfile`.
    """

    rows: int
    training: bool
    units: tuple[UnitWork, ...]
    flows: tuple[Flow, ...] = ()
    sees_batch: tuple[str, ...] = ()
    out_of_sight: tuple[str, ...] = ()
    own_saved_bytes: Line = _NONE
    own_temporary_bytes: Line = _NONE
    dtype: str = "float32"
    coupled: tuple[str, ...] = ()

    @classmethod
    def of_sizes(cls, graph: ModelGraph, *, rows: int, training: bool, dtype: str = "float32") -> Workload:
        """Where nothing can be called: each parameter is multiplied and added once for each row."""
        units = tuple(
            UnitWork(
                name=unit.name,
                operations_per_row=2.0 * unit.parameters,
                weights_bytes=unit.parameter_bytes,
                trains=unit.trainable_bytes > 0,
                backward_bytes=Line(float(unit.trainable_bytes)) if training else Line(),
            )
            for unit in graph.units
        )
        return cls(rows=rows, training=training, units=units, dtype=dtype)

    def profile(self, graph: ModelGraph, inventory: Inventory) -> ModelProfile:
        """What the step costs on these devices, by their rates. Devices that cannot train are left out in training."""
        devices = inventory.trainable if self.training else tuple(inventory)
        nothing = {device.name: Curve(((1, 0.0),)) for device in devices}
        return ModelProfile(
            model=graph.fingerprint,
            rows=self.rows,
            units=tuple(unit.cost(devices, self.rows, self.training, self.dtype) for unit in self.units),
            own_code=UnitCost(
                name=OWN_CODE,
                forward_s=nothing,
                backward_s=nothing if self.training else {},
                saved_bytes=self.own_saved_bytes,
                temporary_bytes=self.own_temporary_bytes,
            ),
            flows=self.flows,
            sees_batch=self.sees_batch,
            out_of_sight=self.out_of_sight,
            coupled=self.coupled,
            optimizer_s_per_byte={d.name: ADAM_ACCESSES / reached_bytes_per_s(d) for d in devices}
            if self.training
            else {},
            gradient_sum_s_per_byte={d.name: 3 / reached_bytes_per_s(d) for d in devices} if self.training else {},
            call_overhead_s=_CALL_OVERHEAD_S,
            estimated=True,
            notes=("All seconds are estimates from shapes and rates of devices; nothing was run.",),
        )

    def to_dict(self) -> dict[str, Any]:
        """The workload as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Workload:
        """Read what `to_dict` wrote.

        Raises:
            ProfileError: A field is missing, unknown or of a wrong value.
        """
        try:
            return cls(
                **{
                    **data,
                    "units": tuple(UnitWork(**_with_lines(unit)) for unit in data["units"]),
                    "flows": tuple(Flow(**_with_lines(flow)) for flow in data["flows"]),
                    "sees_batch": tuple(map(str, data.get("sees_batch", ()))),
                    "out_of_sight": tuple(map(str, data.get("out_of_sight", ()))),
                    "coupled": tuple(map(str, data.get("coupled", ()))),
                    "own_saved_bytes": Line(**data["own_saved_bytes"]),
                    "own_temporary_bytes": Line(**data["own_temporary_bytes"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProfileError(f"the costs of the model are damaged: {type(error).__name__}: {error}") from error


def reached_flops_per_s(device: DeviceSpec, dtype: str) -> float:
    """Floating-point operations per second that matrix products of a dtype reach on a device."""
    rate = flops_per_s(device, dtype)
    if rate is None:
        return _FLOPS_PER_S * device.speed
    return rate * _REACHED_FLOPS if device.measured in ("", DATA_SHEET) else rate


def reached_bytes_per_s(device: DeviceSpec) -> float:
    """Bytes per second that its memory reaches."""
    rate = device.memory_bytes_per_s
    if rate is None:
        return _BYTES_PER_S * device.speed
    return rate * _REACHED_BYTES if device.measured in ("", DATA_SHEET) else rate


def _with_lines(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: Line(**value) if key.endswith("_bytes") and isinstance(value, Mapping) else value
        for key, value in record.items()
    }
