"""The tiny recipe with a mixture for a teacher, pruned to fewer experts."""

from ml_collections import ConfigDict

from tests.experiments import tiny_config


def get_config() -> ConfigDict:
    config = tiny_config.get_config()
    config.model.experts = {"num_experts": 4, "experts_per_token": 2, "mlp_dim": 24}
    with config.prune.target.ignore_type():
        config.prune.target.update({"mlp_dim": None, "experts": 3})
    config.stages = ("prepare_data", "pretrain", "prune", "distill")
    return config
