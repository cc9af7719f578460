"""The recipe of `toy_stage` with a loss that jumps in step 23, and what is to be done about it."""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("toy_config", pathlib.Path(__file__).parent / "toy_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.toy.poison = {"13": "nan", "23": "1e4"}
    config.toy.spike = {"factor": 3.0, "window": 6, "max_rollbacks": 2}
    return config
