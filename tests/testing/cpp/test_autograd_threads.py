"""Autograd has a thread for each device, from the first backward pass to the end of the process."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.testing import EmulatedAccelerator

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def test_each_device_has_its_own_thread(accelerator: EmulatedAccelerator) -> None:
    seen: dict[str, set[int]] = {}
    first, second = accelerator.devices
    for _ in range(2):
        x = torch.ones(2, device=first, requires_grad=True)
        y = x.to(second)
        for device, tensor in ((first, x), (second, y)):
            tensor.register_hook(lambda _, d=device: seen.setdefault(d, set()).add(threading.get_ident()))
        (y * 2).sum().backward()
    assert [len(threads) for threads in seen.values()] == [1, 1]
    assert len({threading.get_ident(), *seen[first], *seen[second]}) == 3


def test_the_two_threads_work_at_the_same_time(accelerator: EmulatedAccelerator) -> None:
    """Each waits for the other in its backward; one after the other they would never get on."""
    meeting = threading.Barrier(2)
    leaves = [torch.ones(2, device=device, requires_grad=True) for device in accelerator.devices]
    branches = [leaf * 2 for leaf in leaves]

    def meet(_: Tensor) -> None:
        meeting.wait(timeout=60)

    for branch in branches:
        branch.register_hook(meet)
    torch.autograd.backward([branch.sum() for branch in branches])
    assert [leaf.grad.tolist() for leaf in leaves if leaf.grad is not None] == [[2.0, 2.0]] * 2


def test_the_current_device_of_a_hook_is_that_of_its_tensor(accelerator: EmulatedAccelerator, index: int) -> None:
    seen = []
    x = torch.ones(2, device=accelerator.devices[index], requires_grad=True)
    (x * 2).sum().register_hook(lambda _: seen.append(torch.dev.current_device()))
    y = x * 2
    y.register_hook(lambda _: seen.append(torch.dev.current_device()))
    y.sum().backward()
    assert seen == [index]


def test_an_error_in_a_hook_arrives_where_backward_was_called(device: str) -> None:
    def fail(_: Tensor) -> None:
        raise ValueError("on purpose")

    x = torch.ones(2, device=device, requires_grad=True)
    y = x * 2
    y.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        y.sum().backward()
    (x * 2).sum().backward()  # the thread lives
    assert x.grad is not None


def test_a_thread_that_never_saw_a_device_can_ask_for_a_backward_pass(accelerator: EmulatedAccelerator) -> None:
    layer = nn.Linear(2, 2).to(accelerator.devices[1])
    loss = layer(torch.ones(3, 2, device=accelerator.devices[1])).sum()
    gradient = torch.ones_like(loss)
    thread = threading.Thread(target=torch.autograd.backward, args=([loss], [gradient]))
    thread.start()
    thread.join(timeout=60)
    assert layer.weight.grad is not None


EXIT = """
import time
import torch
from lightning_hetero.testing import install_accelerator

class Slow:
    def __call__(self, tensor):
        return tensor
    def __del__(self):
        time.sleep(0.3)

accelerator = install_accelerator("cpp")
for device in accelerator.devices:
    x = torch.ones(3, device=device, requires_grad=True)
    loss = (x * 2).sum()
    # The backward pass remembers these hooks, and its thread destroys them when it is done.
    with torch.autograd.graph.saved_tensors_hooks(Slow(), Slow()):
        loss.backward()
accelerator.configure(0, cap_bytes=0)
print("done")
"""


def test_the_process_ends_cleanly_while_a_thread_still_tidies_up(run_python: RunPython) -> None:
    """Python tears down a thread that wants its lock after the end, and C++ then ends the process with an abort."""
    run = run_python("-c", EXIT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


LATE = """
import torch
torch.ones(2, requires_grad=True).sum().backward()  # autograd starts, and counts the devices
from lightning_hetero.testing import install_accelerator
devices = install_accelerator("cpp").devices
x = torch.ones(3, device=devices[-1], requires_grad=True)
(x * 2).to(devices[0]).sum().backward()
print(len(devices), x.grad.tolist())
"""


def test_devices_that_come_after_the_first_backward_pass_get_their_threads(run_python: RunPython) -> None:
    run = run_python("-c", LATE, LIGHTNING_HETERO_EMULATED_DEVICES="3")
    assert run.stdout == "3 [2.0, 2.0, 2.0]\n", run.stderr
