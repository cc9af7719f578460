"""One train step of families with unusual parameters on a mesh that uses every axis, held against one device."""

import json

import numpy as np

from kwaicoder_jax import models, testing
from kwaicoder_jax.training import MeshConfig
from tests.kwaicoder_jax.training.mesh_variants import step_on

# Every size that a mesh axis shares is even.
SIZES = {"vocab_size": 94, "heads": 4, "mlp_dim": 44}
EXPERTS = models.ExpertsConfig(
    8, 2, 14, "sigmoid", 2.5, router_bias=True, shared_mlp_dim=10, groups=4, top_groups=2, group_score="top2"
)
CONFIGS = {
    "latent": testing.dense_config(
        **SIZES, layers=2, dense_layers=1, kv_heads=4, head_dim=10, mla=models.MlaConfig(11, 9, 4, 6, 7), experts=EXPERTS
    ),
    "biased": testing.dense_config(
        **SIZES, layers=1, experts=models.ExpertsConfig(6, 2, 14, bias=True), qkv_bias=True, out_bias=True, mlp_bias=True,
        qk_norm="full", windows=(5,),
    ),
}  # fmt: skip


def main() -> None:
    errors = {}
    for name, config in CONFIGS.items():
        one = step_on(config, MeshConfig(data=1))
        for last in ({"tensor": 2}, {"context": 2}):
            other = step_on(config, MeshConfig(data=1, fsdp=2, expert=2, **last))
            for kind, got, expected in zip(("metrics", "gradients"), other, one):
                for key in expected:
                    size = max(float(np.max(np.abs(expected[key]))), 1e-6)  # a selection bias has no gradient
                    errors[f"{name} {last} {kind} {key}"] = float(np.max(np.abs(got[key] - expected[key]))) / size
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
