"""Target "onnx": an ONNX file for ONNX Runtime, on the execution provider that is asked for and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason

_CPU = "CPUExecutionProvider"
_BFLOAT16, _BFLOAT16_IN_ONNX = "tensor(bfloat16)", 16  # TensorProto.BFLOAT16


class _Onnx:
    packages: Mapping[str, str] = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
    default_device = _CPU
    runs = True

    def available(self) -> tuple[str, ...]:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())

    def check(self, device: str) -> None:
        if device not in self.available():
            raise TargetError(
                f"target 'onnx:{device}': this ONNX Runtime has no such provider. "
                f"It has {', '.join(self.available())}; install the build of onnxruntime that has {device}, or choose "
                "one of these with overrides=."
            )

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        path = folder / f"{stage.name}.onnx"
        try:
            with without_chatter():
                torch.onnx.export(
                    stage.exported,
                    f=path,
                    dynamo=True,
                    input_names=list(stage.inputs),
                    output_names=[_output(name) for name in stage.outputs],
                    external_data=False,
                    verbose=False,
                )
        except Exception as error:  # the exporter raises whatever it meets
            raise TargetError(
                f"{stage.name}: torch.onnx.export cannot write it: {reason(error)}. Use another target for this stage."
            ) from error
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if device != _CPU:  # what the provider cannot run is an error, not work for the CPU that nobody sees
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=[device])
        except Exception as error:  # of classes that ONNX Runtime does not document
            raise TargetError(
                f"target 'onnx:{device}' does not take {file.name}: {reason(error)}. Choose another provider."
            ) from error
        return session_run(session, device, file.name)


def session_run(session: Any, device: str, name: str) -> Run:
    """Run a session, after a look at which provider it really has.

    Raises:
        TargetError: Another one than asked for.
    """
    providers = session.get_providers()
    if providers[0] != device:
        raise TargetError(
            f"target 'onnx:{device}': ONNX Runtime opened {name} with {', '.join(providers)} instead. "
            "Its provider failed to start; see the log of ONNX Runtime."
        )
    names = [value.name for value in session.get_inputs()]
    if any(value.type == _BFLOAT16 for value in (*session.get_inputs(), *session.get_outputs())):
        return _run_beyond_numpy(session, names)

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def _run_beyond_numpy(session: Any, names: Sequence[str]) -> Run:
    """Run a session that takes or gives bfloat16, which NumPy does not know."""
    from onnxruntime import OrtValue

    def value_of(tensor: Tensor) -> Any:
        here = tensor.detach().cpu().contiguous()
        if here.dtype == torch.bfloat16:
            return OrtValue.ortvalue_from_numpy_with_onnx_type(here.view(torch.int16).numpy(), _BFLOAT16_IN_ONNX)
        return OrtValue.ortvalue_from_numpy(here.numpy())

    def tensor_of(value: Any) -> Tensor:
        if value.element_type() == _BFLOAT16_IN_ONNX:
            return from_dlpack(value._ortvalue.to_dlpack())
        return torch.from_numpy(value.numpy())

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        values = {name: value_of(tensor) for name, tensor in zip(names, inputs, strict=True)}
        return [tensor_of(value) for value in session.run_with_ort_values(None, values)]

    return run


def _output(name: str) -> str:
    return f"{name}_out"  # ONNX has one name space, also for what the exporter calls its operations


TARGET = _Onnx()
