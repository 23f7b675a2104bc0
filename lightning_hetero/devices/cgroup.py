"""The memory that the control group of this process may use (Linux, version 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Version 1 writes "no limit" as the largest multiple of the page size below 2**63.
_NO_LIMIT_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """The tightest limit on the way from this process's control group to the topmost visible one.

    Attributes:
        limit_bytes: The smallest limit.
        available_bytes: The smallest rest: limit minus use, where file cache counts as unused.
    """

    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """What the two versions call the same numbers."""

    limit: str
    usage: str
    file_cache: tuple[str, ...]
    inherited_limit: str = ""


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "hierarchical_memory_limit",
)
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def cgroup_memory(root: Path = Path("/")) -> CgroupMemory | None:
    """Read the limit from `/proc/self/cgroup`, `/proc/self/mountinfo` and the files that they lead to.

    Args:
        root: Where `/proc` and the mounts are looked up.

    Returns:
        None without a limit, and where there are no control groups.
    """
    found = [memory for folder, files in _folders(root) if (memory := _read(folder, files))]
    if not found:
        return None
    return CgroupMemory(
        limit_bytes=min(memory.limit_bytes for memory in found),
        available_bytes=min(memory.available_bytes for memory in found),
    )


def _folders(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's control groups and of all their visible ancestors."""
    groups = _own_groups(_text(root / "proc/self/cgroup"))
    for mount_root, mount_point, version in _mounts(_text(root / "proc/self/mountinfo")):
        if version not in groups:
            continue
        top = root / mount_point.lstrip("/")
        inside = _relative(groups[version], mount_root)
        for folder in (inside, *inside.parents):
            yield top / folder, _V1 if version == 1 else _V2


def _own_groups(text: str) -> dict[int, str]:
    """From "4:memory:/jobs/7" (version 1) and "0::/jobs/7" (version 2) lines, the path per version."""
    groups: dict[int, str] = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    return groups


def _mounts(text: str) -> Iterator[tuple[str, str, int]]:
    """(root inside the hierarchy, mount point, version) of each mount that may limit memory."""
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not dash or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            yield fields[3], fields[4], 2
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield fields[3], fields[4], 1


def _relative(group: str, mount_root: str) -> PurePosixPath:
    """`group` below `mount_root`; the mount itself if it lies elsewhere, as seen inside some containers."""
    try:
        inside = PurePosixPath(group).relative_to(mount_root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


def _read(folder: Path, files: _Files) -> CgroupMemory | None:
    limit_bytes = _number(_text(folder / files.limit))
    stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    inherited_bytes = _number(stat.get(files.inherited_limit, ""))
    limits = [limit for limit in (limit_bytes, inherited_bytes) if limit is not None and limit < _NO_LIMIT_BYTES]
    if not limits:
        return None
    used_bytes = _number(_text(folder / files.usage)) or 0
    cache_bytes = sum(_number(stat.get(key, "")) or 0 for key in files.file_cache)
    used_bytes -= min(cache_bytes, used_bytes)
    return CgroupMemory(limit_bytes=min(limits), available_bytes=max(0, min(limits) - used_bytes))


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None  # version 2 writes "max" for no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
