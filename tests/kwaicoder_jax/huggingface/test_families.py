"""config.json to ModelConfig and back for every family, what is refused, and which family a model of ours leaves as."""

import dataclasses
import json

import pytest
import transformers

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import families
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.models import ExpertsConfig, GroupScore, MlaConfig, ModelConfig, RopeScaling
from tests.kwaicoder_jax.huggingface import tiny


def config_json(name, **changes):
    """As transformers writes it, with fields changed; a change to ... removes one."""
    family, fields = tiny.MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**tiny.SIZES, **fields})
    values = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [f"{family}ForCausalLM"]} | changes
    return {key: value for key, value in values.items() if value is not ...}


def read(name, **changes):
    return families.read(Fields(config_json(name, **changes), "config.json"))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_there_and_back(name):
    family, config = read(name)
    values, obstacles = families.write(family, config)
    assert obstacles == []
    assert families.read(Fields(values, "config.json")) == (family, config)
    theirs = getattr(transformers, f"{tiny.MODELS[name][0]}Config")(**values)
    original = getattr(transformers, f"{tiny.MODELS[name][0]}Config")(**tiny.SIZES | tiny.MODELS[name][1])
    for field, value in json.loads(original.to_json_string(use_diff=False)).items():
        same = getattr(theirs, field, None)
        harmless = ("dtype", "architectures", "transformers_version", "max_window_layers", "num_nextn_predict_layers",
                    "router_aux_loss_coef", "head_dim", "norm_topk_prob", "bos_token_id", "eos_token_id", "pad_token_id",
                    "id2label", "label2id", "sliding_window", "n_group", "topk_group")  # fmt: skip
        if field not in harmless and not field.startswith("_"):
            assert same == value or (field == "rope_parameters" and same.items() >= value.items()), field


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, RopeScaling("dynamic", 2.0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.7,
                              "mscale_all_dim": 0, "beta_fast": 16}},
            RopeScaling("yarn", 40.0, 4096, mscale=0.7, beta_fast=16.0),
        ),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}},
         RopeScaling("yarn", 2.0, 8)),  # the factor of 16 positions
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0,
                              "rope_theta": 5e5}, "original_max_position_embeddings": 8192},
         RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    ],
)  # fmt: skip
def test_rotary_fields_of_old_and_new_files(fields, expected):
    _, config = read("llama", **{"rope_parameters": ..., **fields})
    assert config.rope_scaling == expected
    assert config.rope_theta == (fields.get("rope_theta") or fields.get("rope_parameters", {}).get("rope_theta", 1e4))


def test_fields_that_a_file_leaves_out_have_the_familys_defaults():
    values = config_json("mistral", sliding_window=..., rope_parameters=..., num_key_value_heads=None, head_dim=None,
                         rms_norm_eps=..., num_attention_heads=4)  # fmt: skip
    _, config = families.read(Fields(values, "config.json"))
    assert (config.windows, config.kv_heads, config.head_dim) == ((4096, 4096), 4, 6)
    assert (config.rope_theta, config.norm_epsilon) == (1e4, 1e-6)
    assert read("mistral", sliding_window=None)[1].windows == ()
    assert read("mixtral", rope_parameters=..., rms_norm_eps=...)[1].rope_theta == 1e6
    assert read("glm4_moe", rope_parameters={"rope_theta": 1e4})[1].rotary_dim == 4
    assert read("glm4_moe", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})[1].rotary_dim is None
    assert read("deepseek_v2", n_shared_experts=None)[1].experts.shared_mlp_dim == 0
    assert read("deepseek_v2", q_lora_rank=None)[1].mla.q_rank == 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"model_type": "gpt_neox"}, "model_type: there is no family 'gpt_neox'; the families are llama, mistral"),
        ("llama", {"model_type": ...}, "model_type: is missing"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures: .* is not LlamaForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu': the MLP is SwiGLU; only 'silu', 'swish' can be imported"),
        ("llama", {"hidden_size": ...}, "hidden_size: is missing"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers: '2' is not an integer of 1 or more"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers: True is not an integer"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps: -1 is not a positive number"),
        ("llama", {"attention_bias": "yes"}, "attention_bias: 'yes' is neither true nor false"),
        ("llama", {"num_key_value_heads": 3}, "model.kv_heads: 4 query heads do not share 3"),
        ("llama", {"hidden_size": 26, "head_dim": ...}, "hidden_size: 26 is no multiple of 4 heads"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0: scaled or capped"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantised"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type: there is no 'longrope' here; only default, linear"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor: is missing"),
        ("llama", {"rope_scaling": [2.0]}, r"rope_scaling: \[2.0\] is no object"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters: differ from layer to"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "layer_types: .* is not sliding_attention or full"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: some slide, but use_sliding"),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}, r"decoder_sparse_step: 2 makes layers \[0, 2\]"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] makes layers \[1\] of 2 dense; only the first"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, r"mlp_only_layers: \[0, 1\] makes layers \[0, 1\] of 2 dense"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: True: transformers' DeepSeek-V2 never renormalises"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq: 2: every layer behind the dense ones"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob: False: the weights of a sigmoid router sum to one"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
        ("deepseek_v3", {"n_group": 4}, "experts.groups: 6 experts do not form 4 groups"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
    ],
)  # fmt: skip
def test_what_is_not_represented_is_refused_by_the_name_of_its_field(name, changes, words):
    with pytest.raises(UserError, match=rf"^config.json: ([a-z_.]+: )?{words}"):
        read(name, **changes)


SIGMOID = ExpertsConfig(4, 2, 12, "sigmoid", routed_scale=2.5)
LATENT = {"mla": MlaConfig(0, 10, 8, 4, 6), "kv_heads": 4, "head_dim": 12}


def dense(**changes):
    sizes = {"model_dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "max_length": 64}
    return testing.dense_config(**sizes | changes)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (dense(), "llama"),
        (dense(mlp_bias=True), "llama"),
        (dense(heads=6), "mistral"),  # transformers refuses it as a Llama
        (dense(windows=(7, 7, 7)), "mistral"),
        (dense(qkv_bias=True), "qwen2"),
        (dense(qkv_bias=True, windows=(0, 7, 7)), "qwen2"),
        (dense(qk_norm="head"), "qwen3"),
        (dense(experts=ExpertsConfig(4, 2, 12)), "mixtral"),
        (dense(experts=ExpertsConfig(4, 2, 12, "softmax_topk_renormalised")), "mixtral"),
        (dense(experts=ExpertsConfig(4, 2, 12), qk_norm="head"), "qwen3_moe"),
        (dense(experts=ExpertsConfig(4, 2, 12), qkv_bias=True), "qwen2_moe"),
        (dense(experts=ExpertsConfig(4, 2, 12), dense_layers=1), "qwen2_moe"),
        (dense(experts=ExpertsConfig(4, 2, 12, shared_mlp_dim=5, shared_gate=True)), "qwen2_moe"),
        (dense(experts=ExpertsConfig(4, 2, 12, "softmax_topk"), qk_norm="full"), "olmoe"),
        (dense(experts=ExpertsConfig(4, 2, 12, "softmax_topk")), "qwen2_moe"),
        (dense(experts=SIGMOID), "glm4_moe"),
        (dense(experts=dataclasses.replace(SIGMOID, router_bias=True, shared_mlp_dim=24), rotary_dim=6), "glm4_moe"),
        (dense(experts=SIGMOID, qkv_bias=True, qk_norm="head", dense_layers=2), "glm4_moe"),
        (dense(experts=dataclasses.replace(SIGMOID, groups=2, group_score=GroupScore.TOP2)), "glm4_moe"),
        (dense(experts=SIGMOID, **LATENT), "deepseek_v3"),
        (dense(experts=ExpertsConfig(4, 2, 12, "softmax_topk", 1.5), **LATENT), "deepseek_v2"),
    ],
)
def test_a_model_leaves_as_the_family_that_represents_it(config, family):
    chosen, values = families.choose(config)
    assert chosen.model_type == values["model_type"] == family
    assert values["architectures"] == [chosen.architecture]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dense(qkv_bias=True, qk_norm="head"),
         "model.qk_norm: .* holds this model exactly; .* of qwen2: model.qk_norm; qwen3: model.out_bias;"),
        (dense(qk_norm="full"), r"model.qk_norm: .* of llama: model.qk_norm; mistral: model.qk_norm;"),
        (dense(windows=(7, 0, 7)), "model.windows: .* of llama: model.windows; .*qwen2: model.qkv_bias"),
        (dense(experts=ExpertsConfig(4, 2, 12, routed_scale=2.0)), "model.experts.routed_scale: .*mixtral: model.experts"),
        (dense(experts=ExpertsConfig(4, 2, 12, shared_mlp_dim=5)), "model.experts.shared_"),
        (dense(experts=dataclasses.replace(SIGMOID, shared_mlp_dim=13)), "model.experts.shared_mlp_dim: .* glm4_moe"),
        (dense(experts=ExpertsConfig(4, 2, 12), mla=LATENT["mla"], kv_heads=4, head_dim=12), "model.experts.router: "),
        (dense(experts=SIGMOID, **LATENT | {"mla": MlaConfig(0, 10, 8, 4, 6, norm_epsilon=1e-5)}),
         "model.mla.norm_epsilon: .* deepseek_v3: model.mla.norm_epsilon"),
        (dense(experts=ExpertsConfig(4, 2, 12, bias=True)), "model.experts.bias: "),
        (dense(rotary_dim=4), "model.rotary_dim: "),
        (dense(**LATENT), "model."),
    ],
)  # fmt: skip
def test_where_none_does_the_error_says_which_field_stands_in_the_way(config, words):
    with pytest.raises(UserError, match=rf"^{words}") as error:
        families.choose(config)
    assert "\n" not in str(error.value)


def test_a_family_can_be_named_or_preferred():
    assert families.choose(dense())[0].model_type == "llama"
    assert families.choose(dense(), preferred="mistral")[0].model_type == "mistral"
    assert families.choose(dense(qkv_bias=True), preferred="mistral")[0].model_type == "qwen2"
    with pytest.raises(UserError, match=r"^model.qkv_bias: no family of .* of qwen2: model.qkv_bias;"):
        families.choose(dense(), named="qwen2")
    with pytest.raises(UserError, match=r"^model.experts: .* of mixtral: model.experts"):
        families.choose(dense(), named="mixtral")
    with pytest.raises(UserError, match="there is no family 'gpt2'; use one of llama"):
        families.choose(dense(), named="gpt2")


@pytest.mark.parametrize("part", [1 / 3, 0.7, 3 / 49])
def test_partial_rotary_widths_come_back_exactly(part):
    head = 98
    config = dense(head_dim=head, rotary_dim=2 * round(part * head / 2), experts=SIGMOID)
    assert families.choose(config)[0].model_type == "glm4_moe"


def test_every_field_of_a_model_is_looked_at():
    """A field that is added to ModelConfig and that no family writes shows as an obstacle once it is not its default."""
    config, odd = dense(), {"vocab_size": 3, "rope_theta": 7.0, "norm_epsilon": 0.1, "initializer_range": 0.3,
                            "tie_embeddings": False, "mlp_dim": 9, "max_length": 5}  # fmt: skip
    for field in dataclasses.fields(ModelConfig):
        if field.name in odd:
            changed = config.replace(**{field.name: odd[field.name]})
            values, obstacles = families.write(families.FAMILIES["llama"], changed)
            assert obstacles == []
            assert values != families.write(families.FAMILIES["llama"], config)[0]
            assert getattr(families.read(Fields(values, ""))[1], field.name) == odd[field.name]


def test_parameters_of_every_family_have_a_place():
    for name in tiny.MODELS:
        family, config = read(name)
        rules = family.rules(config)
        for parameter in models.declarations(config):
            inside = parameter.removeprefix("dense_layers/").removeprefix("layers/")
            assert inside in rules, (name, parameter)
