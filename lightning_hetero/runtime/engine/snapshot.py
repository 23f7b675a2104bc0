"""What a trial run of a module may have changed, noticed and put back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine import contents
from lightning_hetero.runtime.engine.contents import Thing
from lightning_hetero.runtime.engine.meanwhile import writes_of
from lightning_hetero.runtime.engine.names import Name, names_of, read_in_forward
from lightning_hetero.runtime.engine.quick_look import QuickLook
from lightning_hetero.runtime.engine.watch import HOOKS
from lightning_hetero.runtime.transfer import version_of

# What torch itself keeps in a module, or keeps elsewhere in this snapshot.
_IGNORED = frozenset(
    {
        "_apply",
        "_buffers",
        "_compiled_call_impl",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "forward",
        "training",
    }
)
_REGISTRIES = {"_buffers": "buffer", "_parameters": "parameter", "_modules": "module"}
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_MOST_QUICKLY = 500  # things looked at after every operation
_MISSING = object()


class Snapshot:
    """Buffers, versions of parameters, and attributes of a module and all modules below it, and what is inside.

    Args:
        module: The module.
        given: What it is called with beside tensors: functions, other modules, classes.

    Attributes:
        modules: Names and modules: those below the module, those that hide in its attributes, those given, and globals.
    """

    def __init__(self, module: nn.Module, given: Iterable[Any] = ()) -> None:
        given = [value for value in given if isinstance(value, nn.Module) or callable(value)]
        self.modules: list[tuple[str, nn.Module]] = list(module.named_modules())
        self._inside: list[Thing] = []
        self._look_inside(given)
        functions = [value for _, each in self.modules for value in each.__dict__.values() if callable(value)]
        functions += (value for value in given if not isinstance(value, (nn.Module, type)))
        self._kinds = {type(thing.value) for thing in self._inside if contents.is_open(thing.value)}
        self._kinds |= {value for value in given if isinstance(value, type) and contents.is_users(value)}
        self._outside = list(names_of({*(type(each) for _, each in self.modules), *self._kinds}, functions))
        self._functions = functions
        self._look_outside()
        self._inside += [thing for each in self._outside for thing in each.things]
        outside = {bound.where for bound in self._outside}
        self._iterators = [
            (thing.key, thing.module if thing.module in outside else f"{thing.module}.{thing.key}")
            for thing in self._inside
            if thing.content is None
        ]
        self._inside = [thing for thing in self._inside if thing.content is not None]
        self._attributes = [
            {key: value for key, value in each.__dict__.items() if key not in _IGNORED} for _, each in self.modules
        ]
        self._sizes = [len(each.__dict__) for _, each in self.modules]
        self._modes = [each.__dict__.get("training", _MISSING) for _, each in self.modules]  # a scripted one has none
        # Those of a scripted module are in C++: other objects at every look.
        self._registries = [
            {} if isinstance(each, torch.jit.ScriptModule) else {key: dict(getattr(each, key)) for key in _REGISTRIES}
            for _, each in self.modules
        ]
        self._buffers = [
            Thing(_called(name, each), key, buffer, contents.content(buffer, may_be_large=True))
            for name, each in self.modules
            for key, buffer in each._buffers.items()
            if buffer is not None
        ]
        self._hooks = [
            Thing(_called(name, each), key, hooks, dict(hooks))
            for name, each in self.modules
            for key in HOOKS
            if (hooks := getattr(each, key)) is not None
        ]
        self._versions = [
            (f"{name}.{key}" if name else key, parameter, version_of(parameter))
            for name, each in self.modules
            for key, parameter in each._parameters.items()
            if parameter is not None
        ]
        self._written = [(path, parameter, writes_of(parameter)) for path, parameter, _ in self._versions]
        self._trained = [(path, parameter, parameter.requires_grad) for path, parameter, _ in self._versions]

    @property
    def of_thread(self) -> str | None:
        """Something whose value every thread has for itself, in words; None if there is nothing."""
        return next((bound.where for bound in self._outside if bound.is_of_thread), None)

    def changed_buffer(self, buffers: Container[int], modules: Container[int]) -> str | None:
        """Name of one of these buffers that is not as it was; None if all are.

        Args:
            buffers: Their `id`.
            modules: `id` of the modules whose buffers matter.
        """
        of = {_called(name, module): module for name, module in self.modules if id(module) in modules}
        for thing in self._buffers:
            if id(thing.value) in buffers and thing.module in of:
                is_there = of[thing.module]._buffers.get(thing.key) is thing.value
                if not (is_there and contents.is_same(thing.value, thing.content)):
                    return f"{thing.module}.{thing.key}"
        return None

    def inside(self, ignored: Container[int] = ()) -> list[Thing]:
        """What can change inside of attributes and of names, but those of modules whose `id` is in `ignored`."""
        left_out = {_called(name, module) for name, module in self.modules if id(module) in ignored}
        return [thing for thing in self._inside if thing.module not in left_out]

    @property
    def names(self) -> list[Name]:
        """Names outside of modules that their code may bind anew."""
        return self._outside

    def sets_numbers_back(self, start: str = "forward") -> bool:
        """Whether the code names what sets a generator of Python or NumPy to a state: it looks as if nobody had drawn.

        Args:
            start: See `iterator_used`.
        """
        names = read_in_forward({type(each) for _, each in self.modules}, self._functions, self._kinds, start).names
        return "setstate" in names or ("set_state" in names and not names.isdisjoint(("np", "numpy")))

    def iterator_used(self, start: str = "forward") -> str | None:
        """An iterator that the code uses and that cannot be put back, in words; None if there is none.

        Args:
            start: Name of the method that is run; those that are called `forward` are looked into in any case.
        """
        if not self._iterators:
            return None
        classes = {type(each) for _, each in self.modules}
        names = read_in_forward(classes, self._functions, self._kinds, start).names
        return next((f"the iterator in {where}" for key, where in self._iterators if key in names), None)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters."""
        yield from ((path, parameter) for path, parameter, _ in self._versions)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters, buffers and tensors in attributes."""
        for _, module in self.modules:
            yield from (each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None)
        yield from (thing.value for thing in self._inside if isinstance(thing.value, Tensor))

    def put_back(self) -> str | None:
        """Undo changes.

        Returns:
            What was changed, in words that follow "in training it"; None if nothing was.
        """
        change: str | None = None
        for (name, module), before in zip(self.modules, self._registries, strict=True):
            for registry, members in before.items():
                now = getattr(module, registry)
                keys = [key for key in {**members, **now} if now.get(key, _MISSING) is not members.get(key, _MISSING)]
                if keys:
                    change = f"changes the {_REGISTRIES[registry]} {keys[0]!r} of {_called(name, module)}"
                    now.clear()
                    now.update(members)
        for thing in self._buffers:
            if not contents.is_same(thing.value, thing.content):
                change = f"changes the buffer {thing.key!r} of {thing.module}"
                contents.put_back(thing.value, thing.content)
        for (name, module), attributes in zip(self.modules, self._attributes, strict=True):
            for key in [key for key in module.__dict__ if key not in _IGNORED and key not in attributes]:
                change = f"sets the attribute {key!r} of {_called(name, module)}"
                del module.__dict__[key]
            for key, value in attributes.items():
                if module.__dict__.get(key, _MISSING) is not value:
                    change = f"changes the attribute {key!r} of {_called(name, module)}"
                    module.__dict__[key] = value
        for thing in (*self._inside, *self._hooks):
            if not contents.is_same(thing.value, thing.content):
                change = f"changes the attribute {thing.key!r} of {thing.module}"
                contents.put_back(thing.value, thing.content)
        for bound in self._outside:
            if bound.put_back():
                change = f"changes {bound.where}"
        for (name, module), mode in zip(self.modules, self._modes, strict=True):
            if module.__dict__.get("training", _MISSING) is not mode:
                change = f"changes the mode (training or not) of {_called(name, module)}"
                module.__dict__["training"] = mode
        for path, parameter, version in self._versions:
            if version_of(parameter) != version:
                change = f"changes the parameter {path!r}"
        for path, parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                change = f"changes requires_grad of {path!r}"
                parameter.requires_grad_(trained)
        return change

    def look(self, only: Container[int] | None = None) -> Callable[[], str | None]:
        """Something that does what `change_so_far` does, and is quick where nothing is different.

        Args:
            only: See there.
        """
        modules = [module for _, module in self.modules if only is None or id(module) in only]
        parameters = [(parameter, trained) for _, parameter, trained in self._trained]
        quick = QuickLook(modules, self._inside[:_MOST_QUICKLY], parameters)

        def changed() -> str | None:
            with torch._C.DisableTorchFunction():  # or whoever watches operations sees what is asked for here
                return None if quick.is_as_before() else self.change_so_far(only)

        return changed

    def change_so_far(self, only: Container[int] | None = None) -> str | None:
        """What is different at this moment, found quickly: for a look in between, after which it may be as it was.

        Args:
            only: `id` of the modules to look at; None looks at all.

        Returns:
            Words as those of `put_back`; None if nothing is different.
        """
        looked_at = zip(self.modules, self._attributes, self._sizes, self._modes, strict=True)
        for (name, module), attributes, size, mode in looked_at:
            if only is not None and id(module) not in only:
                continue
            now = module.__dict__
            if len(now) != size:
                return f"sets an attribute of {_called(name, module)}"
            if now.get("training", _MISSING) is not mode:
                return f"changes the mode (training or not) of {_called(name, module)}"
            for key, value in attributes.items():
                if key not in _EVERY_MODULE_HAS and now.get(key, _MISSING) is not value:
                    return f"changes the attribute {key!r} of {_called(name, module)}"
        for thing in self._inside[:_MOST_QUICKLY]:
            if not contents.is_same(thing.value, thing.content, quickly=True):
                return f"changes the attribute {thing.key!r} of {thing.module}"
        for path, parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                return f"changes requires_grad of {path!r}"
        return None

    def change_below(self, ignored: Container[int], in_order: Container[int] = ()) -> str | None:
        """What was changed in modules below the root, in buffers, parameters and inside attributes; it stays so.

        Args:
            ignored: `id` of modules that are not looked at.
            in_order: `id` of modules that micro-batches use one after the other, so their buffers may change.

        Returns:
            Words that follow "because"; None if nothing was changed.
        """
        names = {_called(name, module) for name, module in self.modules if id(module) in ignored}
        for depth, ((name, module), attributes) in enumerate(zip(self.modules, self._attributes, strict=True)):
            if depth == 0 or id(module) in ignored:
                continue
            for key, value in attributes.items():
                if module.__dict__.get(key, _MISSING) is not value:
                    return f"{name}.{key} is set"
            if any(key not in attributes for key in module.__dict__ if key not in _IGNORED):
                return f"{name} gets a new attribute"
        for thing in self._inside:
            if thing.module not in names and not contents.is_same(thing.value, thing.content):
                owner = "self" if thing.module == _called(*self.modules[0]) else thing.module
                return f"the content of {owner}.{thing.key} is changed"
        names |= {_called(name, module) for name, module in self.modules if id(module) in in_order}
        for thing in self._buffers:
            if thing.module not in names and not contents.is_same(thing.value, thing.content):
                return f"the buffer {thing.key!r} of {thing.module} is changed"
        for path, parameter, writes in self._written:
            if writes_of(parameter) != writes:
                return f"the parameter {path} is changed"
        return None

    def _look_inside(self, given: Iterable[Any]) -> None:
        """Find what is inside of attributes, and modules that are not registered but in a list, say."""
        known, seen = {id(each) for _, each in self.modules}, set[int]()
        for value in given:
            self._look_into("what it is called with", "argument", value, known, seen)
        for name, module in self.modules:  # grows on the way
            for key, value in module.__dict__.items():
                if key not in _IGNORED and key not in _EVERY_MODULE_HAS:
                    self._look_into(_called(name, module), key, value, known, seen)

    def _look_outside(self) -> None:
        """Find modules that are globals, or in them, and what is inside of their attributes."""
        known, first = {id(each) for _, each in self.modules}, len(self.modules)
        for bound in self._outside:
            for found in bound.modules:
                new = [(f"{bound.name}.{path}".rstrip("."), part) for path, part in found.named_modules()]
                if any(part is self.modules[0][1] for _, part in new):
                    new = [(bound.name, found)]  # a module above this one
                new = [(path, part) for path, part in new if id(part) not in known]
                self.modules += new
                known.update(id(part) for _, part in new)
        seen: set[int] = set()
        for name, module in self.modules[first:]:
            for key, value in module.__dict__.items():
                if key not in _IGNORED and key not in _EVERY_MODULE_HAS:
                    self._look_into(name, key, value, known, seen)

    def _look_into(self, owner: str, key: str, value: Any, known: set[int], seen: set[int]) -> None:
        for found in contents.things(owner, key, value, seen):
            if isinstance(found, Thing):
                self._inside.append(found)
            elif id(found) not in known:
                parts = list(found.named_modules())
                if any(part is self.modules[0][1] for _, part in parts):
                    parts = [("", found)]  # a module above this one: what else is in it is not called from here
                new = [(f"{key}.{path}".rstrip("."), part) for path, part in parts if id(part) not in known]
                self.modules += new
                known.update(id(part) for _, part in new)


def _called(name: str, module: nn.Module) -> str:
    return name or type(module).__name__
