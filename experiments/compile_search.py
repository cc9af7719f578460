"""Tries meshes and remat policies for a step, and prints the best."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.contract import Context, Section
from kwaicoder_jax import hardware, models
from kwaicoder_jax.errors import UserError

MOST_SHOWN = 5
REMAT = (models.Remat.FULL, models.Remat.ATTENTION, models.Remat.PROJECTIONS, models.Remat.PRODUCTS)


def candidates(config: Mapping[str, Any], chips: int) -> Iterator[dict[str, Any]]:
    """Configs with other meshes (fsdp and expert axes) and policies than `config`; its context axis stays.

    Dispatch is by tokens where there is an expert axis, whatever the config says.
    """
    context = max(config.get("mesh", {}).get("context", 1), 1)
    chips //= context
    experts = config.get("upcycle", {}).get("granularity", 1) * config.get("upcycle", {}).get("replicas", 1)
    shares = [size for size in (1, 2, 4, 8, 16) if chips % size == 0 and experts % size == 0]
    for share, policy in itertools.product(shares, REMAT):
        dispatch = models.Dispatch.TOKENS if share > 1 else models.Dispatch.WEIGHTS
        changed = Section(copy.deepcopy(dict(config)))
        changed["mesh"] = {"data": 1, "fsdp": chips // share, "expert": share, "tensor": 1, "context": context}
        changed["runtime"] = {**changed.get("runtime", {}), "remat": str(policy), "dispatch": str(dispatch)}
        yield changed


def run(context: Context, machine: hardware.Topology, step: str) -> None:
    """Compiles each candidate; the best are those that fit, by their bound of MFU."""
    from experiments.compile import compile_step  # it calls this

    found: list[tuple[float, str]] = []
    tried, display = list(candidates(context.config, math.prod(machine.shape))), context.display
    with display.progress(len(tried), "programs") as update:
        for number, candidate in enumerate(tried, 1):
            name = f"{_named(candidate['mesh'])}, remat {candidate['runtime']['remat']}"
            try:
                summary, report = compile_step(dataclasses.replace(context, config=candidate), machine, step)
            except UserError as error:
                display.line(f"{name}: {error.what}")
            else:
                size, ratio = report.hbm_bytes / 1e9, report.flops_ratio
                line = (
                    f"{name}: MFU at most {report.mfu_bound:.1%}, {size:.1f} GB, FLOPs {ratio:.2f}, {summary['bound']}"
                )
                display.line(line if report.fits else f"{line}; does not fit")
                found += [(report.mfu_bound, line)] if report.fits else []
            update(number)
    print("\n".join(line for _, line in sorted(found, reverse=True)[:MOST_SHOWN]) or "nothing fits")


def _named(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"
