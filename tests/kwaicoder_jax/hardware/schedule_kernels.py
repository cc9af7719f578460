"""Small Pallas kernels whose loops and copies can be counted by hand."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ANY = pl.BlockSpec(memory_space=pl.ANY)
ROWS, WIDTH = 4096, 512


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(x, y, semantics=("parallel", "parallel", "arbitrary")):
    """Square, 2048 wide, in 4 x 2 x 4 steps."""

    def kernel(x, y, out, sum_):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sum_[...] = jnp.zeros_like(sum_)

        sum_[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == 3)
        def _():
            out[...] = sum_[...].astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(4, 2, 4),
        out_shape=array(2048, 2048),
        in_specs=[pl.BlockSpec((512, 512), lambda i, j, k: (i, k)), pl.BlockSpec((512, 1024), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((512, 1024), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((512, 1024), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        name="matmul",
    )(x, y)


def _call(kernel, arguments, *, prefetch=0, out=(ROWS, WIDTH), scratch):
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=prefetch,
        grid=(1,),
        in_specs=[ANY] * (len(arguments) - prefetch),
        out_specs=ANY,
        scratch_shapes=scratch,
    )
    return pl.pallas_call(kernel, out_shape=array(*out), grid_spec=spec, name=kernel.__name__)(*arguments)


def _copy(source, target, semaphore):
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    return copy


def groups(x, sizes):
    """Copies each group of rows in and out, in one copy of its size."""

    def rows_of_groups(sizes, x, out, buffer, semaphores):
        def group(index, start):
            start, size = pl.multiple_of(start, 16), pl.multiple_of(sizes[index], 16)
            _copy(x.at[pl.ds(start, size)], buffer.at[pl.ds(0, size)], semaphores.at[0]).wait()
            _copy(buffer.at[pl.ds(0, size)], out.at[pl.ds(start, size)], semaphores.at[1]).wait()
            return start + size

        lax.fori_loop(0, 8, group, 0)

    return _call(
        rows_of_groups,
        (sizes, x),
        prefetch=1,
        scratch=[pltpu.VMEM((ROWS, WIDTH), jnp.bfloat16), pltpu.SemaphoreType.DMA((2,))],
    )


def chain(x, table):
    """Follows a table until its first negative entry; two thirds of what it summed is how often it copies out."""

    def follow(table, x, out, buffer, entries, semaphores):
        _copy(table, entries, semaphores.at[0]).wait()

        def step(carry):
            place, total = carry
            rows = pl.ds(pl.multiple_of(entries[place] * 16, 16), 16)
            _copy(x.at[rows], buffer, semaphores.at[1]).wait()
            return place + 1, total + lax.rem(entries[place], 7)

        _, total = lax.while_loop(lambda carry: entries[carry[0]] >= 0, step, (0, 0))

        @pl.loop(0, total * 2 // 3)
        def _(place):
            @pl.when(place % 2 == 0)
            def _():
                _copy(buffer, out.at[pl.ds(0, 16)], semaphores.at[1]).wait()

    scratch = [pltpu.VMEM((16, WIDTH), jnp.bfloat16), pltpu.SMEM((1024,), jnp.int32), pltpu.SemaphoreType.DMA((2,))]
    return _call(follow, (table, x), scratch=scratch)


def through_hbm(x):
    """One copy inside of HBM."""

    def inside_of_hbm(x, out, semaphore):
        _copy(x, out, semaphore).wait()

    return _call(inside_of_hbm, (x,), scratch=[pltpu.SemaphoreType.DMA])


def piped(x, counts):
    """An inner pipeline over as many blocks as a table of two dimensions says."""

    def pipeline(counts, x, out):
        def double(x, out):
            out[...] = x[...] * 2

        block = pl.BlockSpec((256, WIDTH), lambda i: (i, 0))
        pltpu.emit_pipeline(double, grid=(counts[9, 2],), in_specs=[block], out_specs=[block])(x, out)

    return _call(pipeline, (counts, x), prefetch=1, scratch=[])


def stuck(x):
    """Waits for a copy that nobody starts."""

    def never(x, out, buffer, semaphore):
        pltpu.make_async_copy(x.at[pl.ds(0, 16)], buffer, semaphore).wait()
        _copy(buffer, out.at[pl.ds(0, 16)], semaphore).wait()

    return _call(never, (x,), scratch=[pltpu.VMEM((16, WIDTH), jnp.bfloat16), pltpu.SemaphoreType.DMA])


def hasty(x):
    """Does not wait for its last copy."""

    def unawaited(x, out, buffer, semaphores):
        _copy(x.at[pl.ds(0, 16)], buffer, semaphores.at[0]).wait()
        _copy(buffer, out.at[pl.ds(0, 16)], semaphores.at[1])

    return _call(unawaited, (x,), scratch=[pltpu.VMEM((16, WIDTH), jnp.bfloat16), pltpu.SemaphoreType.DMA((2,))])


def one_core(x, sizes, table, counts):
    """All of those that use one core."""
    return (
        groups(x, sizes), chain(x, table), through_hbm(x), piped(x, counts), stuck(x), hasty(x),
    )  # fmt: skip


ONE_CORE = (
    array(ROWS, WIDTH), array(8, dtype=jnp.int32), array(1024, dtype=jnp.int32), array(10, 3, dtype=jnp.int32),
)  # fmt: skip


def both_cores(x):
    """A mesh of two cores: each copies its half in pieces of 64 rows, and signals the other one between them."""
    mesh = pltpu.create_tensorcore_mesh("core", num_cores=2)

    def in_turns(x, out, buffer, semaphore, ready):
        core = lax.axis_index("core")

        def step(piece, _):
            rows = pl.ds(core * (ROWS // 2) + piece * 64, 64)
            _copy(x.at[rows], buffer, semaphore).wait()
            pl.semaphore_signal(ready, 1, core_index=1 - core)
            pl.semaphore_wait(ready, 1)
            _copy(buffer, out.at[rows], semaphore).wait()
            return 0

        lax.fori_loop(0, 16, step, 0)

    scratch = [pltpu.VMEM((64, WIDTH), jnp.bfloat16), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR]
    return pl.kernel(in_turns, out_type=array(ROWS, WIDTH), mesh=mesh, name="in_turns", scratch_types=scratch)(x)


def on_v5p(x, y, z):
    """With a dimension of the grid that may be split, without one, and with a mesh."""
    sequential = functools.partial(matmul, semantics=("arbitrary",) * 3)
    return jax.jit(matmul)(x, y), jax.jit(sequential)(y, x), both_cores(z)
