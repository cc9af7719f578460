"""What pretrain, correct_teacher and cpt share: a model that is trained on labels, dense or a mixture."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.contract import Context
from experiments.training_stage import Run, training_runtime_of
from kwaicoder_jax import models, training
from kwaicoder_jax.errors import UserError


def job(
    context: Context, config: models.ModelConfig, mesh: Any, *, load: Callable[[], Any], lineage: list[dict[str, Any]],
    balance: training.BalanceConfig | None = None, **more: Any,
) -> Run:  # fmt: skip
    """A run of the context's stage on labels alone.

    Args:
      context: of the stage; its name is added to the lineage.
      config: the model.
      mesh: the devices.
      load: makes its parameters.
      lineage: of what it starts from.
      balance: of the routers, where it is a mixture.
      **more: other fields of `Run`.
    """
    runtime, weights = training_runtime_of(context, mesh), balance or training.BalanceConfig()
    check_capacity(weights, config, f"{context.stage.name}.balance", mesh)

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return training.language_model_loss(trainable["model"], config, batch, runtime=runtime, balance=weights)

    return Run(
        folder=context.folder,
        model=config,
        abstract={"model": training.abstract_params(config, mesh)},
        load=lambda: {"model": load()},
        loss=loss,
        frozen={},
        flops_per_token=functools.partial(models.train_flops_per_token, config),
        bias_rate=bias_rate(weights, config, f"{context.stage.name}.balance"),
        lineage=[*lineage, {"stage": context.stage.name, "identity": context.identity}],
        **more,
    )


def bias_rate(balance: training.BalanceConfig, config: models.ModelConfig, where: str) -> float:
    """By how much the selection biases move; UserError for a model that has none."""
    if balance.bias_rate and (config.experts is None or not config.experts.router_bias):
        remedy = "upcycle with router=sigmoid and router_bias=True, or set it to 0"
        raise UserError("the model has no selection bias", where=f"{where}.bias_rate", remedy=remedy)
    return balance.bias_rate


def check_capacity(balance: training.BalanceConfig, config: models.ModelConfig, where: str, mesh: Any) -> None:
    """Refuses a capacity for a model that has no experts, and where sequences are split."""
    if balance.capacity_factor is not None and config.experts is None:
        remedy = "set it to None, or train a mixture"
        raise UserError("the model has no experts", where=f"{where}.capacity_factor", remedy=remedy)
    if balance.capacity_factor is not None and mesh.shape.get("context", 1) > 1:
        what, remedy = "a capacity counts the rows of whole sequences", "set it to None, or mesh.context to 1"
        raise UserError(what, where=f"{where}.capacity_factor", remedy=remedy)


def router_loss(balance: training.BalanceConfig) -> Callable[[Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """The balance losses of a mixture as a function of its routers' statistics, with their metrics."""

    def loss(router: models.RouterStatistics) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics = training.router_metrics(router)
        return training.balance_loss(metrics, balance), metrics

    return loss


def router_summary(folder: Any) -> dict[str, float]:
    """The summary keys of a mixture, from the last step that was logged; empty for a dense model."""
    names = ("expert_load_max_over_mean", "router_entropy")
    records = [r for r in training.read_metrics(folder / "metrics.jsonl") if names[0] in r]
    return {name: records[-1][name] for name in (*names, "dropped_share") if name in records[-1]} if records else {}
