"""The recipe of `toy_stage`."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed, config.stages = 0, ("toy",)
    config.mesh = {"data": -1, "fsdp": 2}
    config.toy = {"steps": 40, "log_every": 1, "eval_every": 10, "save_every": 5, "poison": {"13": "nan"}}
    return config
