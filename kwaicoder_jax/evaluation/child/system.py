"""The Linux calls that Python 3.11 lacks, through ctypes: namespaces, mounts, process controls.

Numbers are those of the kernel's user-space headers (linux/sched.h, linux/mount.h, linux/prctl.h), the same on every
64-bit architecture. Every function raises OSError with the name of the call.
"""

import ctypes
import os

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Moves the caller into new namespaces; NEW_PIDS takes effect for its next child."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    arguments = [text.encode() or None for text in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def bind_read_only(source: str, target: str) -> None:
    """Shows `source` and all that is mounted below it at `target`, read-only, without set-uid files and devices."""
    mount(source, target, flags=MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    call = [ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), target.encode(), ctypes.c_uint(_AT_RECURSIVE)]
    _check(_libc.syscall(*call, ctypes.byref(attributes), ctypes.c_size_t(32)), f"mount_setattr {target}")


def change_root(folder: str) -> None:
    """Makes the mount `folder` the root and lets go of the old one."""
    os.chdir(folder)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")  # the old root is now stacked on ".", as pivot_root(2) shows
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL to the caller when the thread that started it ends. A change of user id undoes this."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def hide_memory() -> None:
    """No process of the same user may trace the caller or read its memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ended become children of the caller."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """Set-uid programs give nothing from here on."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
