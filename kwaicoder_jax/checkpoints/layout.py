"""How a streamed checkpoint lies on disk: Zarr arrays without compression, which Orbax reads as it reads its own.

    STEP/params/NAME/.zarray     shape, dtype and chunks of one tensor; NAME is the path in the tree, joined by dots
    STEP/params/NAME/3.0.0       one chunk: a run of rows of one layer (or of a tensor without layers), as in memory
    STEP/params/streamed.json    how many chunks each tensor has

One file a chunk, each as long as what it holds: a writer writes slices of its arrays as they are, and a chunk that has
its name is whole, so what is done can be seen from the names alone. (Orbax's default, OCDBT, packs all chunks into a few
files behind a manifest; both are Orbax checkpoints, told apart by `use_ocdbt` in _METADATA.)
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

CHUNK_BYTES = (
    32 * 2**20
)  # of the largest chunk, where one row is not larger: an expert shard reads little beside its own
CONTENTS = "streamed.json"
TEMPORARY = ".tmp"  # ends the name of a file that is being written
COMMITTED = "commit_success.txt"  # Orbax's last file of a step on an object store


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor: shape, dtype, and whether its first axis is layers, which are then written and read one by one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layered: bool = False

    @property
    def slices(self) -> list[int | None]:
        """What is written at once: every layer, or None for the whole tensor."""
        return list(range(self.shape[0])) if self.layered else [None]

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of one slice: [1, ...] of a layer, or the tensor's."""
        return (1, *self.shape[1:]) if self.layered else self.shape

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice."""
        return math.prod(self.slice_shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Part:
    """One chunk of a slice: its file, the run of the slice's elements that it holds, and zeros that fill it up."""

    file: str
    start: int
    stop: int
    padding: int = 0


def chunk_shape(spec: Spec) -> tuple[int, ...]:
    """One layer, cut along its first axis where it is larger than CHUNK_BYTES: [1, n, ...] or [n, ...]."""
    if not spec.shape:
        return ()
    axis = min(int(spec.layered), len(spec.shape) - 1)
    rows, shape = spec.shape[axis], list(spec.slice_shape)
    if len(spec.shape) > int(spec.layered):
        row_bytes = math.prod(spec.shape[axis + 1 :]) * spec.dtype.itemsize
        fit = max(1, min(rows, CHUNK_BYTES // row_bytes))
        divisor = next(n for n in range(fit, 0, -1) if rows % n == 0)
        shape[axis] = divisor if 2 * divisor > fit else math.ceil(rows / math.ceil(rows / fit))
    return tuple(shape)


def parts(spec: Spec, chunks: Sequence[int], layer: int | None) -> Iterator[Part]:
    """The chunks of one slice, in the order of its elements."""
    if len(spec.shape) <= int(spec.layered):  # scalars
        yield Part(str(layer or 0), 0, 1)
        return
    axis = int(spec.layered)
    rows, size, rest = spec.shape[axis], chunks[axis], math.prod(spec.shape[axis + 1 :])
    for number in range(math.ceil(rows / size)):
        index = [layer, number] if spec.layered else [number]
        file = ".".join(map(str, [*index, *[0] * (len(spec.shape) - len(index))]))
        stop = min((number + 1) * size, rows)
        yield Part(file, number * size * rest, stop * rest, ((number + 1) * size - stop) * rest)


def zarray(spec: Spec) -> str:
    """The text of a tensor's .zarray file (Zarr 2)."""
    builtin = spec.dtype.kind in "biufc" and spec.dtype.isbuiltin == 1
    return json.dumps({
        "zarr_format": 2, "shape": spec.shape, "chunks": chunk_shape(spec), "order": "C", "dimension_separator": ".",
        "dtype": spec.dtype.str if builtin else spec.dtype.name, "compressor": None, "filters": None, "fill_value": None,
    })  # fmt: skip


def parse_zarray(text: str) -> tuple[Spec, tuple[int, ...]] | None:
    """Spec and chunk shape from a .zarray that `zarray` could have written, or None for any other."""
    fields = json.loads(text)
    shape, chunks, dtype = tuple(fields["shape"]), tuple(fields["chunks"]), parse_dtype(fields["dtype"])
    compressed = fields["compressor"] is not None or fields.get("filters") is not None
    if dtype is None or compressed or fields["order"] != "C" or fields.get("dimension_separator", ".") != ".":
        return None
    if chunks[:1] == (1,) and chunks[2:] == shape[2:]:
        return Spec(shape, dtype, layered=True), chunks
    return (Spec(shape, dtype), chunks) if chunks[1:] == shape[1:] else None


def parse_dtype(name: Any) -> np.dtype | None:
    """The dtype of this machine's byte order that Zarr calls `name` ("<f4", "bfloat16"), or None."""
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None
    return dtype if dtype.isnative else None


def storage_name(name: str) -> str:
    """The folder of tensor "layers/mlp/gate"."""
    return name.replace("/", ".")


def tree_metadata(specs: Mapping[str, Spec]) -> str:
    """The text of params/_METADATA, from which Orbax knows the tree and the format of its arrays."""
    tree = {}
    for name, spec in specs.items():
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a key of a dict
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(spec.shape),
            },
        }
    return json.dumps({
        "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    })  # fmt: skip


def step_metadata(now: int) -> str:
    """The text of STEP/_CHECKPOINT_METADATA; `now` in nanoseconds since the epoch."""
    handlers = {"meta": ocp.JsonCheckpointHandler, "params": ocp.StandardCheckpointHandler}
    return json.dumps({
        "item_handlers": {item: handler.typestr() for item, handler in handlers.items()},
        "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": now, "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    })  # fmt: skip


def contents(specs: Mapping[str, Spec]) -> dict[str, Any]:
    """What streamed.json says: the number of chunk files of each tensor, by folder."""
    return {
        storage_name(name): sum(1 for layer in spec.slices for _ in parts(spec, chunk_shape(spec), layer))
        for name, spec in specs.items()
    }


def is_whole(params: epath.Path) -> bool:
    """Whether `params` is a streamed checkpoint's, and nothing that it lists is gone."""
    try:
        listed = json.loads((params / CONTENTS).read_text())
        return (params / "_METADATA").exists() and all(
            len(present(params / folder)) == count + 1 for folder, count in listed.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False


def present(folder: epath.Path) -> set[str]:
    """Names of the whole files in the folder of one tensor."""
    return {file.name for file in folder.iterdir() if not file.name.endswith(TEMPORARY)}
