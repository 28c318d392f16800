"""How much memory this process may still ask for.

Layer: mpi. Knows nothing of windows and ranks.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory"]

CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes available without swapping: of the machine and of this process's cgroups.

    The limit of a container or of a batch job is a cgroup's; past it the process is killed.
    """
    return min([_machine(), *_cgroup_headrooms()])


def _machine() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroup_headrooms(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> list[int]:
    """What is left below the memory limit of this process's cgroup and of those around it."""
    found = []
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            found += _headroom(folder, limit, usage)
            if folder == base:
                break
            folder = folder.parent
    return found


def _headroom(folder: Path, limit: str, usage: str) -> list[int]:
    """Limit less use, not counting file pages, which can be dropped; nothing without a limit."""
    try:
        top = (folder / limit).read_text(encoding="ascii").strip()
        used = int((folder / usage).read_text(encoding="ascii"))
        pairs = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
    if not top.isdigit():
        return []
    stat = dict(zip(pairs[::2], pairs[1::2], strict=False))
    files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return [max(int(top) - max(used - files, 0), 0)]
