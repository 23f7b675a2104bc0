"""What users say about activation checkpointing, and the plan with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_hetero.devices import Inventory
from lightning_hetero.errors import UsageError
from lightning_hetero.plan import Plan


@dataclass(frozen=True, slots=True)
class ActivationCheckpointing:
    """Which stages keep the inputs of their modules only.

    Attributes:
        wanted: True for all of them, False for none, names of devices for those on these devices; None for those of
            the plan.
    """

    wanted: bool | tuple[str, ...] | None

    @classmethod
    def of(cls, given: Any, rematerialize: bool | None) -> ActivationCheckpointing:
        """Read the argument of a user.

        Args:
            given: The argument.
            rematerialize: Whether whole modules run again in the backward; None if the plan decides.

        Raises:
            UsageError: It is neither True, False, None nor a list of names; or forwards are run again in another way.
        """
        is_list = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
        if not (is_list or given is None or isinstance(given, bool)):
            raise UsageError(
                f"activation_checkpointing={given!r} is not known; it may be True, False or a list of names of "
                "devices, such as ['cuda:0']"
            )
        if given and rematerialize is not False:
            raise _redundant("True" if rematerialize else "'auto'")
        return cls(tuple(given) if is_list else given)

    def check(self, inventory: Inventory) -> None:
        """Refuse names of devices that are not there.

        Raises:
            UsageError: There is one.
        """
        for name in self.wanted if isinstance(self.wanted, tuple) else ():
            if name not in inventory:
                raise UsageError(
                    f"activation_checkpointing names {name!r}, which is not among the devices of this run: "
                    f"{', '.join(inventory.names)}"
                )

    def applied(self, plan: Plan, rematerialize: bool) -> Plan:
        """The plan with what is wanted.

        Args:
            plan: The plan.
            rematerialize: Whether it runs whole modules again in the backward.

        Raises:
            UsageError: The plan asks for both.
        """
        wanted = self.wanted
        if wanted is None:
            units = plan.checkpointed
        elif isinstance(wanted, bool):
            units = tuple(plan.device_of) if wanted else ()
        else:
            units = tuple(unit for unit, device in plan.device_of.items() if device in wanted)
        if units and rematerialize:
            raise _redundant("True")
        return plan.with_checkpointing(units)


def _redundant(rematerialize: str) -> UsageError:
    return UsageError(
        f"rematerialize={rematerialize} runs the forward of every micro-batch again in the backward, and "
        "activation_checkpointing that of each module on its device: both would run it three times. Take one of them."
    )
