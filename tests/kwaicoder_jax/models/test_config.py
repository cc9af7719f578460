import json

import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import ExpertsConfig, ModelConfig, Router


@pytest.mark.parametrize("name", testing.small_configs())
def test_round_trip_through_json(name):
    config = testing.small_configs()[name]
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


def test_replace_checks_again():
    with pytest.raises(UserError, match=r"model\.kv_heads"):
        testing.dense_config().replace(kv_heads=5)


def test_router_is_given_by_value():
    assert ExpertsConfig(4, 2, 8, "sigmoid").router is Router.SIGMOID
    with pytest.raises(ValueError, match="no_such_router"):
        ExpertsConfig(4, 2, 8, "no_such_router")
