"""Raw activations of the float64 reference as sequences without padding, and the recipe's reductions of them."""

import numpy as np

from . import reference


def of(params, config, batches):
    """{name: [layer][sequence] -> [tokens, U...]}; the final norm's have one "layer". Needs B >= 1 rows with a token."""
    outputs = [reference.forward(params, config, batch) for batch in batches]

    def sequences(values):
        pairs = [(row, kept) for x, b in zip(values, batches) for row, kept in zip(x, b["segment_ids"] > 0)]
        return [row[kept] for row, kept in pairs if kept.any()]

    names = outputs[0]["layers"][0]
    raw = {n: [sequences([o["layers"][i][n] for o in outputs]) for i in range(config.layers)] for n in names}
    raw["final_norm_in"] = [sequences([o["final_norm_in"] for o in outputs])]
    raw["final_norm_out"] = [sequences([o["hidden"] for o in outputs])]
    raw["heads"] = [[np.linalg.norm(x, axis=-1) for x in layer] for layer in raw["heads"]]
    return raw


def statistic(values, kind, axis=0):
    """Mean, root of the sum of squares, or population variance; NaN does not count, and of nothing it is zero."""
    none = ~np.any(np.isfinite(values), axis=axis, keepdims=True)
    values = np.where(none, 0.0, values)
    if kind == "l2":
        return np.sqrt(np.nansum(values**2, axis=axis))
    return {"mean": np.nanmean, "var": np.nanvar}[kind](values, axis=axis)


def aggregate(sequences, batch, sequence):
    """One score per unit from the sequences of one layer."""
    return statistic(np.stack([statistic(np.abs(x), sequence) for x in sequences]), batch)


def over_layers(layers, batch, sequence):
    """The same for every layer: [L, U...]."""
    return np.stack([aggregate(layer, batch, sequence) for layer in layers])


def energy_share(sequences):
    """Mean over tokens of each unit's share of the energy."""
    square = np.square(np.concatenate(sequences))
    return np.mean(square / square.sum(-1, keepdims=True), axis=0)


def influence(before, after):
    """Mean over tokens of 1 - cos."""
    a, b = np.concatenate(before), np.concatenate(after)
    return np.mean(1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
