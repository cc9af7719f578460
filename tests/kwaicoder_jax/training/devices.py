"""Runs a helper module of the tests in a process that sees several CPU devices."""

import json
import pathlib
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
# For whole models in tests, whose time is that of compiling them: a third of it.
QUICK: dict[str, str | bool | int | float] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_SETTINGS: Any = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def run(module: str, devices: int, *arguments: str) -> Any:
    """What `python -m tests.kwaicoder_jax.MODULE ARGUMENTS` (of tests.MODULE, for kernels) prints last, as JSON."""
    done = subprocess.run(_command(module, devices, *arguments), **_SETTINGS, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_together(module: str, processes: int, devices_each: int) -> Any:
    """The same of the first of several processes, which get the port of their coordinator and their own number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    numbers = range(processes)
    started = [subprocess.Popen(_command(module, devices_each, port, str(n)), **_SETTINGS) for n in numbers]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, printed
    return json.loads(printed[0][0].splitlines()[-1])


def _command(module: str, devices: int, *arguments: str) -> list[str]:
    quick = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
    settings = ["env", "JAX_PLATFORMS=cpu", f"XLA_FLAGS={flags}"]
    package = "tests" if module.startswith("kernels.") else "tests.kwaicoder_jax"
    return [*settings, sys.executable, "-m", f"{package}.{module}", *arguments]
