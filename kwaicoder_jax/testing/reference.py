"""The same decoder in float64 numpy, one document and one token's experts at a time: slow, plain, written for itself.

It shares no code with `models`, knows no padding and no masks but the causal one, and is what results are held against.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kwaicoder_jax.models import ExpertsConfig, ModelConfig, Router
from kwaicoder_jax.testing.reference_rotary import rotate


def reference_logits(params: Any, config: ModelConfig, batch: Mapping[str, Any]) -> np.ndarray:
    """Logits of every position of every document, float64 [B, T, V]; NaN in the padding.

    Args:
      params: as `config` declares them.
      config: the model.
      batch: "inputs" and "segment_ids" [B, T]; each segment's tokens are in order. Positions are counted, not read.
    """
    inputs_BT, segments_BT = np.asarray(batch["inputs"]), np.asarray(batch["segment_ids"])
    logits_BTV = np.full((*inputs_BT.shape, config.vocab_size), np.nan)
    for row, (inputs_T, segments_T) in enumerate(zip(inputs_BT, segments_BT)):
        for segment in set(segments_T.tolist()) - {0}:
            here = segments_T == segment
            logits_BTV[row, here] = document_logits(params, config, inputs_T[here])
    return logits_BTV


def document_logits(params: Any, config: ModelConfig, tokens_T: np.ndarray) -> np.ndarray:
    """Logits of one document run alone, float64 [T, V]."""
    params = _float64(params)
    x_TD = params["embedding"][tokens_T]
    for layer in range(config.layers):
        dense = layer < config.dense_layers
        p = _layer(params["dense_layers"], layer) if dense else _layer(params["layers"], layer - config.dense_layers)
        attention = _latent_attention if config.mla else _attention
        sees_TT = _visible(len(tokens_T), config.windows[layer] if config.windows else 0)
        normed_TD = _rms_norm(x_TD, p["attention_norm"]["scale"], config.norm_epsilon)
        x_TD = x_TD + attention(p["attention"], config, normed_TD, sees_TT)
        normed_TD = _rms_norm(x_TD, p["mlp_norm"]["scale"], config.norm_epsilon)
        if "moe" in p:
            x_TD = x_TD + np.stack([_mixture(p["moe"], config, x_D) for x_D in normed_TD])
        else:
            x_TD = x_TD + _swiglu(normed_TD, p["mlp"])
    x_TD = _rms_norm(x_TD, params["final_norm"]["scale"], config.norm_epsilon)
    return x_TD @ params.get("head", params["embedding"]).T


def _float64(tree: Any) -> Any:
    return {k: _float64(v) for k, v in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree, np.float64)


def _layer(tree: Any, layer: int) -> Any:
    return {k: _layer(v, layer) for k, v in tree.items()} if isinstance(tree, Mapping) else tree[layer]


def _rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def _visible(time: int, window: int) -> np.ndarray:
    """[query, key]: at or before the query, and among its last `window` if that is not 0."""
    distance_TT = np.subtract.outer(np.arange(time), np.arange(time))
    return (distance_TT >= 0) & (distance_TT < (window or time))


def _softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def _attend(q_TN: np.ndarray, k_TN: np.ndarray, v_TN: np.ndarray, sees_TT: np.ndarray, scale: float) -> np.ndarray:
    return _softmax(np.where(sees_TT, q_TN @ k_TN.T * scale, -np.inf)) @ v_TN


def _attention(p: dict[str, Any], config: ModelConfig, x_TD: np.ndarray, sees_TT: np.ndarray) -> np.ndarray:
    projected = {}
    for name in ("query", "key", "value"):
        x_THN = np.einsum("td,dhn->thn", x_TD, p[name])
        if config.qkv_bias:
            x_THN = x_THN + p[f"{name}_bias"]
        if name != "value" and config.qk_norm == "head":
            x_THN = _rms_norm(x_THN, p[f"{name}_norm"]["scale"], config.norm_epsilon)
        if name != "value" and config.qk_norm == "full":
            flat = x_THN.reshape(len(x_THN), -1), p[f"{name}_norm"]["scale"].reshape(-1)
            x_THN = _rms_norm(*flat, config.norm_epsilon).reshape(x_THN.shape)
        projected[name] = x_THN if config.qkv_clip is None else np.clip(x_THN, -config.qkv_clip, config.qkv_clip)
    out_TD = np.zeros_like(x_TD)
    width = config.rotary_dim or config.head_dim
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads  # the KV head that this query head reads
        q_TN, k_TN = (
            np.hstack([rotate(x_TN[:, :width], config), x_TN[:, width:]])
            for x_TN in (projected["query"][:, head], projected["key"][:, shared])
        )
        mixed_TN = _attend(q_TN, k_TN, projected["value"][:, shared], sees_TT, config.head_dim**-0.5)
        out_TD += mixed_TN @ p["out"][head]
    return out_TD + (p["out_bias"] if config.out_bias else 0.0)


def _latent_attention(p: dict[str, Any], config: ModelConfig, x_TD: np.ndarray, sees_TT: np.ndarray) -> np.ndarray:
    m, scaling = config.mla, config.rope_scaling
    assert m is not None
    down_TJ = x_TD @ p["kv_down"] + (p["kv_down_bias"] if config.qkv_bias else 0.0)
    latent_TR = _rms_norm(down_TJ[:, : m.kv_rank], p["kv_down_norm"]["scale"], m.norm_epsilon)
    k_rope_TP = rotate(down_TJ[:, m.kv_rank :], config)
    if m.q_rank:
        down_TQ = x_TD @ p["query_down"] + (p["query_down_bias"] if config.qkv_bias else 0.0)
        x_TD, query = _rms_norm(down_TQ, p["query_down_norm"]["scale"], m.norm_epsilon), p["query_up"]
    else:
        query = p["query"]
    scale = (m.nope_dim + m.rope_dim) ** -0.5
    if scaling is not None and scaling.mscale_all_dim:
        scale *= (1.0 + 0.1 * scaling.mscale_all_dim * np.log(scaling.factor)) ** 2
    out_TD = np.zeros((len(down_TJ), config.model_dim))
    for head in range(config.heads):
        q_TN, kv_TN = x_TD @ query[:, head], latent_TR @ p["kv_up"][:, head]
        q_TN = np.hstack([q_TN[:, : m.nope_dim], rotate(q_TN[:, m.nope_dim :], config)])
        k_TN = np.hstack([kv_TN[:, : m.nope_dim], k_rope_TP])
        out_TD += _attend(q_TN, k_TN, kv_TN[:, m.nope_dim :], sees_TT, scale) @ p["out"][head]
    return out_TD + (p["out_bias"] if config.out_bias else 0.0)


def _swiglu(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    g = x @ p["gate"] + p.get("gate_bias", 0.0)
    return (g / (1.0 + np.exp(-g)) * (x @ p["up"] + p.get("up_bias", 0.0))) @ p["down"] + p.get("down_bias", 0.0)


def _allowed(score_E: np.ndarray, experts: ExpertsConfig) -> np.ndarray:
    """Whether each expert is in one of the best groups."""
    score_GE = np.sort(score_E.reshape(experts.groups, -1), axis=1)[:, ::-1]
    group_G = score_GE[:, : 1 if experts.group_score == "max" else 2].sum(1)
    best = np.argsort(-group_G, kind="stable")[: experts.top_groups]
    return np.repeat(np.isin(np.arange(experts.groups), best), experts.num_experts // experts.groups)


def _mixture(p: dict[str, Any], config: ModelConfig, x_D: np.ndarray) -> np.ndarray:
    experts = config.experts
    assert experts is not None
    logits_E = x_D @ p["router"]
    sigmoid_E = 1.0 / (1.0 + np.exp(-logits_E))
    score_E = sigmoid_E if experts.router is Router.SIGMOID else _softmax(logits_E)
    ranked_by_E = score_E + (p["router_bias"] if experts.router_bias else 0.0)
    ranked_by_E = np.where(_allowed(ranked_by_E, experts), ranked_by_E, -np.inf)
    chosen = np.argsort(-ranked_by_E, kind="stable")[: experts.experts_per_token]
    weight_E = score_E * experts.routed_scale
    if experts.router is not Router.SOFTMAX_TOPK:
        weight_E = weight_E / score_E[chosen].sum()
    of_experts = {name: array for name, array in p.items() if name.split("_")[0] in ("gate", "up", "down")}
    y_D = sum(weight_E[e] * _swiglu(x_D, _layer(of_experts, e)) for e in chosen)
    if experts.shared_mlp_dim:
        gate = 1.0 / (1.0 + np.exp(-x_D @ p["shared_gate"])) if experts.shared_gate else 1.0
        y_D = y_D + gate * _swiglu(x_D, p["shared"])
    return y_D
