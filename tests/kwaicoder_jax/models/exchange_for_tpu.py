"""Compiles the exchange and its gradient for four TPU chips, and prints the collectives that were found as JSON."""

import json
import os

from kwaicoder_jax import hardware

os.environ.update(hardware.TPU_ENVIRONMENT)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul.local_experts import OVERFLOW
from kwaicoder_jax.hardware import collectives, hlo
from kwaicoder_jax.models.expert_exchange import exchanged_experts

TOKENS, CHOICES, EXPERTS, WIDTH, NEURONS = 1024, 2, 8, 256, 128


def main() -> None:
    mesh = Mesh(np.asarray(hardware.topology("v5e:2x2").devices).reshape(2, 2), ("fsdp", "expert"))
    tokens, weights, out = P(("fsdp", "expert")), P("expert", "fsdp"), P("expert", None, "fsdp")

    def shape(*sizes, spec=weights, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(x_MD, weight_MX, gate, up, down, expert_MX):
        y_MD = exchanged_experts(
            mesh.abstract_mesh, (weight_MX, expert_MX), x_MD, gate, up, down, rows=768, backend="auto"
        )
        return jnp.sum(jnp.square(y_MD.astype(jnp.float32)))

    arguments = (
        shape(TOKENS, WIDTH, spec=tokens), shape(TOKENS, CHOICES, spec=tokens, dtype=jnp.float32),
        shape(EXPERTS, WIDTH, NEURONS), shape(EXPERTS, WIDTH, NEURONS), shape(EXPERTS, NEURONS, WIDTH, spec=out),
        shape(TOKENS, CHOICES, spec=tokens, dtype=jnp.int32),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments).compile()
    module = hlo.parse(compiled.as_text())
    ragged = [
        [each for each in collectives.find(module, rare=rare) if each.kind == "ragged-all-to-all"]
        for rare in ((), (OVERFLOW,))
    ]
    axes = {axis for each in ragged[0] for axis in each.axes(mesh.axis_names, tuple(mesh.shape.values()))}
    payloads = sorted({each.payload_bytes for each in ragged[0]})
    print(json.dumps({"all": len(ragged[0]), "often": len(ragged[1]), "axes": sorted(axes), "payloads": payloads}))


if __name__ == "__main__":
    main()
