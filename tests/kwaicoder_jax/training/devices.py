"""Runs a helper module of the tests in a process that sees several CPU devices."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
# For whole models in tests, whose time is that of compiling them: a third of it.
QUICK: dict[str, str | bool | int | float] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def run(module: str, devices: int, *arguments: str) -> Any:
    """What `python -m tests.kwaicoder_jax.MODULE ARGUMENTS` prints as its last line, as JSON."""
    quick = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", f"tests.kwaicoder_jax.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
