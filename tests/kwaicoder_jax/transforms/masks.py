"""The full model with what pruning drops put to zero, made without the transforms: what a sliced model has to equal."""

import dataclasses

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.transforms import Scores

Kept = dict[str, np.ndarray]  # "layers" [L'], "embed" [D'], and of every layer of the *full* model "heads" [L, H'], ...


def draw(rng: np.random.Generator, config: models.ModelConfig, sizes: dict[str, int]) -> Kept:
    """Random units of each kind that `sizes` shortens; heads and KV groups so that grouped-query attention stays."""

    def choose(count: int, of: int) -> np.ndarray:
        return np.sort(rng.permutation(of)[:count])

    L, H, K = config.layers, config.heads, config.kv_heads
    to_K, to_H = sizes.get("kv_heads", K), sizes.get("heads", H)
    kept: Kept = {"layers": choose(sizes.get("layers", L), L)}
    kept["embed"] = choose(sizes.get("model_dim", config.model_dim), config.model_dim)
    kept["kv_heads"] = np.stack([choose(to_K, K) for _ in range(L)])
    per_group = H // K
    kept["heads"] = np.stack(
        [
            np.concatenate([k * per_group + choose(to_H // to_K, per_group) for k in groups])
            for groups in kept["kv_heads"]
        ]
    )
    widths = {"mlp": ("mlp_dim", config.mlp_dim)}
    if e := config.experts:
        widths = {"experts": ("experts", e.num_experts), "shared_mlp": ("shared_dim", e.shared_mlp_dim)}
        neurons = [
            [choose(sizes.get("expert_dim", e.mlp_dim), e.mlp_dim) for _ in range(e.num_experts)] for _ in range(L)
        ]
        kept["expert_mlp"] = np.asarray(neurons)
    for axis, (field, have) in widths.items():
        kept[axis] = np.stack([choose(sizes.get(field, have), have) for _ in range(L)])
    return kept


def scores_of(rng: np.random.Generator, config: models.ModelConfig, kept: Kept) -> Scores:
    """Scores that make pruning keep exactly `kept`, in no particular order otherwise; all energy in kept channels."""

    def high(index: np.ndarray, size: int) -> np.ndarray:
        values = rng.uniform(0.1, 0.4, (*index.shape[:-1], size))
        np.put_along_axis(values, index, rng.uniform(0.6, 0.9, index.shape), axis=-1)
        return values

    L, D, e = config.layers, config.model_dim, config.experts
    share_D = np.isin(np.arange(D), kept["embed"]) / len(kept["embed"])
    given = {
        "heads_LH": high(kept["heads"], config.heads), "groups_LK": high(kept["kv_heads"], config.kv_heads),
        "channels_D": high(kept["embed"], D), "layers_L": high(kept["layers"], L),
        "attention_norm_LD": np.tile(share_D, (L, 1)), "mlp_norm_LD": np.tile(share_D, (L, 1)), "final_norm_D": share_D,
        "neurons_LF": None if e else high(kept["mlp"], config.mlp_dim),
    }  # fmt: skip
    if e:
        given["experts_LE"] = high(kept["experts"], e.num_experts)
        given["expert_neurons_LEF"] = high(kept["expert_mlp"], e.mlp_dim)
        given["shared_neurons_LS"] = high(kept["shared_mlp"], e.shared_mlp_dim) if e.shared_mlp_dim else None
    return Scores(**given, tokens=1, sequences=1, aggregation={})


def masked(params: models.Params, config: models.ModelConfig, kept: Kept) -> models.Params:
    """`params` (float64) with the outgoing weights of every unit that is not in `kept` at zero.

    Dropped channels are zero wherever something is written to them; dropped experts are not handled here.
    """
    flat = {name: np.array(x) for name, x in models.flatten(params).items()}
    outgoing = {"layers/attention/out": "heads", "layers/mlp/down": "mlp", "layers/moe/shared/down": "shared_mlp"}
    for name, axis in outgoing.items():
        for layer in range(config.layers) if name in flat else ():
            gone = np.setdiff1d(np.arange(flat[name].shape[1]), kept[axis][layer])
            flat[name][layer, gone] = 0
    if "layers/moe/down" in flat:
        for layer, expert in np.ndindex(kept["expert_mlp"].shape[:2]):
            gone = np.setdiff1d(np.arange(config.experts.mlp_dim), kept["expert_mlp"][layer, expert])
            flat["layers/moe/down"][layer, expert, gone] = 0
    writing = ("/out", "/down", "/out_bias", "/down_bias")
    for name in flat:
        if name.endswith(writing):
            flat[name][np.setdiff1d(np.arange(config.layers), kept["layers"])] = 0
        if name.endswith((*writing, "embedding")):
            flat[name][..., np.setdiff1d(np.arange(config.model_dim), kept["embed"])] = 0
    return models.unflatten(flat)


def permute(scores: Scores, **changes: np.ndarray | None) -> Scores:
    """A copy of the scores with some of them changed."""
    return dataclasses.replace(scores, **changes)
