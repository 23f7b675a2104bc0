"""Keeps profiles on disk, so that a run that was seen before starts at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import ProfileError
from lightning_hetero.profile.allowed import MayRun
from lightning_hetero.profile.benches import is_here
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.profile.recording import Recording

log = logging.getLogger(__name__)

_FORMAT = "lightning_hetero profile"
_VERSION = 5
# What a plan may use of a device changes from hour to hour, and its seconds do not.
_FREE = {"memory_bytes", "total_memory_bytes"}
# Measured anew in every run, a little different each time.
_RATES = {"flops_per_s", "memory_bytes_per_s", "launch_s", "measured"}


def cache_key(
    recording: Recording, inventory: Inventory, *, rows: int, training: bool, may_run: MayRun | None = None
) -> dict[str, Any]:
    """All that a profile depends on, as plain JSON types.

    That is: the model's fingerprint, the sorts of its units, and shapes and dtypes of all calls; what the recording saw
    between them, such as flows; rows; the devices, and what must not be measured on them; the versions of torch and of
    this package; the number of threads.
    """
    from lightning_hetero import __version__

    calls = [(c.unit, [(s.shape, str(s.dtype), s.requires_grad) for s in c.inputs]) for c in recording.calls]
    key = {
        "model": recording.graph.fingerprint,
        "sorts": recording.sort_of,
        "calls": calls,
        "between": _between(recording),
        "recorded_on": str(recording.device),
        "rows": rows,
        "training": training,
        "devices": _devices(inventory),
        "kept_from": [
            [name, device] for name in recording.sort_of for device in inventory.names if not may_run(name, device)
        ]
        if may_run is not None
        else [],
        "host": inventory.host,
        "torch": torch.__version__,
        "lightning_hetero": __version__,
        "threads": torch.get_num_threads(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


class ProfileCache:
    """A folder of profiles, one JSON file each.

    It never fails a run: a file that is damaged, foreign or of another key counts as not there and is written anew,
    and a folder that cannot be written to keeps nothing.

    Args:
        folder: Where; None is `lightning_hetero/profiles` below `XDG_CACHE_HOME`, or else below `~/.cache`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else _default_folder()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the profile of this key is, or would be."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.json"

    def get(self, key: Mapping[str, Any]) -> ModelProfile | None:
        """The profile that was kept under this key, if there is one."""
        path = self.path(key)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if (data["format"], data["version"], data["key"]) != (_FORMAT, _VERSION, key):
                raise ProfileError("it belongs to something else")
            return ModelProfile.from_dict(data["profile"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.info("the cached profile %s is of no use and will be written anew: %s", path, error)
            return None

    def put(self, key: Mapping[str, Any], profile: ModelProfile) -> None:
        """Keep a profile. Other processes see the old file or the new one, never a part."""
        data = {"format": _FORMAT, "version": _VERSION, "key": key, "profile": profile.to_dict()}
        temporary: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.folder, suffix=".part", delete=False
            ) as file:
                temporary = Path(file.name)
                json.dump(data, file, indent=1)
            temporary.replace(self.path(key))
        except OSError as error:
            log.info("the profile is not cached in %s: %s", self.folder, error)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()


def _between(recording: Recording) -> dict[str, Any]:
    """What passes between units, and what own code keeps: another forward of equal units is another model."""
    rows, own_code = recording.rows, recording.own_code
    end = own_code.in_the_end(rows)
    return {
        "flows": [asdict(flow) for flow in recording.flows],
        "sees_batch": recording.sees_batch,
        "out_of_sight": recording.out_of_sight,
        "entering": [asdict(entering) for entering in recording.entering],
        "code": [asdict(code) for code in (*own_code.code(rows), *(() if end is None else (end,)))],
        "waiting": [asdict(waiting) for waiting in own_code.waiting(rows)],
        "coupled": recording.coupled,
        "followers": recording.followers,
    }


def _devices(inventory: Inventory) -> list[dict[str, Any]]:
    """What seconds on each device depend on. Speeds and rates matter only for what follows from another device."""
    here = {d.name for d in inventory if not d.emulated and d.torch_device is not None and is_here(d.torch_device)}
    all_here = all(device.emulated or device.name in here for device in inventory)
    found = []
    for device in inventory:
        left_out = set(_FREE)
        if all_here:
            left_out |= _RATES | ({"speed"} if device.name in here else set())
        found.append({field: value for field, value in asdict(device).items() if field not in left_out})
    return found


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lightning_hetero" / "profiles"
