"""Compiles small programs whose work is known on 8 CPU devices, and prints what `hardware` reads in them as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kwaicoder_jax.hardware import collectives, hlo, work

MESH = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))


def text_of(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().as_text()


def spread(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*axes)))


def read(text):
    module = hlo.parse(text)
    found = collectives.find(module)
    names, sizes = MESH.axis_names, tuple(MESH.shape.values())
    return {
        "flops": work.measure(module).flops,
        "hbm": work.measure(module).hbm_bytes,
        "unknown": module.unknown_loops(),
        "collectives": [[c.kind, list(c.axes(names, sizes)), c.times, c.payload_bytes, c.wire_bytes] for c in found],
    }


def loop(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested(x, w):
    return jax.lax.fori_loop(0, 3, lambda _, x: loop(x, w), x)


def collective(function, in_spec, out_spec):
    return jax.shard_map(function, mesh=MESH, in_specs=in_spec, out_specs=out_spec, check_vma=False)


def looped_sum(x):
    return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.psum(x, "data") * 0.5, x)


def main() -> None:
    plain = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shift = [(i, (i + 1) % 4) for i in range(4)]
    programs = {
        "scan": text_of(loop, plain(16, 32), plain(7, 32, 32)),
        "nested": text_of(nested, plain(16, 32), plain(7, 32, 32)),
        "gather": text_of(
            collective(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P()), spread((64, 32), "fsdp")
        ),
        "scatter": text_of(
            collective(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(), P("fsdp")), spread((64, 32))
        ),
        "sum": text_of(collective(looped_sum, P(), P()), spread((64, 32))),
        "both": text_of(collective(lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), P()), spread((64, 32))),
        "ring": text_of(
            collective(lambda x: jax.lax.ppermute(x, "fsdp", shift), P("fsdp"), P("fsdp")), spread((64, 32), "fsdp")
        ),
    }
    print(json.dumps({name: read(text) for name, text in programs.items()}))


if __name__ == "__main__":
    main()
