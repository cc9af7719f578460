"""Importance scores as a value that can be saved, compared and handed to a report."""

import dataclasses
import os
import zipfile
from typing import Any

import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import npz

#: What reading a file that is not one of ours can raise.
BAD_FILE = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Importance of every unit (higher is kept first) and the energy that the norm correction needs; numpy arrays.

    S counts the neurons of the shared expert, F those of a dense MLP or of one routed expert.

    Attributes:
      neurons_LF: MLP neurons, from the activations entering the down projection; None for a mixture.
      heads_LH: query heads, from the norm of each head's output entering the output projection.
      groups_LK: KV groups, from ||attn_g W_o,g||: the norm of what a group's heads add to the residual stream.
      channels_D: model channels: scores at the output of each norm, summed over all norms and layers.
      layers_L: block influence, 1 - cos(h_in, h_out), mean over tokens.
      attention_norm_LD: mean over tokens of each channel's share of the energy entering that norm; rows sum to 1.
      mlp_norm_LD: the same at the MLP's norm.
      final_norm_D: the same at the final norm.
      tokens: unpadded tokens seen.
      sequences: rows seen that had any token.
      aggregation: how the width scores were reduced: "batch" and "sequence" (mean, l2, var), "weight_aware" (bool).
      blocks_LL: [i, j] is the influence of layers i to j together, 1 - cos(before i, after j), mean over tokens; zero
        where j < i. None unless asked for.
      leave_one_out_L: increase of the held-out loss without that layer, nats per token, from `leave_one_out`.
      experts_LE: routed experts: norm of the expert's output times its combine weight, summed over tokens.
      expert_neurons_LEF: neurons of each expert, as neurons_LF, over the tokens that chose the expert and not weighted
        by their combine weights: how useful an expert is says experts_LE, and neurons compete inside one expert. A
        sequence that sends it no token counts as zero.
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

    def replace(self, **changes: Any) -> "Scores":
        """A copy with some fields changed, as in scores.replace(leave_one_out_L=result.increase_L)."""
        return dataclasses.replace(self, **changes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file, whole or not at all."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        npz.write(path, arrays, {name: value for name, value in values.items() if name not in arrays})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote, by this version or one that knew fewer scores; else a UserError that names the file."""
        try:
            arrays, rest = npz.read(path)
            return cls(**{**arrays, **rest})
        except BAD_FILE as error:
            raise UserError(f"not a file of scores ({error})", where=os.fspath(path)) from error
