"""A quantised train step on several meshes, held against one device; prints the largest relative errors as JSON."""

import dataclasses
import json

from kwaicoder_jax import models
from kwaicoder_jax.training import MeshConfig
from tests.kwaicoder_jax.training import mesh_variants

SHARED = mesh_variants.DENSE.replace(experts=models.ExpertsConfig(6, 2, 24, shared_mlp_dim=20))
INT8 = models.Runtime(quantization="int8", quantize_gradients=True, remat="projections")
CASES = {
    "int8": (SHARED, INT8),
    "fp8": (mesh_variants.DENSE, dataclasses.replace(INT8, quantization="fp8")),
}


def main() -> None:
    result = {}
    for name, (config, runtime) in CASES.items():
        one = mesh_variants.step_on(config, MeshConfig(data=1), runtime)
        other = mesh_variants.step_on(config, MeshConfig(data=1, fsdp=2, tensor=2), runtime)
        result[name] = [mesh_variants.worst(a, b) for a, b in zip(other, one)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
