"""Compiles a function for a TPU that is not here, in another process, and reads what the compiler writes about its kernels.

libtpu takes its flags when it starts, and writes its dumps for all that a process compiles. So the function is lowered here,
which needs no libtpu, and its text is compiled by `compiler.py` in a child process.
"""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.schedule.bundles import LIBTPU_VERSION
from kwaicoder_jax.hardware.schedule.cores import TensorCores
from kwaicoder_jax.hardware.topologies import TPU_ENVIRONMENT

_BUNDLES = "final_bundles.txt"
_TABLE = "hlo-static-per-bundle-utilization.txt"
_SECONDS = 540


@dataclasses.dataclass(frozen=True)
class Dump:
    """What the compiler wrote about one kernel.

    Attributes:
      name: of the kernel.
      bundles: its final schedule.
      before_delays, after_delays: tables of how much of each unit a bundle uses.
      allocations: of its memory.
    """

    name: str
    bundles: str
    before_delays: str
    after_delays: str
    allocations: str


def lower(function: Callable[..., Any], arguments: Sequence[Any], cores: TensorCores) -> str:
    """StableHLO of the function as it is traced for the chip.

    Args:
      function: it may be jitted.
      arguments: trees of `jax.ShapeDtypeStruct` (or of arrays).
      cores: of the chip.
    """
    device = AbstractDevice(device_kind=cores.device_kind, num_cores=cores.count, platform="tpu")
    mesh = AbstractMesh((1,), ("device",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):  # kernels ask it which chip they are for
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.as_text(debug_info=True)  # the debug information has the kernels' names


def compile_text(text: str, cores: TensorCores, flags: Sequence[str] = ()) -> dict[str, Dump]:
    """Compiles it, and returns the dumps of everything that runs on a TensorCore, by name.

    Args:
      text: of a module for one device.
      cores: of the chip.
      flags: of libtpu, as in "--xla_tpu_scoped_vmem_limit_kib=57344".

    Raises:
      UserError: libtpu is not here, or refuses the module.
    """
    with tempfile.TemporaryDirectory(prefix="schedule-") as folder:
        module, dumps = Path(folder, "module.mlir"), Path(folder, "dumps")
        module.write_text(text)
        dumps.mkdir()
        child = "kwaicoder_jax.hardware.schedule.compiler"
        try:
            finished = subprocess.run(
                [sys.executable, "-m", child, str(module), cores.topology],
                env=os.environ | _environment(dumps, flags),
                cwd=Path(__file__).parents[3],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the TPU compiler takes more than {_SECONDS} s", where="schedule") from error
        if finished.returncode:
            raise UserError(f"the TPU compiler refuses it: {_reason(finished.stderr)}", where="schedule")
        return _read(dumps)


def _environment(dumps: Path, flags: Sequence[str]) -> Mapping[str, str]:
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        remedy = f"pip install libtpu=={LIBTPU_VERSION}"
        raise UserError("the TPU compiler is not here", where="schedule", remedy=remedy) from error
    if version != LIBTPU_VERSION:
        warnings.warn(f"libtpu {version}: schedules are read as {LIBTPU_VERSION} writes them", stacklevel=4)
    ours = (
        f"--xla_jf_dump_to={dumps}", "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*(final|pre-delay).*",
    )  # fmt: skip
    return {**TPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": " ".join((*ours, *flags))}


def _reason(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    first = next(
        (place for place, line in reversed(list(enumerate(lines))) if re.match(r"[\w.]*(Error|error)\b", line)), -1
    )
    return "\n".join(lines[first:])[:2000]


def _read(folder: Path) -> dict[str, Dump]:
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.iterdir()):
        named = re.match(r"\d+-(.+)-\d\d-(.+)$", path.name)
        if named and not named.group(1).startswith("<"):
            found.setdefault(named.group(1), {})[named.group(2)] = path.read_text()
    return {
        name: Dump(
            name,
            files[_BUNDLES],
            files[f"pre-delay_{_TABLE}"],
            files[f"final_{_TABLE}"],
            files["pre-finalize-registers-and-allocations.txt"],
        )
        for name, files in found.items()
    }
