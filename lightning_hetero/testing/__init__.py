"""What tests of device backends, placement policies and schedules need, ours and other people's.

`install_accelerator` adds an extra device type to torch, on any machine: several devices `dev:0`, `dev:1`, ...
that live in host memory and compute with the host's kernels. To torch, Lightning and this package they are
an accelerator like any other, with an allocator, random numbers, autocast and autograd of their own, so
what works on `dev` has a fair chance on hardware that the machine lacks. Their numbers are those of the
CPU, bit for bit, so a test may ask for a difference of 0.0. It returns the `EmulatedAccelerator`, which
makes a device small, slow or poor in dtypes (`configure`) and counts what it does: its `stats` are a
`DeviceStats` with the bytes in use, at the peak and on every link. A test of a transfer needs no clock::

    import torch
    from lightning_hetero.testing import install_accelerator

    accelerator = install_accelerator()  # once per process; a fixture of scope "session" is the place
    first, second = accelerator.devices  # ("dev:0", "dev:1")
    accelerator.reset()
    accelerator.configure(0, cap_bytes=1024, bandwidth_bytes_per_s=1e6)

    x = torch.randn(10, 10).to(first)
    assert accelerator.stats(0).h2d_bytes == 400
    assert abs(accelerator.stats(0).waited_s - 400e-6) < 1e-12
    x.to(second)
    assert accelerator.stats(0).d2d_bytes == 400
    try:
        torch.empty(1000, device=first)
    except torch.OutOfMemoryError as error:
        assert "dev:0 is out of memory" in str(error)
    accelerator.reset()

What the emulation cannot show: kernels end before their calls return, so a missing `synchronize()` or a race
between streams goes unnoticed; and torch has room for one extra device type per process, so `dev` stands
beside CUDA or XPU but not beside, say, `npu`.

If you write a backend: `cpp/` has what torch asks of one in short headers, to be read in the order in which
`accelerator.cpp` includes them, and `device_module` has what torch and Lightning ask of `torch.<name>`.
The tests in `tests/testing/either` ask nothing of the emulation but its name and its counters.

Among the other modules are `models` and `lightning_module` (small models that are hard to spread, and a Lightning
project around them), `policies` (an awkward one) and `inventories` (machines that nobody owns).
"""

from __future__ import annotations

from lightning_hetero.testing.accelerator import EmulatedAccelerator, install_accelerator
from lightning_hetero.testing.backend import DeviceStats

__all__ = ["DeviceStats", "EmulatedAccelerator", "install_accelerator"]
