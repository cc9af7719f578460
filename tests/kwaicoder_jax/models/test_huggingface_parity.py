"""Logits against Hugging Face transformers on copied weights, float32: the same mathematics, written by other people.

The copying here is this test's own; `kwaicoder_jax.huggingface` has its own tests against real checkpoints.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # float32 on both sides, logits of 10


def tensor(array):
    return torch.from_numpy(np.array(array, np.float32))


def common_fields(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim if config.experts is None else config.experts.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }


def state_dict(params, config):
    """The weights under Hugging Face names: its linear layers are [out, in], ours [in, out] with heads apart."""
    d = config.model_dim
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "lm_head.weight": params.get("head", params["embedding"]),
        "model.norm.weight": params["final_norm"]["scale"],
    }
    layers = {name: np.asarray(leaf) for name, leaf in models.flatten(params["layers"]).items()}
    for layer in range(config.layers):
        p = {name: leaf[layer] for name, leaf in layers.items()}
        names = {
            "input_layernorm.weight": p["attention_norm/scale"],
            "post_attention_layernorm.weight": p["mlp_norm/scale"],
            "self_attn.q_proj.weight": p["attention/query"].reshape(d, -1).T,
            "self_attn.k_proj.weight": p["attention/key"].reshape(d, -1).T,
            "self_attn.v_proj.weight": p["attention/value"].reshape(d, -1).T,
            "self_attn.o_proj.weight": p["attention/out"].reshape(-1, d).T,
        }
        if config.experts is None:
            names |= {f"mlp.{name}_proj.weight": p[f"mlp/{name}"].T for name in ("gate", "up", "down")}
        else:
            names |= {f"mlp.{name}": value for name, value in expert_tensors(p).items()}
        state |= {f"model.layers.{layer}.{name}": value for name, value in names.items()}
    return {name: tensor(value) for name, value in state.items()}


def expert_tensors(p):
    gate_up_E2FD = np.concatenate([p["moe/gate"], p["moe/up"]], axis=-1).swapaxes(1, 2)
    return {
        "gate.weight": p["moe/router"].T,
        "experts.gate_up_proj": gate_up_E2FD,
        "experts.down_proj": p["moe/down"].swapaxes(1, 2),
    }


def assert_same_logits(model, params, config):
    model.load_state_dict(state_dict(params, config), strict=True)
    batch = testing.random_batch(config, 3, 24, packed=False)
    with torch.no_grad():
        expected = model.eval().float()(torch.from_numpy(batch["inputs"]).long()).logits.numpy()
    got = testing.model_logits(params, config, batch)
    assert expected.std() > 2
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kv_heads", "tied"), [(1, True), (2, False), (6, True)])
def test_llama(kv_heads, tied):
    config = testing.dense_config(
        model_dim=36, kv_heads=kv_heads, tie_embeddings=tied, rope_theta=1e5, norm_epsilon=1e-5
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common_fields(config)))
    assert_same_logits(model, testing.random_params(config), config)


def test_llama_with_odd_sizes():
    config = testing.odd_config(model_dim=25)  # LlamaConfig refuses a width that its heads do not divide
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common_fields(config)))
    assert_same_logits(model, testing.random_params(config), config)


def test_mixtral_is_topk_softmax():
    config = testing.moe_config("topk_softmax", tie_embeddings=False)
    experts = {"num_local_experts": config.experts.num_experts, "num_experts_per_tok": config.experts.experts_per_token}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common_fields(config), **experts))
    assert_same_logits(model, testing.random_params(config), config)


def test_olmoe_block_is_softmax_topk():
    """OLMoE normalises queries and keys, which we do not, so the mixture is compared alone."""
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    config = testing.moe_config("softmax_topk")
    e = config.experts
    fields = {"num_experts": e.num_experts, "num_experts_per_tok": e.experts_per_token, "norm_topk_prob": False}
    block = olmoe.OlmoeSparseMoeBlock(transformers.OlmoeConfig(**common_fields(config), **fields))
    params = {
        name: np.asarray(leaf)[0] for name, leaf in models.flatten(testing.random_params(config)["layers"]).items()
    }
    block.load_state_dict({name: tensor(value) for name, value in expert_tensors(params).items()}, strict=True)
    x_BTD = np.random.default_rng(0).standard_normal((2, 9, config.model_dim)).astype(np.float32)
    with torch.no_grad():
        expected = block(tensor(x_BTD)).numpy()
    from kwaicoder_jax.models.moe import MoE

    ours = {name.removeprefix("moe/"): leaf for name, leaf in params.items() if name.startswith("moe/")}
    got, _ = MoE(config, models.Runtime()).apply(
        {"params": jax.tree.map(jnp.asarray, ours)}, jnp.asarray(x_BTD), np.ones((2, 9), bool)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
