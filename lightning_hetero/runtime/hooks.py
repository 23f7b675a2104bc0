"""Puts this package's hooks on a module, and finds them again to take them off."""

from __future__ import annotations

from typing import Any

from torch import nn

# Where a module keeps what `add_hooks` puts on it.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class Hook:
    """Base of all hooks that this package puts on modules; that is how they are told from those of user code.

    Their objects know devices but no modules: a deep copy or pickle of a module carries working copies of them.
    """

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """What torch calls."""
        raise NotImplementedError


def add_hooks(module: nn.Module, before: Hook, after: Hook, *, with_kwargs: bool = False) -> None:
    """Call `before` ahead of the module's `forward`, and `after` behind it, even if it raised.

    First in, last out: hooks of user code see inputs and outputs on the module's own device.
    """
    add_hook_before(module, before, with_kwargs=with_kwargs)
    nn.Module.register_forward_hook(module, after, always_call=True)


def add_hook_before(module: nn.Module, before: Hook, *, with_kwargs: bool = True) -> None:
    """Call `before` ahead of the module's `forward`, and of all hooks that it has by now."""
    # By the class: ScriptModule forbids the call, since it would not compile the hook. Nothing is compiled here.
    nn.Module.register_forward_pre_hook(module, before, prepend=True, with_kwargs=with_kwargs)


def remove_hooks(module: nn.Module) -> None:
    """Take all hooks of this package off one module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, Hook):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
