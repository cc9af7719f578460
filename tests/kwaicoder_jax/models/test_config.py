import json

import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import ExpertsConfig, ModelConfig, Router, Runtime

CONFIGS = testing.small_configs() | testing.family_configs()
MIXTURE = {"num_experts": 8, "experts_per_token": 3, "mlp_dim": 8}
LATENT = {"q_rank": 0, "kv_rank": 8, "nope_dim": 2, "rope_dim": 6, "value_dim": 4}  # heads of width 8


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name):
    config = CONFIGS[name]
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config), "configs are static arguments of jit"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_heads": 4}, "model.kv_heads"),
        ({"head_dim": 7}, "model.head_dim"),
        ({"layers": 0}, "model.layers"),
        ({"mlp_dim": -1}, "model.mlp_dim"),
        ({"hidden_size": 32}, "model.hidden_size"),
        ({"rope_theta": 0.0}, "model.rope_theta"),
        ({"rope_theta": float("inf")}, "model.rope_theta"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon"),
        ({"norm_epsilon": float("nan")}, "model.norm_epsilon"),
        ({"initializer_range": float("nan")}, "model.initializer_range"),
        ({"initializer_range": -0.1}, "model.initializer_range"),
        ({"dtype": "foo"}, "model.dtype"),
        ({"param_dtype": "int32"}, "model.param_dtype"),
        ({"experts": {"num_experts": 4, "experts_per_token": 5, "mlp_dim": 8}}, "experts.experts_per_token"),
        ({"experts": {"num_experts": 4, "experts_per_token": 0, "mlp_dim": 8}}, "experts.experts_per_token"),
        ({"experts": {"num_experts": 4, "experts_per_token": 2, "width": 8}}, "model.experts.width"),
        ({"experts": MIXTURE | {"groups": 3}}, "experts.groups"),
        ({"experts": MIXTURE | {"groups": 4, "top_groups": 1}}, "experts.top_groups"),
        ({"experts": MIXTURE | {"groups": 2, "top_groups": 3}}, "experts.top_groups"),
        ({"experts": MIXTURE | {"groups": 8, "top_groups": 4, "group_score": "top2"}}, "experts.group_score"),
        ({"experts": MIXTURE | {"router": "no such"}}, "model.experts"),
        ({"dense_layers": 1}, "model.dense_layers"),
        ({"dense_layers": 3, "experts": MIXTURE}, "model.dense_layers"),
        ({"rotary_dim": 3}, "model.rotary_dim"),
        ({"rotary_dim": 10}, "model.rotary_dim"),
        ({"windows": [4, 4]}, "model.windows"),
        ({"windows": [4, 4, -1]}, "model.windows"),
        ({"qk_norm": "layer"}, "model"),
        ({"rope_scaling": {"kind": "longrope"}}, "model.rope_scaling"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "model.rope_scaling.factor"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "model.rope_scaling.original_length"),
        (
            {"rope_scaling": {"kind": "llama3", "original_length": 8, "low_freq_factor": 5}},
            "model.rope_scaling.low_freq_factor",
        ),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "model.max_length"),
        ({"mla": LATENT}, "model.kv_heads"),
        ({"mla": LATENT, "kv_heads": 6, "head_dim": 10}, "model.head_dim"),
        ({"mla": LATENT, "kv_heads": 6, "qk_norm": "head"}, "model.qk_norm"),
        ({"mla": LATENT | {"rope_dim": 5, "nope_dim": 3}, "kv_heads": 6}, "model.mla.rope_dim"),
        ({"mla": LATENT | {"kv_rank": 0}, "kv_heads": 6}, "model.mla.kv_rank"),
    ],
)
def test_errors_name_the_field_and_the_remedy(changes, field):
    with pytest.raises(UserError) as error:
        ModelConfig.from_dict(testing.dense_config().to_dict() | changes)
    assert error.value.where == field
    assert error.value.remedy


def test_missing_field_is_named():
    values = testing.dense_config().to_dict()
    del values["heads"]
    with pytest.raises(UserError, match="heads"):
        ModelConfig.from_dict(values)


def test_a_dict_from_before_a_field_was_there():
    old = testing.moe_config().to_dict()
    for name in ("rope_scaling", "max_length", "rotary_dim", "qkv_bias", "qk_norm", "windows", "mla", "dense_layers"):
        del old[name]
    for name in ("groups", "top_groups", "group_score", "bias"):
        del old["experts"][name]
    assert ModelConfig.from_dict(old) == testing.moe_config()


def test_no_windows_are_one_value():
    assert testing.dense_config(windows=(0, 0, 0)) == testing.dense_config()


def test_replace_checks_again():
    with pytest.raises(UserError, match=r"model\.kv_heads"):
        testing.dense_config().replace(kv_heads=5)


def test_router_is_given_by_value():
    assert ExpertsConfig(4, 2, 8, "sigmoid").router is Router.SIGMOID
    with pytest.raises(ValueError, match="no_such_router"):
        ExpertsConfig(4, 2, 8, "no_such_router")


def test_back_ends_of_another_platform_are_refused():
    for backend, platform in (("tpu", "cpu"), ("tpu", "gpu"), ("gpu", "tpu")):
        message = rf"^runtime.experts: '{backend}' runs on \w+ alone, this is {platform}; use auto"
        with pytest.raises(UserError, match=message):
            Runtime(experts=backend, platform=platform)
    with pytest.raises(UserError, match=r"^runtime.routing: 'tpu' runs on tpu alone, this is cpu; use auto"):
        Runtime(routing="tpu", platform="cpu")
    with pytest.raises(UserError, match=r"runtime.routing: no choice 'gpu'; use auto, tpu, xla, reference"):
        Runtime(routing="gpu")
    assert Runtime(experts="tpu").experts == Runtime(experts="tpu", platform="tpu").experts == "tpu"
