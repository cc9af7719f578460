"""Machines that are not here: the devices of a named topology, for which programs can be compiled on any computer.

    TPU   v5p:4x4x4, v5e:16x16     libtpu has to be installed
    GPU   h100:8, h100:8x8         of 8 GPUs a host; the CUDA plugin of jax has to be installed

libtpu asks the environment where it is before anything else; see `TPU_ENVIRONMENT`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental import topologies

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.chips import Chip, chip, chip_of

# What a process without a TPU has to set before libtpu is loaded.
TPU_ENVIRONMENT: Mapping[str, str] = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
HOST_GPUS = 8
_CUBE = 4  # a 3D torus is made of cubes, and its axes of whole cubes are rings
_RING_2D = 16  # of the 2D machines only the whole length of a pod is a ring


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: as in "v5p:4x4x4".
      chip: what it is made of.
      devices: of jax, to make a mesh of.
      shape: of the torus, or hosts times GPUs.
      rings: whether each axis of it closes.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    shape: tuple[int, ...]
    rings: tuple[bool, ...]

    def bandwidth(self, members: Sequence[Any], *, pairwise: bool = False) -> float:
        """Bytes per second that each of these devices can send in a collective among them.

        On a torus: the links of the axes along which they differ, half of them where such an axis is no ring. On GPUs a ring
        enters a host once, and NCCL makes as many rings as a host has members, each through the network of another one.

        Args:
          members: devices of jax.
          pairwise: whether every device has other bytes for each other one (all-to-all), which pass by those between:
            of L devices along an axis a quarter of all bytes crosses its middle in each direction, by two links where
            it is a ring, so that what each sends takes L/4 times as long as on its own links.
        """
        if not self.chip.torus_axes:
            hosts = {device.process_index for device in members}
            network = self.chip.network_bandwidth * len(members) / len(hosts)
            return self.chip.link_bandwidth if len(hosts) == 1 else min(self.chip.link_bandwidth, network)
        places = [device.coords for device in members]
        total, slowest = 0.0, 0.0
        for axis in range(min(len(self.shape), self.chip.torus_axes)):
            along = {place[axis] for place in places}
            if len(along) > 1:
                closed = self.rings[axis] and len(along) == self.shape[axis]
                here = self.chip.link_bandwidth / self.chip.torus_axes * (1.0 if closed else 0.5)
                total, slowest = total + here, max(slowest, len(along) / 4 / here)
        if pairwise and slowest:
            return (len(members) - 1) / len(members) / slowest
        return total or self.chip.link_bandwidth


def topology(name: str, where: str = "--topology") -> Topology:
    """The machine called `name`; UserError if there is no such machine or its compiler is not installed."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f"{name!r} is no topology", where=where, remedy="use CHIP:SHAPE, as in v5p:4x4x4 or h100:8x8")
    kind, shape = chip(found.group(1), where), tuple(int(size) for size in found.group(2).split("x"))
    if not kind.torus_axes:
        return _gpus(name, kind, shape, where)
    if len(shape) != kind.torus_axes:
        remedy = f"as in {kind.name}:{'x'.join('4' * kind.torus_axes)}"
        raise UserError(f"{kind.name} is a torus of {kind.torus_axes} axes", where=where, remedy=remedy)
    rings = tuple(size % _CUBE == 0 if kind.torus_axes == 3 else size == _RING_2D for size in shape)
    try:
        # Without `wrap` the compiler takes the torus for a grid, and writes gathers over it as all-reduces.
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, wrap=(*rings, *(False for _ in range(3 - len(rings))))
        )
    except Exception as error:  # whatever libtpu says of a shape that it does not know
        what = f"the TPU compiler does not know it: {str(error).splitlines()[0]}"
        raise UserError(what, where=where, remedy="install libtpu, and name a slice that exists") from error
    return Topology(name, kind, described.devices, shape, rings)


def compiler_options(device_kind: str) -> dict[str, str]:
    """Options for `jit` on devices that jax calls so: collectives run beside the arithmetic, gradients are scattered.

    On v5p the SparseCores move the data. Without them the compiler of libtpu 0.0.42 writes a reduce-scatter over a whole
    torus as an all-reduce and a slice, and waits for every gather.

    On GPUs the scheduler starts one collective after the other unless it is told that several may run at a time, and what
    it has combined into one has to wait for the last of its parts: a fifth of the bytes is behind products then.
    """
    kind = chip_of(device_kind)
    if kind is None:
        return {}
    if not kind.torus_axes:
        return {
            "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
            "xla_gpu_all_gather_combine_threshold_bytes": str(2**25),  # scales of norms, not matrices of experts
            "xla_gpu_reduce_scatter_combine_threshold_bytes": "0",
        }
    if kind.name == "v5p":
        kinds = (
            "all_gather",
            "reduce_scatter",
            "all_reduce",
            "2d_all_gather",
            "3d_all_gather",
            "nd_reduce_scatter",
        )
        return {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true" for kind in kinds}
    return {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    }


def _gpus(name: str, kind: Chip, shape: tuple[int, ...], where: str) -> Topology:
    if len(shape) > 2 or (shape[-1] != HOST_GPUS and len(shape) == 2):
        raise UserError(f"{name}: {HOST_GPUS} GPUs a host", where=where, remedy="as in h100:8 or h100:8x8")
    hosts, gpus = (1, shape[0]) if len(shape) == 1 else shape
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind.name, target_config=_H100, topology=f"{hosts}x1x{gpus}"
        )
    except Exception as error:
        what = f"the GPU compiler is not here: {str(error).splitlines()[0]}"
        remedy = "pip install jax-cuda13-plugin and jax-cuda13-pjrt of jax's version"
        raise UserError(what, where=where, remedy=remedy) from error
    assert len(described.devices) == math.prod(shape)
    return Topology(name, kind, described.devices, (hosts, gpus), (False, False))


_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } registers_per_core_limit: 65536
registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3" """
