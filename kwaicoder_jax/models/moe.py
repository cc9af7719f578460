"""The mixture layer: a float32 router, exact top-k with lowest-index ties, dropless experts."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from kernels import grouped_matmul, routing
from kwaicoder_jax.models import expert_biases, expert_statistics
from kwaicoder_jax.models.config import Dispatch, ModelConfig, Runtime
from kwaicoder_jax.models.expert_capacity import capped_experts
from kwaicoder_jax.models.expert_exchange import exchanged_experts
from kwaicoder_jax.models.expert_sharding import expert_shares, neuron_axis, on_each_shard, tokens_to_experts
from kwaicoder_jax.models.experts_config import ExpertsConfig, GroupScore, Router
from kwaicoder_jax.models.layers import DenseMLP, declare, declare_bias, project
from kwaicoder_jax.models.mesh_axes import context_shares, flat, token_axes, token_mesh, unflat
from kwaicoder_jax.models.statistics import recording, store


@flax.struct.dataclass
class RouterStatistics:
    """What the balance losses and the metrics need, over the unpadded tokens of the global batch.

    Attributes:
      load_E: share of the tokens that chose each expert; sums to X.
      probability_E: mean routing probability of each expert; sums to 1. Differentiable.
      z: mean squared logsumexp of the logits. Differentiable.
      entropy: mean entropy of the routing probabilities, nats.
      confidence: mean of the largest combine weight.
      sequence_balance: E/X * sum over experts of load * probability, both of one row, and its mean over rows by their tokens
        (DeepSeek-V3, 2412.19437, section 2.1.2): 1 if even. Differentiable.
      dropped: share of the tokens' choices that found no place at their expert; None without a capacity.
    """

    load_E: jax.Array
    probability_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    confidence: jax.Array
    sequence_balance: jax.Array
    dropped: jax.Array | None = None


_Router = tuple[jax.Array, jax.Array | None, jax.Array | None]  # logits, what to rank by [M, E]; for statistics mask_M
Choice = tuple[jax.Array, jax.Array, jax.Array]  # combine weights, expert indices, routing probabilities
_Rest = tuple[Choice, expert_statistics.ExpertSums | None]


def choose_experts(
    logits_ME: jax.Array,
    experts: ExpertsConfig,
    selection_ME: jax.Array | None = None,
    *,
    backend: routing.Backend | str = routing.Backend.AUTO,
) -> Choice:
    """Selects X experts per token from float32 logits; among equals the lowest index wins.

    Args:
      logits_ME: router logits.
      experts: the mixture.
      selection_ME: what to rank the experts by; the logits unless given (see `selection`). Weights do not depend on it.
      backend: of the selection; all of them select the same.

    Returns:
      Combine weights [M, X] (float32), expert indices [M, X] (int32), routing probabilities over all experts [M, E].
    """
    if experts.router is Router.SIGMOID:
        # sigmoid / sum of sigmoids, as a softmax: 0 / 0 where all of them underflow otherwise.
        probability_ME = jax.nn.softmax(jax.nn.log_sigmoid(logits_ME), axis=-1)
    else:
        probability_ME = jax.nn.softmax(logits_ME, axis=-1)
    if selection_ME is None:
        top_MX, index_MX = routing.top_experts(logits_ME, experts.experts_per_token, backend=backend)
    else:
        _, index_MX = routing.top_experts(selection_ME, experts.experts_per_token, backend=backend)
        top_MX = routing.take_experts(logits_ME, index_MX, backend=backend)
    if experts.router is Router.TOPK_SOFTMAX:
        weight_MX = jax.nn.softmax(top_MX, axis=-1)
    elif experts.router is not Router.SIGMOID:
        weight_MX = routing.take_experts(probability_ME, index_MX, backend=backend)
        if experts.router is Router.SOFTMAX_TOPK_RENORMALISED:
            weight_MX = weight_MX / jnp.sum(weight_MX, axis=-1, keepdims=True)
    else:
        return experts.routed_scale * jax.nn.softmax(jax.nn.log_sigmoid(top_MX), axis=-1), index_MX, probability_ME
    if experts.routed_scale != 1.0:
        weight_MX = experts.routed_scale * weight_MX
    return weight_MX, index_MX, probability_ME


def selection(logits_ME: jax.Array, bias_E: jax.Array | None, experts: ExpertsConfig) -> jax.Array | None:
    """What experts are ranked by, float32; None where the logits themselves will do.

    That is the score (sigmoid or softmax of the logits), plus the bias if there is one, and minus infinity for experts
    outside of a token's best groups (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, 2412.19437).
    """
    if bias_E is None and not experts.limited:
        return None
    score_ME = jax.nn.sigmoid(logits_ME) if experts.router is Router.SIGMOID else jax.nn.softmax(logits_ME, axis=-1)
    if bias_E is not None:
        score_ME = score_ME + bias_E.astype(jnp.float32)[None, :]
    if experts.limited:
        best = 1 if experts.group_score is GroupScore.MAX else 2
        score_MGE = score_ME.reshape(-1, experts.groups, experts.num_experts // experts.groups)
        group_MG = jnp.sum(jax.lax.top_k(score_MGE, best)[0], axis=-1)
        _, chosen_MC = jax.lax.top_k(group_MG, experts.top_groups)
        open_MG = jnp.any(jax.nn.one_hot(chosen_MC, experts.groups, dtype=jnp.bool_), axis=1)
        score_ME = jnp.where(open_MG[:, :, None], score_MGE, -jnp.inf).reshape(score_ME.shape)
    return jax.lax.stop_gradient(score_ME)


def router_statistics(
    logits_ME: jax.Array,
    weight_MX: jax.Array,
    index_MX: jax.Array,
    probability_ME: jax.Array,
    mask_M: jax.Array,
    in_rows: Callable[[jax.Array], jax.Array] = lambda x_M: x_M[None],
) -> RouterStatistics:
    """Reduces one layer's routing over the tokens where `mask_M` is true; `in_rows` makes [B, T, ...] of [M, ...]."""
    weight_M = mask_M.astype(jnp.float32) / jnp.maximum(jnp.sum(mask_M), 1).astype(jnp.float32)
    chosen_ME = jnp.sum(jax.nn.one_hot(index_MX, logits_ME.shape[-1], dtype=jnp.float32), axis=1)
    entropy_M = -jnp.sum(probability_ME * jnp.log(jnp.maximum(probability_ME, 1e-20)), axis=-1)
    return RouterStatistics(
        load_E=weight_M @ chosen_ME,
        probability_E=weight_M @ probability_ME,
        z=jnp.sum(weight_M * jnp.square(jax.nn.logsumexp(logits_ME, axis=-1))),
        entropy=jnp.sum(weight_M * entropy_M),
        confidence=jnp.sum(weight_M * jnp.max(weight_MX, axis=-1)),
        sequence_balance=_sequence_balance(weight_M, chosen_ME, probability_ME, in_rows) / index_MX.shape[1],
    )


def _sequence_balance(
    weight_M: jax.Array,
    chosen_ME: jax.Array,
    probability_ME: jax.Array,
    in_rows: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """E * sum over rows and experts of load * probability, where rows count by their share of the tokens."""
    weight_BT = in_rows(weight_M)
    load_BE, probability_BE = (jnp.einsum("BT,BTE->BE", weight_BT, in_rows(x)) for x in (chosen_ME, probability_ME))
    share_B1 = jnp.maximum(jnp.sum(weight_BT, axis=1, keepdims=True), 1e-20)
    return chosen_ME.shape[1] * jnp.sum(load_BE * probability_BE / share_B1)


def _mesh_of(x_BTD: jax.Array, *, rows: bool) -> Any:
    """The mesh to share tokens over; those of too few rows as well, such as a prompt's, unless it has to be `rows`."""
    batch, time = x_BTD.shape[:2]
    mesh = token_mesh(x_BTD, batch)
    if mesh is None and not rows:
        mesh = token_mesh(x_BTD, batch * time)
        return mesh if context_shares(mesh) == 1 else None
    return mesh


class MoE(nn.Module):
    """y = sum over the X selected experts of weight * expert(x); each expert is a SwiGLU of `experts.mlp_dim` neurons.

    With a `capacity_factor` experts take so many rows of a sequence, over those of even routing, and drop what is beyond.
    """

    config: ModelConfig
    runtime: Runtime
    capacity_factor: float | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, RouterStatistics]:
        c, e = self.config, self.config.experts
        assert e is not None
        init = nn.initializers.normal(c.initializer_range)
        out_init = nn.initializers.normal(c.initializer_range / (2 * c.layers) ** 0.5)
        in_shape, in_axes = (e.num_experts, c.model_dim, e.mlp_dim), ("experts", "embed", "expert_mlp")
        out_shape, out_axes = (e.num_experts, e.mlp_dim, c.model_dim), ("experts", "expert_mlp", "embed")
        router_shape = (c.model_dim, e.num_experts)
        router_DE = declare(self, "router", router_shape, ("embed", "experts"), init, c.param_dtype)
        bias_E = None
        if e.router_bias:
            bias_E = declare(self, "router_bias", (e.num_experts,), ("experts",), nn.initializers.zeros, "float32")
        gate_EDF = declare(self, "gate", in_shape, in_axes, init, c.param_dtype)
        up_EDF = declare(self, "up", in_shape, in_axes, init, c.param_dtype)
        down_EFD = declare(self, "down", out_shape, out_axes, out_init, c.param_dtype)
        mesh = _mesh_of(x_BTD, rows=recording(self))
        weights: Any = tuple(
            weight if isinstance(weight, grouped_matmul.ScaledMatrices) else weight.astype(c.dtype)
            for weight in (gate_EDF, up_EDF, down_EFD)
        )

        x_MD = flat(x_BTD, mesh)
        logits_ME = jnp.einsum(
            "MD,DE->ME", x_MD.astype(jnp.float32), router_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )

        if e.bias:
            x_MD, weights = expert_biases.with_one(x_MD), expert_biases.widened(weights, *self._biases())

        wanted, backend, routing_backend = recording(self), self.runtime.experts, self._routing_backend(x_BTD, mesh)

        def route_and_compute(
            router: _Router, x_MD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array
        ) -> tuple[jax.Array, _Rest]:
            weights = (gate_EDF, up_EDF, down_EFD)
            logits_ME, ranked_by_ME, mask_M = router
            choice = choose_experts(logits_ME, e, ranked_by_ME, backend=routing_backend)
            order = routing.sort_by_expert(choice[1], e.num_experts, backend=routing_backend)
            if mask_M is None:
                return grouped_matmul.expert_mlp(x_MD, choice[0], order, *weights, backend=backend), (choice, None)
            axis = neuron_axis(mesh, e.mlp_dim + e.bias)
            y_MD, sums = expert_statistics.expert_mlp(
                x_MD, choice[0], order, weights, mask_M, time=x_BTD.shape[1] // context_shares(mesh), backend=backend,
                neuron_axis=axis,
            )  # fmt: skip
            return y_MD, (choice, sums)

        mask_M = flat(mask_BT, mesh)
        router = (logits_ME, selection(logits_ME, bias_E, e), mask_M if wanted else None)
        dropped = None
        if self.capacity_factor is not None:
            choice = self._choose(mesh, routing_backend, *router[:2])
            rest: _Rest = (choice, None)
            y_MD, dropped = capped_experts(
                mesh, choice[:2], x_MD, weights, mask_BT, factor=self.capacity_factor,
                gather_weights=self.runtime.dispatch is Dispatch.WEIGHTS, stage=self.runtime.scatter_stage,
            )  # fmt: skip
        elif not wanted and self.runtime.dispatch is not Dispatch.WEIGHTS and expert_shares(mesh, e.num_experts) > 1:
            choice = self._choose(mesh, routing_backend, *router[:2])
            rest = (choice, None)
            y_MD = self._by_tokens(mesh, choice[:2], x_MD, weights)
        else:
            y_MD, rest = on_each_shard(
                route_and_compute, mesh, router, x_MD, *weights, stage=self.runtime.scatter_stage
            )
            choice = rest[0]
        sums = rest[1]
        weight_MX, index_MX, probability_ME = choice
        y_MD = y_MD[:, : c.model_dim] if e.bias else y_MD
        in_rows = functools.partial(unflat, batch=x_BTD.shape[0], mesh=mesh)
        statistics = router_statistics(logits_ME, weight_MX, index_MX, probability_ME, mask_M, in_rows)
        statistics = statistics.replace(dropped=dropped)  # type: ignore[attr-defined]
        if sums is not None:
            output_E, neurons = expert_statistics.reduce(jax.tree.map(in_rows, sums), in_rows(index_MX), mask_BT)
            store(self, "experts", output_E)
            store(self, "expert_neurons", jax.tree.map(lambda sums_EF: sums_EF[:, : e.mlp_dim], neurons))
        y_BTD = in_rows(y_MD).astype(c.dtype)
        return (y_BTD + self._shared(x_BTD, mask_BT) if e.shared_mlp_dim else y_BTD), statistics

    def _routing_backend(self, x_BTD: jax.Array, mesh: Any) -> str:
        """XLA's where tokens are on several devices and XLA divides the work: it cannot divide a kernel."""
        everywhere = jax.typeof(x_BTD).sharding.mesh
        by_xla = mesh is None and everywhere.size > 1 and AxisType.Auto in everywhere.axis_types
        return routing.Backend.XLA if by_xla and self.runtime.routing == "auto" else self.runtime.routing

    def _choose(self, mesh: Any, backend: str, logits_ME: jax.Array, ranked_by_ME: jax.Array | None) -> Choice:
        """Each device chooses for its own tokens."""
        e = self.config.experts
        assert e is not None

        def local(logits_ME: jax.Array, ranked_by_ME: jax.Array | None) -> Choice:
            return choose_experts(logits_ME, e, ranked_by_ME, backend=backend)

        if mesh is None:
            return local(logits_ME, ranked_by_ME)
        spread = PartitionSpec(token_axes(mesh))
        on_shards = jax.shard_map(local, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
        return on_shards(logits_ME, ranked_by_ME)

    def _by_tokens(self, mesh: Any, choice: tuple[jax.Array, jax.Array], x_MD: jax.Array, weights: Any) -> jax.Array:
        """Expert parallelism: each device computes its own experts, for the tokens of its expert group."""
        e = self.config.experts
        assert e is not None
        # Rows of a device if routing is even; devices along other axes work on other parts of the same rows.
        even = x_MD.shape[0] * e.experts_per_token // math.prod(mesh.shape[axis] for axis in token_axes(mesh))
        rows = -(-int(even * self.runtime.expert_buffer) // 512) * 512
        backend, stage = self.runtime.experts, self.runtime.scatter_stage
        if self.runtime.dispatch is Dispatch.EXCHANGE:
            return exchanged_experts(mesh, choice, x_MD, *weights, rows=rows, backend=backend, stage=stage)

        def local(x_MD: jax.Array, choice: tuple[jax.Array, jax.Array], *weights: Any) -> jax.Array:
            return grouped_matmul.local_expert_mlp(x_MD, *choice, *weights, rows=rows, backend=backend)

        return tokens_to_experts(local, mesh, choice, x_MD, *weights, stage=stage)

    def _biases(self) -> list[jax.Array]:
        """Of gate, up and down, in a compact call."""
        c, e = self.config, self.config.experts
        assert e is not None
        axes = {"gate": ("expert_mlp", e.mlp_dim), "up": ("expert_mlp", e.mlp_dim), "down": ("embed", c.model_dim)}
        return [
            declare_bias(self, f"{name}_bias", (e.num_experts, size), ("experts", axis), c)
            for name, (axis, size) in axes.items()
        ]

    def _shared(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """The always-on expert, in a compact call."""
        c, e = self.config, self.config.experts
        assert e is not None
        y_BTD = DenseMLP(c, self.runtime, e.shared_mlp_dim, "shared_mlp", name="shared")(x_BTD, mask_BT)
        if not e.shared_gate:
            return y_BTD
        init = nn.initializers.normal(c.initializer_range)
        gate_D1 = declare(self, "shared_gate", (c.model_dim, 1), ("embed", "shared"), init, c.param_dtype)
        gate_BT1 = jax.nn.sigmoid(project(x_BTD.astype(jnp.float32), gate_D1))
        return (gate_BT1 * y_BTD.astype(jnp.float32)).astype(c.dtype)
