"""The model once more, in float64 numpy, token loops and all: what the transforms' tests compare with."""

import numpy as np

from kwaicoder_jax import models


def float64(params):
    """The same parameters as float64 numpy arrays."""
    return models.unflatten({name: np.asarray(x, np.float64) for name, x in models.flatten(params).items()})


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon) * scale


def rotary(x_BTHN, positions_BT, theta):
    half = x_BTHN.shape[-1] // 2
    angle = positions_BT[:, :, None] * theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[:, :, None, :]
    turned = (x_BTHN[..., :half] + 1j * x_BTHN[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def attention(x_BTD, p, config, batch):
    """Output [B, T, D] and every head's output before the output projection [B, T, H, N]."""
    q, k, v = (np.einsum("btd,dhn->bthn", x_BTD, p[name]) for name in ("query", "key", "value"))
    q, k = (rotary(x, batch["positions"], config.rope_theta) for x in (q, k))
    segments, positions = batch["segment_ids"], batch["positions"]
    visible = (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])
    mixed = np.zeros_like(q)
    for h in range(q.shape[2]):
        group = h // (q.shape[2] // k.shape[2])
        s = np.einsum("btn,bsn->bts", q[:, :, h], k[:, :, group]) / np.sqrt(q.shape[-1])
        mixed[:, :, h] = softmax(np.where(visible, s, -1e30)) @ v[:, :, group]
    return np.einsum("bthn,hnd->btd", mixed, p["out"]), mixed


def dense_mlp(x, p):
    """Output and the activations entering the down projection."""
    a = silu(x @ p["gate"]) * (x @ p["up"])
    return a @ p["down"], a


def chosen_experts(token, p, experts):
    """The (combine weight, expert) pairs of one token."""
    logits = token @ p["router"]
    ranked_by = 1 / (1 + np.exp(-logits)) + p["router_bias"] if experts.router_bias else logits
    chosen = np.argsort(-ranked_by, kind="stable")[: experts.experts_per_token]
    if experts.router in ("topk_softmax", "softmax_topk_renormalised"):
        weights = softmax(logits[chosen])
    elif experts.router == "softmax_topk":
        weights = softmax(logits)[chosen]
    else:
        weights = 1 / (1 + np.exp(-logits[chosen]))
        weights = experts.routed_scale * weights / np.sum(weights)
    return list(zip(weights, chosen))


def expert(p, e):
    return {name: p[name][e] for name in ("gate", "up", "down")}


def moe(x, p, experts):
    """The mixture, one token and one expert at a time."""
    flat, y = x.reshape(-1, x.shape[-1]), np.zeros((x.size // x.shape[-1], x.shape[-1]))
    for m, token in enumerate(flat):
        for weight, e in chosen_experts(token, p, experts):
            y[m] += weight * dense_mlp(token, expert(p, e))[0]
        if experts.shared_mlp_dim:
            gate = 1 / (1 + np.exp(-token @ p["shared_gate"])) if experts.shared_gate else 1.0
            y[m] += gate * dense_mlp(token, p["shared"])[0]
    return y.reshape(x.shape)


def moe_activations(x, p, experts):
    """ "expert_neurons" [B, T, E, F] (NaN where a token did not choose the expert), "experts" [B, T, E] (norm of the
    weighted output, 0 there) and "shared_neurons" [B, T, S]."""
    count, width = p["gate"].shape[0], p["gate"].shape[-1]
    raw = {"expert_neurons": np.full((*x.shape[:2], count, width), np.nan), "experts": np.zeros((*x.shape[:2], count))}
    for here in np.ndindex(x.shape[:2]):
        for weight, e in chosen_experts(x[here], p, experts):
            out, raw["expert_neurons"][here][e] = dense_mlp(x[here], expert(p, e))
            raw["experts"][here][e] = np.linalg.norm(weight * out)
    if experts.shared_mlp_dim:
        raw["shared_neurons"] = dense_mlp(x, p["shared"])[1]
    return raw


def forward(params, config, batch):
    """Final hidden states, logits, and per layer the raw activations that the scores are made of."""
    p = float64(params)
    x = p["embedding"][batch["inputs"]]
    layers = []
    for i in range(config.layers):
        layer = models.unflatten({name: value[i] for name, value in models.flatten(p["layers"]).items()})
        raw = {"attention_norm_in": x}
        raw["attention_norm_out"] = rms_norm(x, layer["attention_norm"]["scale"], config.norm_epsilon)
        mixed, raw["heads"] = attention(raw["attention_norm_out"], layer["attention"], config, batch)
        parts = np.einsum("bthn,hnd->bthd", raw["heads"], layer["attention"]["out"])
        by_group = parts.reshape(*x.shape[:2], config.kv_heads, -1, config.model_dim).sum(3)
        raw["groups"] = np.linalg.norm(by_group, axis=-1)
        h = x + mixed
        raw["mlp_norm_in"] = h
        raw["mlp_norm_out"] = rms_norm(h, layer["mlp_norm"]["scale"], config.norm_epsilon)
        if config.experts is None:
            y, raw["neurons"] = dense_mlp(raw["mlp_norm_out"], layer["mlp"])
        else:
            y = moe(raw["mlp_norm_out"], layer["moe"], config.experts)
            raw |= moe_activations(raw["mlp_norm_out"], layer["moe"], config.experts)
        raw["in"], raw["out"] = x, h + y
        x = h + y
        layers.append(raw)
    hidden = rms_norm(x, p["final_norm"]["scale"], config.norm_epsilon)
    return {"hidden": hidden, "logits": hidden @ models.projection(p).T, "layers": layers, "final_norm_in": x}


def relative(value, expected):
    """Largest difference over largest expected magnitude."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(value - expected)) / np.max(np.abs(expected)))
