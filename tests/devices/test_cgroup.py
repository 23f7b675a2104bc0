"""The memory limit of a control group, read from fake files of both versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hetero.devices.cgroup import CgroupMemory, cgroup_memory

Tree = Callable[[dict[str, str]], Path]
GIB = 1024**3
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
NO_V1_LIMIT = "9223372036854771712\n"


def v2(group: str = "0::/job\n", mount: str = V2_MOUNT, **files: str) -> dict[str, str]:
    return {"proc/self/cgroup": group, "proc/self/mountinfo": mount, **files}


def test_version_2_gives_limit_and_rest_with_file_cache_counted_as_free(tree: Tree) -> None:
    folder = "sys/fs/cgroup/job"
    root = tree(
        v2()
        | {
            f"{folder}/memory.max": f"{8 * GIB}\n",
            f"{folder}/memory.current": f"{5 * GIB}\n",
            f"{folder}/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB}\n",
        }
    )
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=8 * GIB, available_bytes=5 * GIB)


def test_version_1_gives_limit_and_rest_with_file_cache_counted_as_free(tree: Tree) -> None:
    folder = "sys/fs/cgroup/memory/job"
    root = tree(
        {
            "proc/self/cgroup": "5:cpu:/elsewhere\n4:memory:/job\n0::/\n",
            "proc/self/mountinfo": V1_CPU_MOUNT + V1_MOUNT,
            f"{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{folder}/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
        }
    )
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=4 * GIB, available_bytes=2 * GIB)


def test_a_limit_of_an_ancestor_counts_where_it_is_tighter(tree: Tree) -> None:
    root = tree(
        v2("0::/pod/container\n")
        | {
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
        }
    )
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=2 * GIB, available_bytes=GIB)


def test_version_1_names_a_limit_of_invisible_ancestors_in_its_statistics(tree: Tree) -> None:
    folder = "sys/fs/cgroup/memory"
    root = tree(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "proc/self/mountinfo": V1_MOUNT,
            f"{folder}/memory.limit_in_bytes": NO_V1_LIMIT,
            f"{folder}/memory.usage_in_bytes": "1024\n",
            f"{folder}/memory.stat": f"hierarchical_memory_limit {GIB}\n",
        }
    )
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=GIB, available_bytes=GIB - 1024)


@pytest.mark.parametrize(
    ("group", "mount_root", "found_in"),
    [
        ("/docker/abc", "/docker/abc", ""),  # the container's own group is mounted
        ("/docker/abc/job", "/docker/abc", "job"),
        ("/somewhere/else", "/docker/abc", ""),  # the path of the host, which is not mounted here
        ("/../../outside", "/", ""),
        ("/not/mounted", "/", ""),
    ],
)
def test_the_group_is_found_below_what_the_container_sees(
    tree: Tree, group: str, mount_root: str, found_in: str
) -> None:
    mount = f"41 31 0:38 {mount_root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    root = tree(v2(f"0::{group}\n", mount) | {f"sys/fs/cgroup/{found_in}/memory.max": f"{GIB}\n"})
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=GIB, available_bytes=GIB)


def test_a_group_above_its_limit_has_nothing_left(tree: Tree) -> None:
    folder = "sys/fs/cgroup/job"
    root = tree(v2() | {f"{folder}/memory.max": "1000", f"{folder}/memory.current": "1500"})
    assert cgroup_memory(root) == CgroupMemory(limit_bytes=1000, available_bytes=0)


@pytest.mark.parametrize(
    "files",
    [
        {},
        v2() | {"sys/fs/cgroup/job/memory.max": "max\n"},
        {"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": V1_MOUNT}
        | {"sys/fs/cgroup/memory/memory.limit_in_bytes": NO_V1_LIMIT},
        v2("nonsense\n", "nonsense - \n\n1 2 - cgroup2\n"),
    ],
    ids=["no control groups", "version 2 without limit", "version 1 without limit", "unreadable"],
)
def test_without_a_limit_there_is_none(tree: Tree, files: dict[str, str]) -> None:
    assert cgroup_memory(tree(files)) is None
