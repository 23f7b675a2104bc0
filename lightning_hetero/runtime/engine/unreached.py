"""Keeps a backward from code that it would not reach on one device.

All inputs of what is cut hang on one node, with all outputs. So autograd goes on to each input, also to those of which
no output in the loss is made; these get no gradient, and pass that on. But code of users that defines its own backward
(`autograd.Function`, compiled parts, hooks on modules) is called by autograd with zeros in the place of no gradient.
What is before it would get gradients of zero: to an optimizer with momentum or weight decay, not the same as none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

_BY_PYTHON: Any = torch.autograd.function.BackwardCFunction
_CALLED = ("apply", "apply_boxed")  # what autograd calls such a node by; the second one is there if it is compiled
_MARK = "_hetero_passage"  # on nodes that have one


def leave_out(edges: Sequence[tuple[Any, int]], gradients: Sequence[Tensor | None]) -> None:
    """Within a backward: see to it that code which only this node leads to is not called where it gives no gradient.

    Args:
        edges: What comes next, for each gradient.
        gradients: What this node is about to return for them.
    """
    for gradient in gradients:
        if gradient is None:
            break
    else:
        return
    starts = [
        node for (node, _), gradient in zip(edges, gradients, strict=True) if node is not None and gradient is None
    ]
    passages = [_Passage(node) for node in _code_of_users(starts) if _MARK not in node.__dict__]
    if passages:
        engine: Any = torch.autograd.Variable._execution_engine

        def close() -> None:
            for passage in passages:
                passage.close()

        engine.queue_callback(close)


def _code_of_users(starts: Iterable[Node]) -> Iterator[Any]:
    """The nodes from here on whose backward is code of users."""
    seen = set(starts)
    todo = [*seen]
    while todo:
        node = todo.pop()
        if isinstance(node, _BY_PYTHON) and not _is_ours(node):
            yield node
        for each, _ in node.next_functions:
            if each is not None and each not in seen:
                seen.add(each)
                todo.append(each)


def _is_ours(node: Any) -> bool:
    return str(node._forward_cls.__module__).startswith("lightning_hetero.runtime.")


class _Passage:
    """A way around a node, for a lack of gradients: neither its code nor the hooks on it are called.

    Args:
        node: The node.
    """

    def __init__(self, node: Any) -> None:
        node.__dict__[_MARK] = True
        self._node = node
        self.is_used = False
        self._handles = [node.register_prehook(self._open), node.register_hook(_nothing)]
        self._hooks: list[tuple[dict[int, Any], int, _Guarded]] = []
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            for key, hook in list(hooks.items()):
                if key != handle.id:
                    hooks[key] = _Guarded(hook, self, is_ahead=handle is self._handles[0])
                    self._hooks.append((hooks, key, hooks[key]))

    def close(self) -> None:
        """Put everything back."""
        for handle in self._handles:
            handle.remove()
        for hooks, key, ours in self._hooks:
            if hooks.get(key) is ours:
                hooks[key] = ours.hook
        for name in (*_CALLED, _MARK):
            self._node.__dict__.pop(name, None)

    def _open(self, gradients: Sequence[Tensor | None]) -> None:
        self.is_used = _are_none(gradients)
        if self.is_used:
            for name in _CALLED:
                self._node.__dict__[name] = self._pass_on

    def _pass_on(self, *_: Any) -> tuple[None, ...]:
        return (None,) * len(self._node.needs_input_grad)


class _Guarded:
    """A hook of user code, ahead of a node or behind it, that is not called where the way around it is taken."""

    def __init__(self, hook: Any, passage: _Passage, *, is_ahead: bool) -> None:
        self.hook = hook
        self._passage = passage
        self._is_ahead = is_ahead

    def __call__(self, gradients: Sequence[Tensor | None], *given: Any) -> Any:
        is_used = _are_none(gradients) if self._is_ahead else self._passage.is_used
        return None if is_used else self.hook(gradients, *given)


def _are_none(gradients: Sequence[Tensor | None]) -> bool:
    return all(gradient is None for gradient in gradients)


def _nothing(*_: Any) -> None:
    return None
