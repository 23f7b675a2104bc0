"""Device profiles on disk: those that users write, and the cache of those that were measured."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hetero.devices.numbers import DeviceProfile
from lightning_hetero.errors import InventoryError

log = logging.getLogger(__name__)

_FORMAT = "lightning_hetero device profile"
_VERSION = 1


def read_device_profile(path: str | PathLike[str]) -> DeviceProfile:
    """Read a file that `DeviceCache` or a person wrote.

    Raises:
        InventoryError: The file is missing, unreadable, damaged, of another format, or of a newer version.
    """
    file = Path(path).expanduser()
    what = f"the device profile {str(file)!r}"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InventoryError(f"{what} cannot be read: {error}; give the path of an existing file") from error
    except (ValueError, RecursionError) as error:
        raise InventoryError(f"{what} is damaged: {error}. Delete it to have the devices measured again") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise InventoryError(f"{what} is no device profile: its 'format' is not {_FORMAT!r}")
    version = data.get("version")
    if not isinstance(version, int) or version < 1:
        raise InventoryError(f"{what} is damaged: its version is {version!r}. Write version {_VERSION}")
    if version > _VERSION:
        raise InventoryError(
            f"{what} has version {version}, and this version of lightning_hetero reads version {_VERSION} at most; "
            "upgrade lightning_hetero, or have the devices measured again"
        )
    try:
        return DeviceProfile.from_dict(data)
    except InventoryError as error:
        raise InventoryError(f"{what} is damaged: {error}") from error


class DeviceCache:
    """A folder of device profiles, one JSON file for each machine as torch sees it.

    It never fails a run: a file that is damaged, foreign or of another key counts as not there and is written anew,
    and a folder that cannot be written to keeps nothing.

    Args:
        folder: Where; None is `lightning_hetero/devices` below `XDG_CACHE_HOME`, or else below `~/.cache`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else _default_folder()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the profile of this key is, or would be."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.json"

    def get(self, key: Mapping[str, Any]) -> DeviceProfile:
        """The numbers that were kept under this key; empty if there are none."""
        path = self.path(key)
        if not path.exists():
            return DeviceProfile()
        try:
            if json.loads(path.read_text(encoding="utf-8"))["key"] != key:
                raise InventoryError("it belongs to another machine")
            return read_device_profile(path)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.info("the cached device profile %s is of no use and will be written anew: %s", path, error)
            return DeviceProfile()

    def put(self, key: Mapping[str, Any], profile: DeviceProfile) -> None:
        """Keep what was measured without noise. Other processes see the old file or the new one, never a part."""
        kept = profile.confident()
        if not kept.devices and not kept.links:
            return
        data = {"format": _FORMAT, "version": _VERSION, "key": key, **kept.to_dict()}
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
            log.info("the device profile is not cached in %s: %s", self.folder, error)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lightning_hetero" / "devices"
