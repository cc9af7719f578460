"""Compiles the decode step for a TPU v5e on this machine's CPU; prints what its program holds as JSON.

python -m tests.kwaicoder_jax.inference.decode_for_tpu [layers]
"""

import json
import math
import os
import re
import sys
from typing import Any

# The compiler needs no chip, but to be told which one.
os.environ |= {
    "JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwaicoder_jax import inference, models
from kwaicoder_jax.inference import decoding
from kwaicoder_jax.inference.cache import storage_dtype
from kwaicoder_jax.inference.programs import programs

ROWS, SLOTS = 8, 8192
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "pred": 1, "f16": 2, "u8": 1, "u16": 2, "s16": 2}


def config_of(layers: int) -> models.ModelConfig:
    """SmolLM2-135M's sizes."""
    return models.ModelConfig(
        vocab_size=49152, layers=layers, model_dim=576, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536, rope_theta=1e5,
        dtype="bfloat16",
    )  # fmt: skip


def compiled(config: models.ModelConfig, form: str) -> tuple[Any, Any]:
    """The decode step of ROWS rows and SLOTS slots, and the shapes of those rows."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    here = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), models.abstract(config))
    weights = shapes(inference.prepare(params, config, form))
    dtype = storage_dtype(config, "tpu")
    rows = shapes(jax.eval_shape(lambda: decoding.empty_rows(config, ROWS, SLOTS, cache_dtype=dtype)))
    decode = programs(config, models.Runtime(), None, "tpu").decode
    return decode.lower(weights=weights, rows=rows, top=None).compile(), rows


def copies(text: str, least: int) -> list[str]:
    """The instructions that copy, transpose or convert to an array with all slots of `least` bytes or more.

    A `copy-start` into on-chip memory, S(1), is how an array is read; one out of it is a copy.
    """
    found = []
    for line in text.splitlines():
        match = re.search(r"= (\([^)]*\)+|\S+) (copy|copy-start|transpose|convert)\(", line)
        if match is None:
            continue
        dtype, dims, layout = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", line[match.start() :])[0]
        size = BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        if size >= least and str(SLOTS) in dims.split(",") and not (match[2] == "copy-start" and "S(1)" in layout):
            found.append(line.strip()[:200])
    return found


def main(layers: int) -> None:
    result = {}
    for form in ("float", "int8"):
        program, rows = compiled(config_of(layers), form)
        text, memory = program.as_text(), program.memory_analysis()
        one = rows.cache.keys[0].size * rows.cache.keys[0].dtype.itemsize
        result[form] = {
            "copies": copies(text, one),
            "copies_of_half": copies(text, one // 2),
            "updates": len(re.findall(r"dynamic-update-slice\(%rows_cache_(?:keys|values)", text)),
            "aliases": len(re.findall(r"(?:may|must)-alias", text.split("entry_computation_layout", 1)[0])),
            "rows": len(jax.tree.leaves(rows)),
            "rows_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows)),
            "layer_bytes": 2 * one,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]))
