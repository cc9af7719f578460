"""The decoder: embedding, scans over identical layers, final norm. The vocabulary projection is `models.vocabulary`."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax.models import context_order, remat
from kwaicoder_jax.models.attention import Attention, Cache, LayerCache, Tokens
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.latent_attention import LatentAttention
from kwaicoder_jax.models.layers import DenseMLP, RMSNorm, declare
from kwaicoder_jax.models.moe import MoE, RouterStatistics
from kwaicoder_jax.models.rotary import document_lengths, is_dynamic
from kwaicoder_jax.models.statistics import COLLECTION, influence, recording, store
from kwaicoder_jax.models.vocabulary_sharding import looked_up


@flax.struct.dataclass
class Output:
    """What a forward pass returns.

    Attributes:
      hidden_BTD: final-normed hidden states, the input of the vocabulary projection.
      embedded_BTD: the embedding output.
      layers_LBTD: the residual stream after each layer, if `collect_layers`; else None.
      router: RouterStatistics with a leading axis of the layers that are mixtures; None for a dense model.
      cache: the updated cache, if one was given.
      statistics: what the modules recorded, if asked for.
    """

    hidden_BTD: jax.Array
    embedded_BTD: jax.Array
    layers_LBTD: jax.Array | None
    router: RouterStatistics | None
    cache: Cache | None = None
    statistics: Any = None


class Layer(nn.Module):
    """Pre-norm attention and MLP, dense or mixture, each added to the residual stream."""

    config: ModelConfig
    runtime: Runtime
    collect_layers: bool
    mixture: bool
    capacity_factor: float | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, own: tuple[LayerCache | None, jax.Array | None]):
        """`own` is what this layer alone has: its cache and its window."""
        c, (layer_cache, window) = self.config, own
        if window is not None:
            tokens = tokens.replace(window=window)  # type: ignore[attr-defined]
        mask_BT = tokens.segments_BT > 0
        normed_BTD = RMSNorm(c, name="attention_norm")(x_BTD, mask_BT)
        kind = Attention if c.mla is None else LatentAttention
        mixed_BTD, layer_cache = kind(c, self.runtime, name="attention")(normed_BTD, tokens, layer_cache)
        h_BTD = x_BTD + mixed_BTD
        normed_BTD = RMSNorm(c, name="mlp_norm")(h_BTD, mask_BT)
        router = None
        if not self.mixture:
            y_BTD = h_BTD + DenseMLP(c, self.runtime, c.mlp_dim, name="mlp")(normed_BTD, mask_BT)
        else:
            mixed_BTD, router = MoE(c, self.runtime, self.capacity_factor, name="moe")(normed_BTD, mask_BT)
            y_BTD = h_BTD + mixed_BTD
        if recording(self):
            store(self, "influence", influence(x_BTD, y_BTD, mask_BT))
        seen_BTD = _in_time(y_BTD, tokens.context) if self.collect_layers else None
        return y_BTD, (seen_BTD, router, layer_cache)


class Transformer(nn.Module):
    """The whole decoder; use it through `models.forward`."""

    config: ModelConfig
    runtime: Runtime = Runtime()
    collect_layers: bool = False
    capacity_factor: float | None = None

    @nn.compact
    def __call__(
        self, inputs_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, cache: Cache | None = None
    ) -> Output:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        table_VD = declare(self, "embedding", (c.vocab_size, c.model_dim), ("vocab", "embed"), init, c.param_dtype)
        if not c.tie_embeddings:  # declared here, used by models.vocabulary
            declare(self, "head", (c.vocab_size, c.model_dim), ("vocab", "embed"), init, c.param_dtype)
        context = context_order.shards(inputs_BT) if cache is None else 1
        if context > 1:
            inputs_BT, positions_BT, segments_BT = map(context_order.balanced, (inputs_BT, positions_BT, segments_BT))
        x_BTD = looked_up(table_VD, inputs_BT, c.dtype)
        embedded_BTD = _in_time(x_BTD, context)

        tokens, layer_caches = Tokens(positions_BT, segments_BT, positions_BT, segments_BT, context=context), None
        if cache is not None:
            start = (0, cache.index)
            k_positions_BS = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, start)
            k_segments_BS = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, start)
            tokens = Tokens(positions_BT, segments_BT, k_positions_BS, k_segments_BS, cache.index)
            layer_caches = (cache.key_LBKSN, cache.value_LBKSN)
        if is_dynamic(c):
            tokens = tokens.replace(lengths_BT=document_lengths(positions_BT, segments_BT))  # type: ignore[attr-defined]

        own = (layer_caches, jnp.asarray(c.windows, jnp.int32) if c.windows else None)
        outputs = []
        if c.dense_layers:
            first, own = (jax.tree.map(lambda x, part=part: x[part], own) for part in _parts(c.dense_layers))
            x_BTD, output = self._stack("dense_layers", c.dense_layers)(x_BTD, tokens, first)
            outputs.append(output)
        x_BTD, output = self._stack("layers", c.layers - c.dense_layers)(x_BTD, tokens, own)
        layers_LBTD, layer_caches = (_joined([o[at] for o in (*outputs, output)]) for at in (0, 2))
        hidden_BTD = _in_time(RMSNorm(c, name="final_norm")(x_BTD, segments_BT > 0), context)
        if cache is not None:
            advanced = cache.index + inputs_BT.shape[1]
            cache = Cache(layer_caches[0], layer_caches[1], tokens.k_positions_BS, tokens.k_segments_BS, advanced)
        return Output(hidden_BTD, embedded_BTD, layers_LBTD, output[1], cache)

    def _stack(self, name: str, length: int) -> nn.Module:
        """A scan over `length` layers, whose parameters are `name`/..."""
        layer = Layer
        if self.runtime.remat is not remat.Remat.NONE:
            policy = jax.checkpoint_policies.save_only_these_names(*remat.kept(remat.Remat(self.runtime.remat)))
            layer = nn.remat(Layer, prevent_cse=False, policy=policy)
        return nn.scan(
            layer,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=length,
            unroll=self.runtime.scan_unroll or length,
            metadata_params={nn.PARTITION_NAME: name},
        )(self.config, self.runtime, self.collect_layers, self._is_mixture(name), self.capacity_factor, name=name)

    def _is_mixture(self, stack: str) -> bool:
        return self.config.experts is not None and stack == "layers"


def _in_time(x_BTD: jax.Array, context: int) -> jax.Array:
    """Hidden states in the order of time, whatever order the layers see."""
    return context_order.restored(x_BTD) if context > 1 else x_BTD


def _parts(count: int) -> tuple[slice, slice]:
    """The first `count` layers and the rest."""
    return slice(None, count), slice(count, None)


def _joined(parts: list[Any]) -> Any:
    """One tree with the layers of all stacks, in their order."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
