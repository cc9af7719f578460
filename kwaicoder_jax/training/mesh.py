"""The device mesh, and the one table that maps logical axes of parameters and batches to mesh axes."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwaicoder_jax import hardware, models
from kwaicoder_jax.errors import UserError

BATCH_AXES = ("data", "fsdp", "expert")  # the rows of a batch are split over all of these
CONTEXT_AXIS = "context"  # and its time over this one

# Logical axis of a parameter -> mesh axis. What is not listed is replicated.
RULES: Mapping[str, str] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
    "shared_mlp": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; the one that is -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1


def without_context(config: MeshConfig) -> MeshConfig:
    """The same devices with rows in the place of parts of rows: for what has no long rows, such as a step that decodes."""
    fsdp = config.fsdp if config.fsdp == -1 or config.context == -1 else config.fsdp * config.context
    return dataclasses.replace(config, fsdp=-1 if config.context == -1 else fsdp, context=1)


def share_of(config: MeshConfig, devices: int) -> MeshConfig:
    """The mesh of so many devices that is most like `config`, which is of a multiple of them: its axes grow no longer.

    Those that split parameters keep what they can, `data` loses first.
    """
    left, sizes = devices, {}
    for axis in ("fsdp", "expert", "tensor", "context", "data"):
        if (size := getattr(config, axis)) != -1:
            sizes[axis] = math.gcd(size, left)
            left //= sizes[axis]
    return dataclasses.replace(config, **sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over all devices (or those given); UserError if the sizes do not multiply to their number."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"{sizes} does not multiply to the {len(devices)} devices here", where="mesh",
            remedy="every axis is 1 or more, and the one that is -1 takes what the others leave",
        )  # fmt: skip
    return Mesh(_arranged(tuple(sizes.values()), devices), tuple(sizes))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices so that neighbours along an axis are neighbours in the machine, where its shape is known."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def partition(declaration: models.Declaration, mesh: Mesh, name: str = "") -> PartitionSpec:
    """The PartitionSpec of one declared parameter, checked for collisions and divisibility."""
    spec = [RULES.get(axis) for axis in declaration.axes]
    used = [axis for axis in spec if axis is not None]
    if len(set(used)) != len(used):
        raise UserError(f"two axes of {name} {declaration.axes} map to one mesh axis {spec}", where="mesh rules")
    for size, logical, axis in zip(declaration.shape, declaration.axes, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} has {size} {logical}, which {mesh.shape[axis]} devices cannot share", where=f"mesh.{axis}",
                remedy=f"choose a divisor of {size}",
            )  # fmt: skip
    return PartitionSpec(*spec)


def param_shardings(config: models.ModelConfig, mesh: Mesh) -> Any:
    """The parameters' tree with a NamedSharding in place of every array."""
    flat = {
        name: NamedSharding(mesh, partition(declaration, mesh, name))
        for name, declaration in models.declarations(config).items()
    }
    return models.unflatten(flat)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [B, T, ...]: rows over the data-like axes, time over the context axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, CONTEXT_AXIS))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Whole rows over the data-like axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


@functools.lru_cache
def row_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process holds, and of how many; processes may hold the same part."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = row_sharding(mesh).devices_indices_map((shares,))
    for device, (rows,) in places.items():
        parts.setdefault(device.process_index, set()).add(rows.start or 0)
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    if [row for part in distinct for row in part] != list(range(shares)) or len({len(part) for part in distinct}) != 1:
        raise UserError(
            "the processes do not hold whole, equal runs of a batch's rows", where="mesh",
            remedy="let each of mesh.data, fsdp and expert divide, or be divided by, the number of processes",
        )  # fmt: skip
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def own_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """This process's rows of a whole batch."""
    index, count = row_share(mesh)
    rows = min((len(value) for value in batch.values()), default=0)
    if rows % count:
        what, remedy = f"a batch of {rows} rows, which {count} processes cannot share", f"use a multiple of {count}"
        raise UserError(what, where="validation.batch_size", remedy=remedy)
    return {key: value[index * rows // count : (index + 1) * rows // count] for key, value in batch.items()}


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch; together the processes hold the whole batch.

    Rows are whole, also where the devices of this process hold a part of their time.
    """
    sharding = batch_sharding(mesh)
    index, count = row_share(mesh) if jax.process_count() > 1 else (0, 1)
    check_rows(count * min((len(value) for value in batch.values()), default=0), mesh)
    for time in {value.shape[1] for value in batch.values()}:
        check_time(time, mesh)

    def placed(value: np.ndarray) -> jax.Array:
        def part(places: Any) -> np.ndarray:
            first = (places[0].start or 0) - index * len(value)
            rows = slice(first, first + len(range(*places[0].indices(count * len(value)))))
            return value[(rows, *places[1:])]

        return jax.make_array_from_callback((count * len(value), *value.shape[1:]), sharding, part)

    return {key: placed(value) for key, value in batch.items()}


def check_rows(rows: int, mesh: Mesh, microbatches: int = 1) -> None:
    """UserError for a global batch that the devices cannot share, in so many parts."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % (shares * microbatches):
        parts = f" in {microbatches} parts" if microbatches > 1 else ""
        raise UserError(
            f"a batch of {rows} rows, which {shares} devices ({' * '.join(BATCH_AXES)}) cannot share{parts}", where="mesh",
            remedy=f"use a batch size that is a multiple of {shares * microbatches}",
        )  # fmt: skip


def check_time(time: int, mesh: Mesh) -> None:
    """UserError for sequences whose time the mesh's context axis cannot share."""
    shares = mesh.shape[CONTEXT_AXIS]
    multiple = models.context_multiple(shares, platform_of(mesh))
    if time % multiple:
        kernels = " (on TPU in blocks of 128 tokens)" if platform_of(mesh) == "tpu" else ""
        raise UserError(
            f"sequences of {time} tokens, which {shares} devices cannot share in two chunks each{kernels}",
            where="mesh.context", remedy=f"use a sequence_length that is a multiple of {multiple}",
        )  # fmt: skip


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler is told for these devices, see `hardware.compiler_options`."""
    return hardware.compiler_options(getattr(mesh.devices.flat[0], "device_kind", ""))


def platform_of(mesh: Mesh) -> str:
    """As jax names it: "cpu", "tpu", "gpu"."""
    return mesh.devices.flat[0].platform


def abstract_params(config: models.ModelConfig, mesh: Mesh) -> Any:
    """The parameters as ShapeDtypeStructs that carry their sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        models.abstract(config),
        param_shardings(config, mesh),
    )
