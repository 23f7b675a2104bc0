"""What all tests share: guards against traces, the emulated accelerator, plain Lightning's Trainer, a child Python."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from torch.nn.modules import module as torch_module

import lightning_hetero  # noqa: F401  (its import hook belongs to the state in which every test begins)

if TYPE_CHECKING:
    from lightning_hetero.devices.bench import Bench
    from lightning_hetero.devices.numbers import DeviceProfile
    from lightning_hetero.testing import EmulatedAccelerator

Things = dict[str, object]

# Environment variables that a test may leave behind; their old values are put back.
ENVIRONMENT_OF_A_RUN = {
    "PL_GLOBAL_SEED": "seed_everything of Lightning",
    "PL_SEED_WORKERS": "seed_everything of Lightning",
    "CUBLAS_WORKSPACE_CONFIG": "Trainer(deterministic=True)",
}
# Environment variables that stay once some package was imported or initialised for the first time.
ENVIRONMENT_OF_IMPORTS = {
    "PYTEST_CURRENT_TEST": "pytest says here which phase of which test runs",
    "CUDA_DEVICE_ORDER": "CUDAAccelerator.setup of Lightning",
    "CUDA_MODULE_LOADING": "first use of CUDA by torch",
    "KMP_DUPLICATE_LIB_OK": "import sklearn",
    "KMP_INIT_AT_FORK": "import sklearn",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "import lightning.fabric",
    "TORCHINDUCTOR_CACHE_DIR": "first compilation by inductor",
    "TRITON_CACHE_DIR": "first compilation by triton",
    "TRITON_PTXAS_PATH": "first compilation by triton",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR": "first compilation by inductor",
    "USE_LIBUV": "import lightning.fabric, on Windows",
}
# Import hooks that packages install for themselves when they are imported, by their module.
FOREIGN_IMPORT_HOOKS = ("six", "_distutils_hack", "setuptools", "tensorboard", "mpi4py")
# Helper processes of the standard library, torch and Open MPI, which live as long as the interpreter. (Lightning asks
# MPI, where it is installed, how many processes there are.)
LASTING_CHILDREN = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "torch._inductor.compile_worker",
    "orted --hnp",
    "forks.py",
)
# The classes that everybody patches, as torch made them, and marks that Python and torch themselves put on them.
TORCH_CLASSES = {cls: dict(vars(cls)) for cls in (torch.nn.Module, torch.Tensor)}
MARKS_ON_CLASSES = {"__slotnames__": "copy", "___needs_generation_tag_patch": "torch.compile"}
# Where the kernel tells, nobody has to look through all processes of the machine, twice for each test.
CHILDREN_ARE_LISTED = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists()
# Folders of tests that take minutes, in the order in which they begin; the others come after them.
LONGEST = ("versions", "benchmarks", "export")
# Folders that the tools of the house make in the repository's root.
TOOL_CACHES = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}


try:
    from absl import logging as absl_logging  # comes with tensorboard
except ImportError:
    pass
else:
    # Hydra configures logging anew, which closes all handlers there are; that of absl closes its stream with it,
    # unless it is the process's own. It would be pytest's capture.
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def _remember_entry_points() -> None:
    """Each Trainer reads the entry points of every installed package, a file each: here once for each `sys.path`."""
    really = metadata.entry_points

    @functools.cache
    def found(path: tuple[str, ...], asked: tuple[tuple[str, Any], ...]) -> Any:
        return really(**dict(asked))

    metadata.entry_points = lambda **asked: found(tuple(sys.path), tuple(sorted(asked.items())))  # type: ignore[assignment]


_remember_entry_points()


def _threads() -> Things:
    """Threads that could outlive the test: those that keep Python alive, and all of our own."""
    ours = [t for t in threading.enumerate() if not t.daemon or "hetero" in t.name]
    return {f"{t.name!r} ({t.ident})": t for t in ours if t not in _threads_of_inductor()}


def _threads_of_inductor() -> set[threading.Thread]:
    """Those of the pool that torch's compiler keeps as long as the interpreter lives, where there is a GPU."""
    module = sys.modules.get("torch._inductor.async_compile")
    pool = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    if pool is None or not pool.cache_info().currsize:
        return set()
    return set(pool()._threads)


def _processes_below() -> list[psutil.Process]:
    """All processes that this one has started, and they."""
    if not CHILDREN_ARE_LISTED:
        return psutil.Process().children(recursive=True)
    found: list[psutil.Process] = []
    todo = [os.getpid()]
    while todo:
        threads: list[Path] = []
        with suppress(OSError):  # the process has ended meanwhile
            threads += Path(f"/proc/{todo.pop()}/task").glob("*/children")
        for listed in threads:
            try:
                below = [int(pid) for pid in listed.read_text().split()]
            except OSError:  # the thread has ended meanwhile
                continue
            for pid in below:
                with suppress(psutil.Error):  # this one has ended, and the others of its parent have not
                    found.append(psutil.Process(pid))
            todo += below
    return found


def _children() -> Things:
    found: Things = {}
    for child in _processes_below():
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:  # it ended just now, or waits to be waited for
            command = child.status() if child.is_running() else ""
        if not any(name in command for name in LASTING_CHILDREN):
            found[f"{child.pid} ({command})"] = child
    return found


def _environment() -> Things:
    allowed = {*ENVIRONMENT_OF_A_RUN, *ENVIRONMENT_OF_IMPORTS}
    return {name: value for name, value in os.environ.items() if name not in allowed}


def _import_hooks() -> Things:
    def module_of(finder: object) -> str:
        return str(getattr(finder, "__module__", type(finder).__module__))

    foreign = [f for f in sys.meta_path if module_of(f).partition(".")[0] in FOREIGN_IMPORT_HOOKS]
    return {f"{finder!r}": finder for finder in sys.meta_path if finder not in foreign}


def _module_hooks() -> Things:
    hooks = {k: v for k, v in vars(torch_module).items() if k.startswith("_global_") and isinstance(v, dict)}
    return {f"{name}[{key}]": hook for name, held in hooks.items() for key, hook in held.items()}


def _patched_classes() -> Things:
    # A PrivateUse1 backend adds `is_<name>` and the like when it is registered, which cannot be undone.
    backend = torch._C._get_privateuse1_backend_name()
    return {
        f"{cls.__name__}.{name}": as_imported[name] if _is_dynamos(value) else value
        for cls, as_imported in TORCH_CLASSES.items()
        for name, value in vars(cls).items()
        if backend not in name.split("_") and name not in MARKS_ON_CLASSES
    }


def _is_dynamos(value: object) -> bool:
    """Whether it is the wrapper that the first `torch.compile` puts around methods of `nn.Module`, for good."""
    return getattr(value, "__module__", "") == "torch._dynamo.mutation_guard"


def _current_device() -> int:
    """The accelerator device that tensors without an index are made on, in this thread."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or (accelerator.type == "cuda" and not torch.cuda.is_initialized()):
        return 0  # asking would initialise it
    return torch.accelerator.current_device_index()


def _torch_state() -> Things:
    return {
        "current device": _current_device(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic algorithms, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "swap_module_params_on_conversion": torch.__future__.get_swap_module_params_on_conversion(),
        "depth of torch function modes": torch._C._len_torch_function_stack(),
        "depth of torch dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


@dataclass(frozen=True)
class Guard:
    """One kind of trace that a test must not leave.

    Attributes:
        what: The kind, for the message.
        look: The things of that kind which are there now, by name.
        may_vanish: Whether things that were there before the test may be gone after it.
        patience_s: How long a new thing may take to go away by itself.
    """

    what: str
    look: Callable[[], Mapping[str, object]]
    may_vanish: bool = False
    patience_s: float = 0.0

    def traces(self, before: Mapping[str, object]) -> list[str]:
        """What is different now, one line each, after waiting for it to go away."""
        deadline = time.monotonic() + self.patience_s
        while (found := self._differences(before)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def _differences(self, before: Mapping[str, object]) -> list[str]:
        after = self.look()
        found = [f"new {self.what}: {name}" for name in after.keys() - before.keys()]
        if not self.may_vanish:
            found += [f"{self.what} gone: {name}" for name in before.keys() - after.keys()]
        changed = [n for n in before.keys() & after.keys() if before[n] is not after[n] and before[n] != after[n]]
        return found + [f"{self.what} changed: {n}, from {before[n]!r} to {after[n]!r}" for n in changed]


def _guards(root: Path) -> tuple[Guard, ...]:
    def files() -> Things:
        return {path.name: True for path in root.iterdir() if path.name not in TOOL_CACHES}

    return (
        Guard("thread", _threads, may_vanish=True, patience_s=2.0),
        Guard("child process", _children, may_vanish=True, patience_s=2.0),
        Guard("environment variable", _environment),
        Guard("import hook", _import_hooks, may_vanish=True),
        Guard("global module hook", _module_hooks),
        Guard("attribute of a torch class", _patched_classes),
        Guard("state of torch", _torch_state),
        Guard("working directory", lambda: {"cwd": Path.cwd()}),
        Guard("file outside tmp_path", files, may_vanish=True),
    )


def _put_back(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _leave_no_trace(pytestconfig: pytest.Config) -> Iterator[None]:
    """Fail a test that changes what the next one begins with."""
    guards = [(guard, guard.look()) for guard in _guards(pytestconfig.rootpath)]
    environment = {name: os.environ.get(name) for name in ENVIRONMENT_OF_A_RUN}
    yield
    _put_back(environment)
    traces = [trace for guard, before in guards for trace in guard.traces(before)]
    if traces:
        pytest.fail("the test leaves a trace; undo it in a fixture or a `finally`:\n  " + "\n  ".join(traces))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep sums in one order, so that equal runs are equal bit for bit on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects() -> None:
    """Spare collections of garbage what was there before: with torch and Lightning that takes a while each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of models are taken with few repetitions, for tests that ask for bytes, or for what else happens."""
    monkeypatch.setattr("lightning_hetero.profile.clock._ENOUGH_S", 0.0)
    monkeypatch.setattr("lightning_hetero.profile.replay._ROUNDS", 1)
    monkeypatch.setattr("lightning_hetero.profile.replay._IN_A_ROW", 2)


MEASURED: dict[Hashable, DeviceProfile] = {}


@pytest.fixture
def devices_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices keep their numbers from one test to the next: a busy machine measures anew, which takes seconds.

    Only what was measured in the same way is the same: all that a probe depends on, and memory, of which each moment
    has another amount free, in powers of two.
    """
    from lightning_hetero.devices import measure as module

    really = module.measure

    def place(bench: Bench) -> Hashable:
        return bench.torch_device, bench.threads, bench.memory_bytes.bit_length(), bench.dtypes

    def measure(benches: Sequence[Bench], links: Sequence[tuple[Bench, Bench]]) -> DeviceProfile:
        ends = tuple((place(source), place(target)) for source, target in links)
        key = (torch.get_num_threads(), tuple(map(place, benches)), ends)
        if key not in MEASURED:
            MEASURED[key] = really(benches, links)
        return MEASURED[key]

    monkeypatch.setattr(module, "measure", measure)


@pytest.fixture(scope="session")
def accelerator() -> EmulatedAccelerator:
    """The emulated accelerator, an extra torch device type: built in C++, or in Python without a compiler."""
    from lightning_hetero.testing import install_accelerator

    return install_accelerator("auto")


@pytest.fixture
def quiet(tmp_path: Path) -> Things:
    """Options of a Trainer that writes nothing but what the test asks for."""
    return {
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@pytest.fixture
def plain(quiet: Things) -> Callable[..., Any]:
    """Makes Trainers on the CPU, without this package's strategy."""
    import lightning.pytorch as pl

    return lambda **options: pl.Trainer(**{**quiet, "accelerator": "cpu", "devices": 1, "max_epochs": 2, **options})


@pytest.fixture
def run_python(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a fresh Python in `tmp_path` with the checkout on its path: `run_python("-c", code, NAME="value")`."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return _python(pytestconfig.rootpath, tmp_path, arguments, environment)

    return run


def _python(
    root: Path, folder: Path, arguments: Iterable[str], environment: Mapping[str, str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    switches = {"LIGHTNING_HETERO_AUTOREGISTER", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    inherited = {name: value for name, value in os.environ.items() if name not in switches}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(root), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# Each program has a process of its own, and files for what it says; the imports, which take seconds, are made once.
FORKS = """
import json, os, signal, sys

imports, programs = sys.argv[1], json.loads(sys.argv[2])
del sys.argv[1:]
names = {"__name__": "__main__"}
exec(imports, names)
codes = []
for number, program in enumerate(programs):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        break
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    with open("codes.json", "w") as file:
        json.dump(codes, file)
    sys.exit()
for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
signal.alarm(120)  # who waits for the parent would not end a child that hangs
exec(program, names)
"""


@pytest.fixture(scope="session")
def run_after_imports(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, subprocess.CompletedProcess[str]]]:
    """Runs programs that begin alike, each in a process of its own that is a copy of one fresh Python.

    `run_after_imports(imports, {name: text}, "-W", "ignore", NAME="value")` has what each of them said.
    """

    def run(
        imports: str, programs: Mapping[str, str], *options: str, **environment: str
    ) -> dict[str, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("programs")

        def python(*arguments: str) -> subprocess.CompletedProcess[str]:
            return _python(pytestconfig.rootpath, folder, (*options, "-c", *arguments), environment, 280)

        if not hasattr(os, "fork"):
            return {name: python(f"{imports}\n{text}") for name, text in programs.items()}
        parent = python(FORKS, imports, json.dumps([*programs.values()]))
        assert parent.returncode == 0, parent.stderr
        found = {}
        for number, (name, text) in enumerate(programs.items()):
            out, err = ((folder / f"{number}.{stream}").read_text() for stream in ("out", "err"))
            code = json.loads((folder / "codes.json").read_text())[number]
            found[name] = subprocess.CompletedProcess(text, code, parent.stdout + out, parent.stderr + err)
        return found

    return run


@pytest.fixture(scope="session")
def run_forked(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a program as a fresh Python would that has imported torch and Lightning: `run_forked(file, NAME="value")`.

    For programs in which it does not matter when these are imported.
    """
    program = pytestconfig.rootpath / "tests" / "forks.py"
    modules = ("torch", "lightning.pytorch", "torchmetrics")
    served: list[subprocess.Popen[str]] = []
    lock = threading.Lock()

    def ask(request: dict[str, Any]) -> None:
        with lock:
            if not served:
                command = [sys.executable, str(program), *modules]
                served.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
            stdin = served[0].stdin
            assert stdin is not None
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()

    def run(*arguments: str, folder: Path, timeout_s: int = 280, **environment: str) -> Any:
        if not hasattr(os, "fork"):
            return _python(pytestconfig.rootpath, folder, arguments, environment, timeout_s)
        result = tmp_path_factory.mktemp("forked")
        own = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath), **environment}
        places = {"folder": str(folder), "result": str(result)}
        ask({"arguments": arguments, "environment": own, "timeout_s": timeout_s, **places})
        code = result / "code"
        while not code.exists():
            assert served[0].poll() is None, "what forks programs has ended"
            time.sleep(0.05)
        out, err = ((result / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(arguments, int(code.read_text()), out, err)

    yield run
    for server in served:
        server.communicate("")
        assert server.returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but `pytest -m cuda`: torch serves CUDA or the emulated accelerator, not both."""
    chosen = str(config.option.markexpr)
    if "cuda" not in chosen or "not cuda" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, and begin with the longest files: what is short fills gaps."""
    first = [config.rootpath / "tests" / name for name in LONGEST]
    places = {
        path: next((at for at, top in enumerate(first) if top in path.parents), len(first))
        for path in {item.path for item in items}
    }
    items.sort(key=lambda item: places[item.path])
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device, or not asked for by pytest -m cuda")
        for item in items:
            if "cuda" in item.keywords and item.get_closest_marker("cuda"):
                item.add_marker(skip)
