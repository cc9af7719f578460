"""Mosaic GPU kernels on a CPU: jax's interpret mode, with what jax 0.10.2 lacks in it, products of transposed tiles.

Interpreted are the grid, the loops, copies, barriers and arithmetic of a kernel; not the layout of shared memory (so that
copies at odd rows look right), nor registers.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

PARAMETERS = InterpretGPUParams(uninitialized_memory="nan")

mlir.register_lowering(core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")  # of registers


def _wgmma(
    *, token, device_id, grid_point_coords, thread_id, acc_allocation_key_as_array, acc_transforms, acc_dtype,
    a_allocation_key_as_array, a_transforms, b_allocation_key_as_array, b_transforms, source_info=None,
):  # fmt: skip
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    logging = utils.GPULoggingInfo(
        device_id=int(device_id), grid_point_coords=tuple(map(int, grid_point_coords)), thread_id=int(thread_id),
        source_info=source_info,
    )  # fmt: skip

    def place(key, transforms):
        transforms = gpu_callbacks._remove_noop_transforms(transforms)
        turned = [each for each in transforms if isinstance(each, core.TransposeTransform)]
        assert all(each.permutation == (1, 0) for each in turned)
        assert transforms[len(transforms) - len(turned) :] == tuple(turned), "slices of a transposed tile"
        kept = jax.tree.map(int, transforms[: len(transforms) - len(turned)])
        return gpu_callbacks.HostAllocationKey.from_array(key), utils.to_range(kept), len(turned) % 2 == 1

    def read(key, transforms):
        allocation, part, turned = place(key, transforms)
        content, _, _ = memory.get_buffer_content(allocation, part, thread, logging_info=logging)
        return content.T if turned else content

    a, b = read(a_allocation_key_as_array, a_transforms), read(b_allocation_key_as_array, b_transforms)
    acc = read(acc_allocation_key_as_array, acc_transforms)
    allocation, part, _ = place(acc_allocation_key_as_array, acc_transforms)
    total = acc + np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(acc_dtype)
    memory.store_buffer_content(allocation, part, total, thread, logging_info=logging)
    return token


@contextlib.contextmanager
def whole(monkeypatch):
    """Within, kernels that are given PARAMETERS run."""
    monkeypatch.setattr(gpu_callbacks, "wgmma", _wgmma)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield PARAMETERS


def bfloat16(array):
    """Rounded, as float32: what a kernel sees of an array."""
    return np.array(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))
