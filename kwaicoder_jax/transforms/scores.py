"""Importance scores as a value that can be saved, compared and handed to a report."""

import dataclasses
import io
import json
import os
from typing import Any

import numpy as np

from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scores:
    """Importance of every unit (higher is kept first) and the energy that the norm correction needs; numpy arrays.

    Attributes:
      neurons_LF: MLP neurons, from the activations entering the down projection; None for a mixture.
      heads_LH: query heads, from the norm of each head's output entering the output projection.
      groups_LK: KV groups: root of the summed squares, over the heads of a group, of head score times the Frobenius
        norm of its output matrix; a stand-in for ||attn_g W_o,g|| that needs no second pass.
      channels_D: model channels: scores at the output of each norm, summed over all norms and layers.
      layers_L: block influence, 1 - cos(h_in, h_out), mean over tokens.
      attention_norm_LD: mean over tokens of each channel's share of the energy entering that norm; rows sum to 1.
      mlp_norm_LD: the same at the MLP's norm.
      final_norm_D: the same at the final norm.
      tokens: unpadded tokens seen.
      sequences: rows seen that had any token.
      aggregation: how the width scores were reduced: "batch" and "sequence" (mean, l2, var), "weight_aware" (bool).
      blocks_LL: influence of contiguous blocks: [i, j], j >= i, is 1 - cos of the residual stream before layer i and
        after layer j; None where it was not measured, as everything below.
      leave_one_out_L: increase of the loss without each layer, nats per token.
      experts_LE: experts of a mixture.
      expert_neurons_LEF: their neurons.
      shared_neurons_LS: neurons of the shared expert.
    """

    neurons_LF: np.ndarray | None
    heads_LH: np.ndarray
    groups_LK: np.ndarray
    channels_D: np.ndarray
    layers_L: np.ndarray
    attention_norm_LD: np.ndarray
    mlp_norm_LD: np.ndarray
    final_norm_D: np.ndarray
    tokens: int
    sequences: int
    aggregation: dict[str, Any]
    blocks_LL: np.ndarray | None = None
    leave_one_out_L: np.ndarray | None = None
    experts_LE: np.ndarray | None = None
    expert_neurons_LEF: np.ndarray | None = None
    shared_neurons_LS: np.ndarray | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file, whole or not at all."""
        values = dataclasses.asdict(self)
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        buffer = io.BytesIO()
        arrays["meta"] = np.array(json.dumps(rest, sort_keys=True))
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        target = files.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote; anything else is a UserError that names the file."""
        try:
            with np.load(io.BytesIO(files.path(path).read_bytes())) as stored:
                arrays = {name: stored[name] for name in stored.files if name != "meta"}
                return cls(**arrays, **json.loads(str(stored["meta"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a file of scores ({error})", where=os.fspath(path)) from error
