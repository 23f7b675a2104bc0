"""Puts units and regions in the place of the calls of a placed model's modules, as its layout says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_hetero.runtime.emulate import Pace
from lightning_hetero.runtime.engine.intercept import BlockRegion, ChainUnit, ModuleUnit, Region
from lightning_hetero.runtime.engine.replicas import Copies, Seat, why_not
from lightning_hetero.runtime.engine.worker import Worker
from lightning_hetero.runtime.layout import Block, Layout

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.engine import Engine


class Interceptions:
    """What stands in the place of module calls. Until `install`, nothing does.

    Args:
        engine: Where calls go.
        workers: The threads of the devices, by name.
        stage_of: Index of the stage of each block, by `id` of its module.
        paces: Threads of emulated devices, by name.

    Attributes:
        units: Of the placed modules.
        regions: Of the modules whose units lie on several devices, and of those with replicas.
        seats: The replicas.
        copies: What lies on each device for replicas, by its name.
    """

    def __init__(
        self, engine: Engine, workers: Mapping[str, Worker], stage_of: Mapping[int, int], paces: Mapping[str, Pace]
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._stage_of = stage_of
        self._paces = paces
        self.units: list[ModuleUnit] = []
        self.regions: list[Region] = []
        self.seats: list[Seat] = []
        self.copies = {name: Copies(worker.torch_device) for name, worker in workers.items()}

    def remove(self) -> None:
        """Give the modules their calls back."""
        for region in self.regions:
            region.remove()
        for unit in self.units:
            unit.remove()

    @property
    def tasks(self) -> Iterator[ModuleUnit | ChainUnit]:
        """Everything that workers run in one piece."""
        yield from self.units
        for region in self.regions:
            yield from (link for link in region.chain or () if isinstance(link, ChainUnit))

    def renew_replicas(self) -> None:
        """Make all replicas as the modules are now. Lanes that run forwards are about to begin."""
        if not self.seats:
            return
        for copies in self.copies.values():
            seats = (seat for seat in self.seats if seat.copies is copies)
            copies.refresh(original for seat in seats for original in seat.originals())
        for seat in self.seats:
            seat.renew()

    @property
    def lost_by_replicas(self) -> str | None:
        """What a replica has set in vain, in words; None if there is nothing."""
        return next((lost for seat in self.seats if (lost := seat.lost) is not None), None)

    @property
    def replicas_changed_buffers(self) -> bool:
        """Whether a replica has changed a buffer since."""
        return any(seat.has_changed_buffers for seat in self.seats)

    def install(self, layout: Layout) -> None:
        """Take the place of the calls of a model's modules."""
        blocks = {id(block.module): self._shared(block) for block in layout.blocks}
        for block in blocks.values():
            stage = self._stage_of[id(block.module)]
            unit = ModuleUnit(self._engine, block.name, self._workers[block.device.name], stage, block.module)
            self._replicate(unit, block)
            unit.install()
            self.units.append(unit)
            if block.shares:
                self.regions.append(BlockRegion(unit))
        for split in layout.splits:
            inside = [blocks[id(part)] for part in split.module.modules() if id(part) in blocks]
            used = {device.name for block in inside for device in block.devices}
            if len(used) > 1:
                region = Region(self._engine, split.name, split.module)
                if split.chain:
                    region.chain = self._chain(split.name, split.module, blocks)
                region.install()
                self.regions.append(region)

    def _shared(self, block: Block) -> Block:
        """The block, without replicas if its module cannot have any."""
        reason = why_not(block.module) if block.shares else None
        if reason is None:
            return block
        consequence = f"All of it runs on {block.device.name}; the results are the same."
        self._engine.note(f"{block.name} has no replicas, because {reason}", consequence)
        return replace(block, shares=())

    def _replicate(self, unit: ModuleUnit | ChainUnit, block: Block) -> None:
        """Give a unit the replicas that the plan wants."""
        seats = [
            (
                self._workers[device.name],
                Seat(unit.parts, self.copies[device.name], self._paces.get(device.name, Pace())),
            )
            for device in block.devices[1:]
        ]
        if seats:
            unit.replicate([share for _, share in block.shares], seats)
            self.seats += [seat for _, seat in seats]

    def _chain(self, name: str, chain: nn.Module, blocks: Mapping[int, Block]) -> tuple[ChainUnit | nn.Module, ...]:
        """The children of an nn.Sequential, those that follow each other on one device together.

        Children without parameters run where the one before them ran: that is where their input is.
        """
        links: list[ChainUnit | nn.Module] = []
        place: Block | None = None
        together: list[tuple[str, nn.Module]] = []

        def close() -> None:
            if together and place is not None:
                names = list(
                    dict.fromkeys(f"{name}.{key}" if name else key for key in (together[0][0], together[-1][0]))
                )
                children = [child for _, child in together]
                stage = next((self._stage_of[id(child)] for child in children if id(child) in self._stage_of), 0)
                link = ChainUnit(self._engine, "…".join(names), self._workers[place.device.name], stage, children)
                self._replicate(link, place)
                links.append(link)
            together.clear()

        for key, child in chain.named_children():
            below = [blocks[id(part)] for part in child.modules() if id(part) in blocks]
            if id(child) in blocks or (not below and place is not None):
                target = blocks.get(id(child), place)
                if target is None or place is None or (target.device, target.shares) != (place.device, place.shares):
                    close()
                    place = target
                together.append((key, child))
                continue
            close()
            links.append(child)
            place = below[-1] if below else None
        close()
        return tuple(links)
