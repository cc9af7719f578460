"""Loads a saved model onto a mesh of simulated devices, and says what came of it."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from kwaicoder_jax import huggingface, models, training


def main() -> None:
    source = huggingface.open_model(pathlib.Path(sys.argv[1]))
    query, asked = "model.layers.0.self_attn.q_proj.weight", []
    weight = source.tensors[query]

    def rows(start, stop):
        asked.append(stop - start)
        return weight.rows(start, stop)

    source.tensors._weights[query] = dataclasses.replace(weight, rows=rows)
    mesh = training.make_mesh(training.MeshConfig(fsdp=4))
    shardings = training.param_shardings(source.config, mesh)
    placed = models.flatten(huggingface.load(source, shardings))
    most = max(asked)
    whole = models.flatten(huggingface.load(source))
    print(json.dumps({
        "devices": jax.device_count(),
        "same_bits": all(np.asarray(placed[n]).tobytes() == np.asarray(x).tobytes() for n, x in whole.items()),
        "placed": all(placed[n].sharding == s for n, s in models.flatten(shardings).items()),
        "query_shard": list(placed["layers/attention/query"].addressable_shards[0].data.shape),
        "most_query_rows": most,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
