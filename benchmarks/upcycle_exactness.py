"""How exact a merge is: largest relative logit error of a mixture against the dense model that it was made from.

    python -m benchmarks.upcycle_exactness [--json=FILE] [--granularities=1,2,4,8] [--dtypes=float32,bfloat16]

A dense model of trained scale (random weights, logits that spread by 3 nats, 4 layers), turned into 4 replicas of which a
token uses 2, for every router, on 512 tokens of packed rows. The two rows at the end of each data type are controls:
softmax that is not renormalised, and the cube root of the factor on all three matrices. The row "dense" is the rounding
of the data type itself: the dense model in it against the dense model in float32.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import numpy as np

from kwaicoder_jax import models, testing
from kwaicoder_jax.transforms import upcycle, verify

CONFIG = models.ModelConfig(
    vocab_size=512, layers=4, model_dim=128, heads=4, kv_heads=2, head_dim=32, mlp_dim=384, tie_embeddings=False
)
REQUESTS: dict[str, dict[str, Any]] = {
    "topk_softmax": {"router": "topk_softmax"},
    "topk_softmax, factor on down": {"router": "topk_softmax", "scale_placement": "down"},
    "softmax_topk_renormalised": {"router": "softmax_topk_renormalised"},
    "sigmoid, bias, times 2.5": {"router": "sigmoid", "router_bias": True, "routed_scale": 2.5},
    "softmax_topk (control)": {"router": "softmax_topk", "allow_lossy": True},
    "cube_root (control)": {"scale_placement": "cube_root", "allow_lossy": True},
}


def measure(dtype: str, request: dict[str, Any] | None, granularity: int = 1) -> dict[str, Any]:
    """One row: the mixture against the dense model, or (no request) the dense model in `dtype` against float32."""
    config = CONFIG.replace(dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), testing.random_params(CONFIG))
    batches = [testing.random_batch(config, 4, 128)]
    if request is None:
        exact = jax.tree.map(lambda x: x.astype(np.float32), params)
        report = verify.verify(exact, CONFIG, params, config, batches)
    else:
        options = {"replicas": 4, "top_replicas": 2, "router_std": 0.05, **request}
        moe, moe_config, record = upcycle.apply(params, config, granularity=granularity, **options)
        report = verify.verify(params, config, moe, moe_config, batches, granularity=record["granularity"])
    return {
        "max_relative_logit_error": report.max_relative_logit_error,
        "kl_dense_to_moe": report.kl_dense_to_moe,
        "loss_jump": report.loss_jump,
        "broken_groups": sum(report.broken_groups_L or []),
        "border_ties": sum(report.border_ties_L or []),
    }


def main() -> None:
    """Parses flags, prints the table as it is measured, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--granularities", default="1,2,4,8")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    flags = parser.parse_args()
    granularities = [int(each) for each in flags.granularities.split(",")]
    rows = []
    print("| router | dtype | " + " | ".join(f"G = {g}" for g in granularities) + " | broken groups |")
    print("|---" * (len(granularities) + 3) + "|")
    for dtype in flags.dtypes.split(","):
        for name, request in REQUESTS.items():
            here = [
                {"router": name, "dtype": dtype, "granularity": g, **measure(dtype, request, g)} for g in granularities
            ]
            rows += here
            cells = " | ".join(f"{row['max_relative_logit_error']:.1e}" for row in here)
            print(f"| {name} | {dtype} | {cells} | {sum(row['broken_groups'] for row in here)} |", flush=True)
        if dtype != "float32":
            row = {"router": "dense", "dtype": dtype, "granularity": 0, **measure(dtype, None)}
            rows.append(row)
            error = f"{row['max_relative_logit_error']:.1e}"
            print(f"| dense | {dtype} | {' | '.join([error] * len(granularities))} | 0 |", flush=True)
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
