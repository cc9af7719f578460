"""Predicts the time of a Pallas TPU kernel from its compiled schedule, on a machine without a TPU.

    kernel = schedule.compile_kernel(function, arguments, chip="v5e", kernel="gmm")
    prediction = kernel.predict({0: 80, 1: offsets}, useful_flops=2 * m * k * n)
    print(prediction.seconds, prediction.utilization)

See docs/schedule.md for what is behind the figures, and what is not in them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.schedule.bundles import LIBTPU_VERSION, DumpError
from kwaicoder_jax.hardware.schedule.compilation import compile_text, lower
from kwaicoder_jax.hardware.schedule.cores import TensorCores, tensor_cores
from kwaicoder_jax.hardware.schedule.machine import EndlessError
from kwaicoder_jax.hardware.schedule.operations import Operand
from kwaicoder_jax.hardware.schedule.prediction import Kernel, Prediction, kernel_of
from kwaicoder_jax.hardware.schedule.timeline import DeadlockError, SemaphoreError
from kwaicoder_jax.hardware.schedule.unknown import UnknownValueError

__all__ = [
    "LIBTPU_VERSION", "DeadlockError", "DumpError", "EndlessError", "Kernel", "Operand", "Prediction", "SemaphoreError",
    "TensorCores", "UnknownValueError", "compile_kernel", "compile_kernels", "predict", "tensor_cores",
]  # fmt: skip


def compile_kernels(
    function: Callable[..., Any], arguments: Sequence[Any], *, chip: str, kernel: str = "", flags: Sequence[str] = ()
) -> tuple[Kernel, ...]:
    """Compiles a function for a chip that is not here, and reads the schedules of its Pallas kernels.

    Args:
      function: anything that jax can trace; it may be jitted.
      arguments: trees of `jax.ShapeDtypeStruct`, or of arrays.
      chip: "v5e", "v5p" or "v6e".
      kernel: a regular expression that its name has to contain; as in pallas_call(name=...), or else the name of the
        function around it.
      flags: of libtpu, as in "--xla_tpu_scoped_vmem_limit_kib=57344".

    Raises:
      UserError: the chip is not known, libtpu is not installed, or it refuses the program.
      DumpError: something in a schedule is not known here.
    """
    cores = tensor_cores(chip)
    dumps = compile_text(lower(function, arguments, cores), cores, flags)
    return tuple(
        kernel_of(dump, cores)
        for name, dump in dumps.items()
        if re.search(kernel, name) and re.search(r"entry bundle: %\S+ = custom-call\(", dump.bundles)
    )


def compile_kernel(
    function: Callable[..., Any], arguments: Sequence[Any], *, chip: str, kernel: str = "", flags: Sequence[str] = ()
) -> Kernel:
    """As `compile_kernels`, of which there has to be one; UserError if there is none, or more."""
    found = compile_kernels(function, arguments, chip=chip, kernel=kernel, flags=flags)
    if len(found) != 1:
        names = ", ".join(each.name for each in found)
        what = f"{len(found)} kernels are called {kernel!r}{': ' if names else ''}{names}"
        raise UserError(what, where="kernel", remedy="name one of them, by a regular expression")
    return found[0]


def predict(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    chip: str,
    kernel: str = "",
    scalars: Mapping[int, Any] | None = None,
    useful_flops: float | None = None,
    flags: Sequence[str] = (),
) -> Prediction:
    """The time of one kernel in a function: `compile_kernel`, and then `Kernel.predict`, which can be called again.

    Args:
      function, arguments, chip, kernel, flags: as of `compile_kernels`.
      scalars: values of the kernel's scalar operands, by index: a grid's dynamic bounds, then the prefetched ones.
      useful_flops: twice the multiply-adds that were asked for.
    """
    found = compile_kernel(function, arguments, chip=chip, kernel=kernel, flags=flags)
    return found.predict(scalars, useful_flops=useful_flops)
