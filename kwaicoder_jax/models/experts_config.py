"""The description of a mixture: its experts and how a token chooses among them."""

import dataclasses
import enum

from kwaicoder_jax.errors import UserError


class Router(enum.StrEnum):
    """How router logits become the combine weights of the X selected experts (always in float32)."""

    TOPK_SOFTMAX = "topk_softmax"  # top-k of the logits, softmax over the selected (Mixtral)
    SOFTMAX_TOPK_RENORMALISED = "softmax_topk_renormalised"  # the same function in another order (Qwen3-MoE)
    SOFTMAX_TOPK = "softmax_topk"  # softmax over all, top-k, not renormalised (OLMoE, Qwen2-57B-A14B, DeepSeek-V2)
    SIGMOID = "sigmoid"  # sigmoid, top-k, renormalised (DeepSeek-V3, GLM-4-MoE)


class GroupScore(enum.StrEnum):
    """What the groups of experts are ranked by."""

    MAX = "max"  # the best expert of the group (DeepSeek-V2, group_limited_greedy)
    TOP2 = "top2"  # the sum of its two best (DeepSeek-V3, noaux_tc)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The mixture part of a model: E experts of `mlp_dim` neurons, X of them per token, and an always-on shared one.

    Attributes:
      num_experts: E.
      experts_per_token: X.
      mlp_dim: neurons of one expert.
      router: how logits become combine weights.
      routed_scale: what the combine weights are multiplied with, after the router.
      router_bias: whether a float32 bias per expert enters the selection, and nothing else (sigmoid router only;
        DeepSeek-V3, 2412.19437, section 2.1.2). It has no gradient; balancing moves it.
      shared_mlp_dim: neurons of the shared expert; 0 for none.
      shared_gate: whether the shared expert's output is multiplied by the sigmoid of a linear map (Qwen2-MoE).
      groups: into how many groups of neighbours the experts are divided.
      top_groups: of how many groups, the best ones, a token chooses its experts; all of them where equal to `groups`.
      group_score: what the groups are ranked by.
      bias: whether every routed expert has biases: gate_bias and up_bias on its neurons, down_bias on its output.
    """

    num_experts: int
    experts_per_token: int
    mlp_dim: int
    router: Router = Router.TOPK_SOFTMAX
    routed_scale: float = 1.0
    router_bias: bool = False
    shared_mlp_dim: int = 0
    shared_gate: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX
    bias: bool = False

    def __post_init__(self):
        object.__setattr__(self, "router", Router(self.router))
        object.__setattr__(self, "group_score", GroupScore(self.group_score))
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"{self.experts_per_token} of {self.num_experts} experts", where="experts.experts_per_token",
                remedy="choose between 1 and num_experts",
            )  # fmt: skip
        if self.mlp_dim < 1 or self.shared_mlp_dim < 0:
            raise UserError(f"experts of {self.mlp_dim} and {self.shared_mlp_dim} neurons", where="experts.mlp_dim")
        if self.router_bias and self.router is not Router.SIGMOID:
            raise UserError(
                f"router {self.router} has no selection bias", where="experts.router_bias", remedy="use sigmoid"
            )
        if self.shared_gate and not self.shared_mlp_dim:
            raise UserError(
                "there is no shared expert to gate", where="experts.shared_gate", remedy="set shared_mlp_dim"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups < 1 or self.num_experts % self.groups:
            raise UserError(
                f"{self.num_experts} experts do not form {self.groups} groups of one size", where="experts.groups",
                remedy="choose a divisor of num_experts, or 1",
            )  # fmt: skip
        size = self.num_experts // self.groups
        if not 1 <= self.top_groups <= self.groups or self.top_groups * size < self.experts_per_token:
            raise UserError(
                f"{self.top_groups} of {self.groups} groups of {size} experts, for {self.experts_per_token} per token",
                where="experts.top_groups", remedy="choose at most `groups`, and enough for experts_per_token",
            )  # fmt: skip
        if self.group_score is GroupScore.TOP2 and self.limited and size < 2:
            raise UserError(
                "a group of one expert has no two best", where="experts.group_score", remedy="use max, or fewer groups"
            )

    @property
    def limited(self) -> bool:
        """Whether groups keep a token from any of the experts."""
        return self.top_groups < self.groups
