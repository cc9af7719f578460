"""The demo's recipe at a size that runs in seconds: same stages, same parts, small numbers."""

import importlib.util
import pathlib

from ml_collections import ConfigDict

_DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"


def _demo() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("demo_config", _DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config() -> ConfigDict:
    config = _demo()
    config.prepare_data.sources = {
        "standard_library": {"kind": "standard_library", "max_bytes": 250_000},
        "mathematics": {"kind": "mathematics", "max_bytes": 40_000, "seed": 0},
    }
    config.prepare_data.vocab_size = 500
    config.prepare_data.valid_fraction = 0.1
    config.model = {"layers": 3, "model_dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
    config.prune.target.update({"layers": 2, "model_dim": 24, "mlp_dim": 32, "heads": 2, "kv_heads": 2})
    config.prune.search.multiples.update({"model_dim": 8, "mlp_dim": 16})
    config.prune.search.update({"candidates": 4, "batches": 1})
    config.validation = {"batch_size": 8, "sequence_length": 64, "max_tokens_per_source": 1500}
    config.loader.streams = 4
    mixture = {"standard_library": 0.7, "mathematics": 0.3}
    for section in (config.pretrain, config.correct_teacher, config.distill, config.cpt):
        section.update({"log_every": 1, "eval_every": 5, "save_every": 4})
        for phase in section.phases.values():
            phase.update({"batch_size": 8, "sequence_length": 64})
            phase.mixture = ConfigDict(mixture)
    for section in (config.prune, config.upcycle):
        section.calibration.update({"batch_size": 8, "sequence_length": 64})
        section.calibration.mixture = ConfigDict(mixture)
    config.pretrain.steps, config.distill.steps, config.cpt.steps, config.prune.steps = 12, 8, 10, 2
    config.correct_teacher.steps, config.upcycle.steps = 6, 2
    config.cache_teacher.update({"top_k": 20, "dtype": "float32", "shard_steps": 3})
    config.evaluate.update({"num_samples": 1, "max_new_tokens": 4, "infilling_tasks": 4, "infilling_window": 60})
    config.export_hf = {"dtype": "float32"}
    return config
