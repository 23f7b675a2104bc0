"""The nouns of a model to place: its units in order, with what each of them holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The smallest module that is never split.

    Attributes:
        name: Name of the module below the root module: "net.blocks.0".
        kind: Name of the module's class.
        parameters: Number of parameters, those shared with an earlier unit left out.
        parameter_bytes: Bytes of these parameters.
        trainable_bytes: Bytes of those among them that require a gradient; a gradient takes as much.
        buffer_bytes: Bytes of the unit's buffers.
        tied_to: Name of the first unit that shares a parameter with this one; its own name if none does.
            Units with the same `tied_to` stand on one device.
        aliases: Other names under which the same module is registered.
    """

    name: str
    kind: str
    parameters: int
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    tied_to: str
    aliases: tuple[str, ...] = ()

    @property
    def is_parameter_free(self) -> bool:
        """Whether the unit holds buffers only."""
        return self.parameters == 0 and self.tied_to == self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Compound:
    """A module with parameters and with modules below it.

    Attributes:
        name: Name of the module.
        is_layer: Whether it stands with others of its class in an nn.Sequential or nn.ModuleList.
        is_called: Whether it has a forward of its own, and nothing below it is placed by others.
    """

    name: str
    is_layer: bool
    is_called: bool


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """The units of a model in order of definition, and what the model holds outside of them.

    Attributes:
        units: In the order in which the module tree defines them.
        loose_parameter_bytes: Parameters owned by modules that are split themselves; they live on the root.
        loose_trainable_bytes: The part of them that requires a gradient.
        loose_buffer_bytes: Buffers owned by such modules.
        whole: Names of modules that hold further modules with parameters but stay in one piece, each with
            the reason, in words that fit after "because".
        compounds: Modules with parameters and modules below them, in order of definition: what activation checkpointing
            may run again in one piece. None if something in the model cannot run twice.
    """

    units: tuple[Unit, ...]
    loose_parameter_bytes: int = 0
    loose_trainable_bytes: int = 0
    loose_buffer_bytes: int = 0
    whole: tuple[tuple[str, str], ...] = ()
    compounds: tuple[Compound, ...] = ()

    def __getitem__(self, name: str) -> Unit:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the units, in order."""
        return tuple(unit.name for unit in self.units)

    @cached_property
    def groups(self) -> tuple[tuple[Unit, ...], ...]:
        """The units that must stand together, in order of their first member.

        Tied units form one group. Units that hold only buffers join the unit before them: they compute
        next to their neighbour and weigh nothing that would justify a border.
        """
        groups: dict[str, list[Unit]] = {}
        previous: str | None = None
        waiting: list[Unit] = []
        for unit in self.units:
            if unit.is_parameter_free:
                if previous is None:
                    waiting.append(unit)
                else:
                    groups[previous].append(unit)
                continue
            groups.setdefault(unit.tied_to, []).extend([*waiting, unit])
            waiting, previous = [], unit.tied_to
        if waiting:
            groups[waiting[0].name] = waiting
        return tuple(tuple(group) for group in groups.values())

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of names, classes and sizes: equal for models that one plan fits."""
        text = ";".join(f"{u.name}:{u.kind}:{u.parameters}:{u.parameter_bytes}:{u.tied_to}" for u in self.units)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _by_name(self) -> dict[str, Unit]:
        return {name: unit for unit in self.units for name in (unit.name, *unit.aliases)}
