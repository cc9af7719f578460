"""The demo's recipe hangs together, and its fixed names are there."""

import importlib

import pytest

from configs import demo


@pytest.fixture(scope="module")
def config():
    return demo.get_config()


def test_every_stage_has_a_section_and_a_command(config):
    for name in config.stages:
        assert name in config
        assert importlib.import_module(f"experiments.{name}").STAGE.name == name


def test_mixtures_name_sources_of_the_corpus(config):
    sources = set(config.prepare_data.sources)
    for section in (config.pretrain, config.correct_teacher, config.distill, config.cpt):
        for phase in section.phases.values():
            assert set(phase.mixture) <= sources
            assert phase.batch_size % config.loader.streams == 0


def test_fixed_names(config):
    assert {"granularity", "replicas", "top_replicas", "router", "scale_placement", "allow_lossy"} <= set(
        config.upcycle
    )
    assert {"layers", "model_dim", "mlp_dim", "heads", "kv_heads"} <= set(config.prune.target)
    assert {"data", "fsdp", "expert", "tensor", "context"} == set(config.mesh)
    assert {"benchmarks", "data_dir", "num_samples", "samples"} <= set(config.evaluate)
    for name in ("correct_teacher", "prune", "distill", "upcycle", "cpt", "evaluate"):
        assert "init_from" in config[name]
    for name in ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate"):
        assert config[name].seed is None  # the recipe's
        config[name].seed = 3
    for name in ("pretrain", "prune", "distill", "upcycle", "cpt"):
        assert config[name].steps > 0


def test_three_phases_with_their_own_data_rates_and_fim(config):
    phases = list(config.cpt.phases.values())
    assert len(phases) == 3
    for field in ("mixture", "rate", "fim"):
        assert len({str(phase[field]) for phase in phases}) > 1, field


def test_none_fields_can_be_overridden(config):
    config.upcycle.experts_per_token = 4
    config.cpt.init_from = "distill"
    assert (config.upcycle.experts_per_token, config.cpt.init_from) == (4, "distill")
