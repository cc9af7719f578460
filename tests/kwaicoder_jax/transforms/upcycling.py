"""Requests that the tests of upcycling share: every choice at least once."""

import dataclasses

import numpy as np

from kwaicoder_jax import testing
from kwaicoder_jax.transforms import Scores
from kwaicoder_jax.transforms.coactivation import CoActivation

CONFIG = testing.dense_config(layers=2)


def scores_of(config=CONFIG):
    """Random scores of every unit of a dense model."""
    rng = np.random.default_rng(0)
    sizes = {"L": config.layers, "D": config.model_dim, "F": config.mlp_dim, "H": config.heads, "K": config.kv_heads}
    names = [field.name for field in dataclasses.fields(Scores) if field.default is dataclasses.MISSING]
    arrays = {name: rng.uniform(0.1, 1, [sizes[x] for x in name.rsplit("_", 1)[1]]) for name in names if "_" in name}
    return Scores(**arrays, tokens=1, sequences=1, aggregation={})


def coactivation_of(config=CONFIG):
    fires_LMF = np.random.default_rng(1).uniform(size=(config.layers, 80, config.mlp_dim)) < 0.2
    joint_LFF = np.einsum("lmf,lmg->lfg", fires_LMF, fires_LMF, dtype=np.float32)
    return CoActivation(joint_LFF, None, None, fires_LMF.sum(1, dtype=np.float32), 80)


def inputs_of(config=CONFIG):
    return np.random.default_rng(2).standard_normal((config.layers, 30, config.model_dim)).astype(np.float32)


SCORES, COACTIVATION, INPUTS = scores_of(), coactivation_of(), inputs_of()

# for granularity 4 and 3 replicas
LOSSLESS = {
    "default": {},
    "two_replicas": {"top_replicas": 2},
    "whole_replicas": {"experts_per_token": 8},
    "down": {"scale_placement": "down"},
    "up": {"scale_placement": "up", "top_replicas": 2},
    "renormalised": {"router": "softmax_topk_renormalised", "top_replicas": 2},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid_scaled": {"router": "sigmoid", "routed_scale": 2.5, "top_replicas": 2},
    "sigmoid_bias": {"router": "sigmoid", "routed_scale": 2.5, "router_bias": True, "scale_placement": "down"},
    "all_experts": {"router": "softmax_topk", "top_replicas": 3},  # the weights sum to 1 after all
    "zeros": {"router_init": "zeros", "top_replicas": 2},
    "orthogonal": {"router_init": "orthogonal"},
    "centroids": {"router_init": "centroids", "mlp_inputs": INPUTS},
    "balanced": {"partition": "balanced", "scores": SCORES},
    "balanced_per_replica": {"partition": "balanced_per_replica", "scores": SCORES, "top_replicas": 2},
    "random": {"partition": "random"},
    "random_per_replica": {"partition": "random_per_replica", "top_replicas": 2},
    "coactivation": {"partition": "coactivation", "coactivation": COACTIVATION},
    "free_diversity": {
        "partition": "contiguous,coactivation,balanced", "coactivation": COACTIVATION, "scores": SCORES,
        "top_replicas": 2,
    },
    "shared": {"shared_neurons": 8, "scores": SCORES, "scale_placement": "down"},
    "shared_gate": {
        "shared_neurons": 12, "shared_gate": True, "scores": SCORES, "partition": "random_per_replica",
        "router": "sigmoid", "router_bias": True, "routed_scale": 2.5, "top_replicas": 2,
    },
    "shared_gate_clusters": {
        "shared_neurons": 4, "shared_gate": True, "scores": SCORES, "partition": "coactivation",
        "coactivation": COACTIVATION, "scale_placement": "up",
    },
}  # fmt: skip

# what is wrong, the field that the error names, the remedy
LOSSY = {
    "part_of_a_replica": ({"experts_per_token": 6}, "experts_per_token", "multiple of 4"),
    "not_normalised": ({"router": "softmax_topk"}, "router", "topk_softmax"),
    "cube_root": ({"scale_placement": "cube_root"}, "scale_placement", "balanced"),
    "dropped": ({"drop_ratio": 0.5}, "drop_ratio", "use 0"),
    "one_dropped": ({"drop_ratio": 0.25, "drop_replicas": [1]}, "drop_ratio", "use 0"),
    "gate_without_factor": (
        {"shared_neurons": 8, "shared_gate": True, "shared_scale": 1.0, "scores": SCORES}, "shared_scale", "use 2.0",
    ),
    "factor_without_gate": ({"shared_neurons": 8, "shared_scale": 2.0, "scores": SCORES}, "shared_scale", "use 1.0"),
}  # fmt: skip
