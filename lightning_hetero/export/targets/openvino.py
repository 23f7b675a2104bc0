"""Target "openvino": OpenVINO's IR, for one device ("CPU", "GPU.0") or several ("HETERO:FPGA,CPU").

With `HETERO:` and an affinity map, every operation is told its device. Without the map OpenVINO decides by which
operations the devices support, in the order in which they are named.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason

HETERO = "HETERO:"


@cache
def core() -> Any:
    """The `openvino.Core` that all stages of this process use: the place to register plugins of other vendors."""
    import openvino

    return openvino.Core()


class _OpenVINO:
    packages: Mapping[str, str] = {"openvino": "openvino"}
    default_device = "CPU"
    runs = True

    def available(self) -> tuple[str, ...]:
        return tuple(core().available_devices)

    def check(self, device: str) -> None:
        for part in parts_of(device):
            if part not in self.available() and not any(known.startswith(f"{part}.") for known in self.available()):
                raise TargetError(
                    f"target 'openvino:{device}': OpenVINO has no device {part!r} here. "
                    f"It has {', '.join(self.available())}; install its driver or plugin, or choose one of these with "
                    "overrides=."
                )

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        import openvino

        try:
            with without_chatter():
                model, affinity = _model(stage, device)
        except TargetError:
            raise
        except Exception as error:  # OpenVINO raises classes of its own for operations that it cannot convert
            raise TargetError(
                f"{stage.name}: OpenVINO cannot convert it: {reason(error)}. Use another target for this stage."
            ) from error
        path = folder / f"{stage.name}.xml"
        openvino.save_model(model, path, compress_to_fp16=False)  # True by default, and the numbers would differ
        return Saved((path, path.with_suffix(".bin")), affinity)

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        try:
            compiled = compile_model(file, device, affinity)
        except RuntimeError as error:
            raise TargetError(
                f"target 'openvino:{device}' does not take {file.name}: {reason(error)}. Choose another device."
            ) from error
        return compiled_run(compiled)


def parts_of(device: str) -> list[str]:
    """The devices that a name stands for: one, or those after `HETERO:`."""
    return device.removeprefix(HETERO).split(",")


def compile_model(file: Path, device: str, affinity: Mapping[str, str]) -> Any:
    """Read a model, tell its operations their devices, and compile it for float32."""
    model = core().read_model(file)
    if device.startswith(HETERO):
        for operation in model.get_ops():
            name = operation.get_friendly_name()
            if affinity.get(name) in parts_of(device):
                operation.get_rt_info()["affinity"] = affinity[name]
    # On some CPUs the default is bfloat16, which is off by 3e-3.
    return core().compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"})


def compiled_run(compiled: Any) -> Run:
    """Run a compiled model, with an inference request for each thread that calls."""
    requests = threading.local()

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not hasattr(requests, "request"):
            requests.request = compiled.create_infer_request()
        found = requests.request.infer([_array(tensor) for tensor in inputs])
        return [_tensor(found[output], output.element_type.get_type_name()) for output in compiled.outputs]

    return run


def _array(tensor: Tensor) -> Any:
    """As OpenVINO takes it: NumPy does not know bfloat16, so its bits come with their type."""
    import openvino

    here = tensor.detach().cpu().contiguous()
    if here.dtype != torch.bfloat16:
        return here.numpy()
    return openvino.Tensor(here.view(torch.int16).numpy(), openvino.Shape(list(here.shape)), openvino.Type.bf16)


def _tensor(array: Any, kind: str) -> Tensor:
    if kind != "bf16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view("int16")).view(torch.bfloat16)  # OpenVINO calls the bits float16


def _model(stage: StageProgram, device: str) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The stage as one model, and the device of each operation if the stage says it."""
    if not device.startswith(HETERO) or not stage.parts:
        return _convert(stage), ()
    for place, part in stage.parts:
        if place not in parts_of(device):
            raise TargetError(
                f"{stage.name}: affinity puts {', '.join(part.units) or 'operations'} on {place!r}, which is not in "
                f"'openvino:{device}'. Name one of {', '.join(parts_of(device))}."
            )
    return _joined(stage)


def _convert(stage: StageProgram) -> Any:
    """What `openvino.convert_model` does, without its report to OpenVINO's makers of what was converted."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchFXPythonDecoder.from_exported_program(stage.exported)  # has to live as long as the conversion
    model = front_end.convert(front_end.load(decoder))
    # Without the sizes of the example all dimensions are open, and HETERO fails on that.
    shapes = [[-1 if size is None else size for size in shape] for shape in stage.shapes]
    model.reshape({index: openvino.PartialShape(shape) for index, shape in enumerate(shapes)})
    return model


def _joined(stage: StageProgram) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The parts converted one by one, so that it is known where each operation belongs, and joined to one model."""
    import openvino
    from openvino import opset13

    parameters: list[tuple[str, Any]] = []
    ports: dict[str, Any] = {}
    affinity: list[tuple[str, str]] = []
    for index, (place, part) in enumerate(stage.parts):
        model = _convert(part)
        for operation in model.get_ops():
            operation.set_friendly_name(f"{index}/{operation.get_friendly_name()}")
            affinity.append((operation.get_friendly_name(), place))
        for name, parameter in zip(part.inputs, model.get_parameters(), strict=True):
            if name in ports:
                parameter.output(0).replace(ports[name])
            else:  # an input of the stage
                parameters.append((name, parameter))
                ports[name] = parameter.output(0)
        for name, result in zip(part.outputs, model.get_results(), strict=True):
            ports[name] = result.input(0).get_source_output()
    order = {name: index for index, name in enumerate(stage.part_inputs)}
    parameters.sort(key=lambda pair: order[pair[0]])
    results = [opset13.result(ports[name]) for name in stage.part_outputs]
    joined = openvino.Model(results, [parameter for _, parameter in parameters], stage.name)
    known = {operation.get_friendly_name() for operation in joined.get_ops()}
    last = stage.parts[-1][0]
    affinity = [(name, place) for name, place in affinity if name in known]
    affinity += [(result.get_friendly_name(), last) for result in joined.get_results()]
    return joined, tuple(affinity)


TARGET = _OpenVINO()
