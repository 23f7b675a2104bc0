"""The import hook that lets Lightning resolve `strategy="hetero"` by name, without a line of user code.

Lightning looks names up in registries that it fills while it is imported, and offers no entry point for
strategies. So we wait for the module that reads the registries, and add our names as soon as it exists::

    import torch ── entry point "torch.backends" ──> autoload() ── puts a finder into sys.meta_path
                                                                        │ waits
    import lightning ── ... ── accelerator_connector was executed ──────┘──> register("lightning.pytorch")

`import lightning_hetero` does the same, for installations without entry points and for environments that
set `TORCH_DEVICE_BACKEND_AUTOLOAD=0`. `LIGHTNING_HETERO_AUTOREGISTER=0` switches both ways off.

This module runs inside `import torch`, in programs that may never use Lightning. It therefore imports
nothing but the standard library, and none of its failures may reach the program: they are logged.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

NAMESPACES = {
    "lightning.pytorch.trainer.connectors.accelerator_connector": "lightning.pytorch",
    "pytorch_lightning.trainer.connectors.accelerator_connector": "pytorch_lightning",
    "lightning.fabric.connector": "lightning.fabric",
    "lightning_fabric.connector": "lightning_fabric",
}
"""Module to wait for -> namespace whose registries are complete once that module was executed."""

OFF_SWITCH = "LIGHTNING_HETERO_AUTOREGISTER"


def autoload() -> None:
    """Entry point of the group `torch.backends`: torch calls it at the end of `import torch`. Never raises."""
    install()


def install() -> None:
    """Register "hetero" in every Lightning that is loaded, and wait for those that are not.

    Calling it again changes nothing. Never raises: an exception here would make `import torch` fail.
    """
    try:
        if os.environ.get(OFF_SWITCH) != "0":
            _install()
    except Exception as error:
        _complain("any Lightning", error)


def _install() -> None:
    waiting = []
    for module_name, namespace in NAMESPACES.items():
        if sys.modules.get(module_name) is None:
            waiting.append(module_name)
        else:
            register(namespace)
    installed = any(isinstance(finder, ConnectorFinder) for finder in sys.meta_path)
    if waiting and not installed:
        sys.meta_path.insert(0, ConnectorFinder(waiting))


def register(namespace: str) -> None:
    """Add "hetero" to the registries of one Lightning; a failure becomes one line of log."""
    try:
        from lightning_hetero.strategy.register import register as register_in

        register_in(namespace)
    except Exception as error:
        _complain(namespace, error)


def _complain(namespace: str, error: Exception) -> None:
    # Not warnings.warn: under `python -W error` that would raise out of `import torch`.
    import logging

    logging.getLogger("lightning_hetero").warning(
        '%s(strategy="hetero") will not be found by %s, because its registration failed: %s: %s. '
        'Run `python -c "import lightning_hetero.strategy.register"` to see where, '
        "or set %s=0 to do without it.",
        "Fabric" if namespace.endswith("fabric") else "Trainer",
        namespace,
        type(error).__name__,
        error,
        OFF_SWITCH,
    )


class ConnectorFinder:
    """Finds the modules of `NAMESPACES` as the other finders do, and has their loaders tell us when they ran.

    Args:
        names: Names of the modules to wait for. The finder leaves `sys.meta_path` with the last of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._waiting = set(names)
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the finders after us give, with a loader that calls back; None for other modules."""
        if name not in self._waiting or name in self._searching:
            return None
        self._searching.add(name)  # another finder of this sort may ask us in turn: then we know nothing
        try:
            spec = self._ask_others(name, path, target)
        finally:
            self._searching.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = _TellingLoader(spec.loader, self)
            spec.loader = loader
        return spec

    def _ask_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def arrived(self, name: str) -> None:
        """Stop waiting for one module, whose registries are complete now, and register in them."""
        self._waiting.discard(name)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        register(NAMESPACES[name])


class _TellingLoader:
    """Loads a module as the wrapped loader does, then tells the finder.

    Everything else that people ask of a loader (`get_source`, `is_package`, ...) is the wrapped one's answer,
    and once the module runs it carries the wrapped loader itself, as if we had never been there.
    """

    def __init__(self, wrapped: Any, finder: ConnectorFinder) -> None:
        self._wrapped = wrapped
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._wrapped.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._wrapped
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        self._wrapped.exec_module(module)
        self._finder.arrived(module.__name__)
