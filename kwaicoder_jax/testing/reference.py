"""The same decoder in float64 numpy, one document and one token's experts at a time: slow, plain, written for itself.

It shares no code with `models`, knows no padding and no masks but the causal one, and is what results are held against.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kwaicoder_jax.models import ModelConfig, Router


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
        p = _layer(params["layers"], layer)
        x_TD = x_TD + _attention(p["attention"], config, _rms_norm(x_TD, p["attention_norm"]["scale"], config))
        normed_TD = _rms_norm(x_TD, p["mlp_norm"]["scale"], config)
        if config.experts is None:
            x_TD = x_TD + _swiglu(normed_TD, **p["mlp"])
        else:
            x_TD = x_TD + np.stack([_mixture(p["moe"], config, x_D) for x_D in normed_TD])
    return _rms_norm(x_TD, params["final_norm"]["scale"], config) @ params.get("head", params["embedding"]).T


def _float64(tree: Any) -> Any:
    return {k: _float64(v) for k, v in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree, np.float64)


def _layer(tree: Any, layer: int) -> Any:
    return {k: _layer(v, layer) for k, v in tree.items()} if isinstance(tree, Mapping) else tree[layer]


def _rms_norm(x_TD: np.ndarray, scale_D: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale_D


def _rotate(x_TN: np.ndarray, theta: float) -> np.ndarray:
    """The pair (i, i + N/2) as one complex number, turned by position * theta^(-2i/N)."""
    time, width = x_TN.shape
    angle_TP = np.outer(np.arange(time), theta ** (-2.0 * np.arange(width // 2) / width))
    turned_TP = (x_TN[:, : width // 2] + 1j * x_TN[:, width // 2 :]) * np.exp(1j * angle_TP)
    return np.concatenate([turned_TP.real, turned_TP.imag], axis=-1)


def _attention(p: dict[str, np.ndarray], config: ModelConfig, x_TD: np.ndarray) -> np.ndarray:
    out_TD = np.zeros_like(x_TD)
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads  # the KV head that this query head reads
        q_TN = _rotate(x_TD @ p["query"][:, head], config.rope_theta)
        k_TN = _rotate(x_TD @ p["key"][:, shared], config.rope_theta)
        scores_TT = np.where(np.tri(len(x_TD), dtype=bool), q_TN @ k_TN.T / np.sqrt(config.head_dim), -np.inf)
        weights_TT = np.exp(scores_TT - scores_TT.max(-1, keepdims=True))
        weights_TT /= weights_TT.sum(-1, keepdims=True)
        out_TD += weights_TT @ (x_TD @ p["value"][:, shared]) @ p["out"][head]
    return out_TD


def _swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = x @ gate
    return (g / (1.0 + np.exp(-g)) * (x @ up)) @ down


def _mixture(p: dict[str, Any], config: ModelConfig, x_D: np.ndarray) -> np.ndarray:
    experts = config.experts
    assert experts is not None
    logits_E = x_D @ p["router"]
    exp_E, sigmoid_E = np.exp(logits_E - logits_E.max()), 1.0 / (1.0 + np.exp(-logits_E))
    ranked_by_E = sigmoid_E + p["router_bias"] if experts.router_bias else logits_E
    chosen = np.argsort(-ranked_by_E, kind="stable")[: experts.experts_per_token]
    if experts.router in (Router.TOPK_SOFTMAX, Router.SOFTMAX_TOPK_RENORMALISED):
        weight_E = exp_E / exp_E[chosen].sum()
    elif experts.router is Router.SOFTMAX_TOPK:
        weight_E = exp_E / exp_E.sum()
    else:
        weight_E = experts.routed_scale * sigmoid_E / sigmoid_E[chosen].sum()
    y_D = sum(weight_E[e] * _swiglu(x_D, p["gate"][e], p["up"][e], p["down"][e]) for e in chosen)
    if experts.shared_mlp_dim:
        gate = 1.0 / (1.0 + np.exp(-x_D @ p["shared_gate"])) if experts.shared_gate else 1.0
        y_D = y_D + gate * _swiglu(x_D, *(p["shared"][name] for name in ("gate", "up", "down")))
    return y_D
