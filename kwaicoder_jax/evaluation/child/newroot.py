"""The file tree that a sandboxed command sees: system folders read-only, an interpreter, one small writable folder."""

import contextlib
import os

from kwaicoder_jax.evaluation.child import system

WORK = "/sandbox"
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt")
DEVICES = ("null", "zero", "full", "random", "urandom")


def enter(order: dict) -> str:
    """Builds the tree on a memory file system of `order["disk_bytes"]`, moves into it, returns the working folder.

    The caller is process 1 of new user, mount and PID namespaces, and holds every right inside them.
    """
    root = order["folder"]
    system.mount("none", "/", flags=system.MS_REC | system.MS_PRIVATE)
    system.mount("tmpfs", root, "tmpfs", system.MS_NOSUID | system.MS_NODEV, f"mode=755,size={order['disk_bytes']}")
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):  # /bin -> usr/bin
            os.symlink(os.readlink(folder), root + folder)
        else:
            _show(folder, root)
    for folder in order["readable"]:
        _show(folder, root)
    os.makedirs(f"{root}/dev")
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        system.mount(f"/dev/{name}", f"{root}/dev/{name}", flags=system.MS_BIND)
    os.makedirs(f"{root}/proc")
    # a container that hides parts of its own /proc may not mount a new one; the command then has none
    with contextlib.suppress(OSError):
        system.mount("proc", f"{root}/proc", "proc", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC)
    for folder in (WORK, "/tmp", "/dev/shm"):
        os.makedirs(root + folder, exist_ok=True)
        os.chmod(root + folder, 0o1777)
    system.change_root(root)
    # a namespace made inside would give the command rights over its mounts and network again
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    return WORK


def _show(folder: str, root: str) -> None:
    target = root + folder
    if os.path.lexists(target) or not os.path.isdir(folder):
        return
    os.makedirs(target)
    system.bind_read_only(folder, target)


def write_files(folder: str, files: "dict[str, str]", owner: "tuple[int, int] | None") -> None:
    """Puts the order's files into the working folder, and gives all of it to the command's user."""
    for name, text in files.items():
        place = os.path.join(folder, name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    if owner:
        for place, _, names in os.walk(folder):
            for path in (place, *(os.path.join(place, name) for name in names)):
                os.chown(path, *owner)
