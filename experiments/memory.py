"""How much memory the process uses and could use, as the kernel says."""

import contextlib
import pathlib

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that the process could still get without swapping; None where nobody says.

    The least of what the machine has free, page cache included, and what the limit of its container leaves.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            spent = int((_CGROUP / used).read_text()) - _page_cache(_CGROUP / limit)
            found.append(int((_CGROUP / limit).read_text()) - spent)
    return min(found, default=None)


def _page_cache(limit: pathlib.Path) -> int:
    """Bytes of files in the container's memory, which it gives back when it needs them."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        return int(lines["inactive_file"]) + int(lines["active_file"])
    return 0
