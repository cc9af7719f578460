"""Which upcycling keeps the function, and why another does not.

y(x) = A * (sum of the combine weights of the chosen replicas) * F(x): lossless for every x if and only if tokens take
whole replicas, that sum is a constant c, A = 1/c arrives in full, and every neuron is as it was (He et al. 2024, arXiv
2410.07524, section 3; Nakamura et al. 2025, arXiv 2502.19261, for what is given up by dropping neurons).
"""

import math

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.merge import ScalePlacement

_ALLOW = ", or upcycle.allow_lossy=True"


def parse_router(router: str, routed_scale: float, router_bias: bool) -> models.Router:
    """The router, with what only the sigmoid router has checked."""
    try:
        chosen = models.Router(router)
    except ValueError as error:
        choices = ", ".join(models.Router)
        raise UserError(f"no router {router!r}", where="upcycle.router", remedy=f"use {choices}") from error
    if not (math.isfinite(routed_scale) and routed_scale > 0) or (
        routed_scale != 1.0 and chosen is not models.Router.SIGMOID
    ):
        raise UserError(
            f"{routed_scale} does not go with router {chosen}", where="upcycle.routed_scale",
            remedy="it is positive, and 1 except for sigmoid",
        )  # fmt: skip
    if router_bias and chosen is not models.Router.SIGMOID:
        raise UserError(
            f"router {chosen} has no selection bias", where="upcycle.router_bias", remedy="use router sigmoid"
        )
    return chosen


def experts_per_token(granularity: int, replicas: int, top_replicas: int, asked: int | None) -> int:
    """T: `asked`, else k*G; checked against the number of experts."""
    if replicas < 1:
        raise UserError(f"{replicas} replicas", where="upcycle.replicas", remedy="use 1 or more")
    if not 1 <= top_replicas <= replicas:
        raise UserError(
            f"{top_replicas} of {replicas} replicas", where="upcycle.top_replicas", remedy=f"use 1 to {replicas}"
        )
    used = top_replicas * granularity if asked is None else asked
    if not 1 <= used <= replicas * granularity:
        raise UserError(
            f"{used} of {replicas * granularity} experts", where="upcycle.experts_per_token",
            remedy=f"use 1 to {replicas * granularity}",
        )  # fmt: skip
    return used


def losses(
    *,
    router: models.Router,
    granularity: int,
    replicas: int,
    experts_per_token: int,
    placement: str,
    scale: float,
    shared_gate: bool,
    shared_scale: float,
    dropped: int,
) -> list[UserError]:
    """Everything that changes the function, each with the field and the remedy; empty if the merge is lossless.

    Args:
      router: how logits become combine weights.
      granularity: G.
      replicas: R.
      experts_per_token: T.
      placement: a value of `merge.ScalePlacement`.
      scale: A.
      shared_gate: whether the shared expert is gated, by sigmoid(0) = 1/2.
      shared_scale: the factor on the shared expert; 1 where there is none.
      dropped: neurons that are drawn anew.
    """
    found = []
    if experts_per_token % granularity:
        found.append(UserError(
            f"{experts_per_token} is not a multiple of granularity {granularity}, so the function would change",
            where="upcycle.experts_per_token", remedy=f"use a multiple of {granularity}{_ALLOW}",
        ))  # fmt: skip
    if router is models.Router.SOFTMAX_TOPK and experts_per_token != replicas * granularity:
        found.append(UserError(
            f"{router} does not renormalise, so its weights sum to another number for every token",
            where="upcycle.router", remedy=f"use topk_softmax, softmax_topk_renormalised or sigmoid{_ALLOW}",
        ))  # fmt: skip
    if ScalePlacement(placement) is ScalePlacement.CUBE_ROOT and (scale != 1.0 or shared_scale != 1.0):
        found.append(UserError(
            "a cube root inside the gate's activation is not undone by the other two",
            where="upcycle.scale_placement", remedy=f"use balanced, down or up{_ALLOW}",
        ))  # fmt: skip
    if shared_scale != (2.0 if shared_gate else 1.0):
        gate = "behind a gate of 1/2" if shared_gate else "without a gate"
        found.append(UserError(
            f"a shared expert times {shared_scale} {gate} is not the neurons' share of the MLP",
            where="upcycle.shared_scale", remedy=f"use {2.0 if shared_gate else 1.0}{_ALLOW}",
        ))  # fmt: skip
    if dropped:
        found.append(UserError(
            f"{dropped} neurons would be drawn anew", where="upcycle.drop_ratio", remedy=f"use 0{_ALLOW}"
        ))  # fmt: skip
    return found
