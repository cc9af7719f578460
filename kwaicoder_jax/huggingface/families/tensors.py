"""Where tensors lie that most families share. Their linear layers are [out, in], ours [in, out] with heads apart."""

from kwaicoder_jax.huggingface.families.family import Rules
from kwaicoder_jax.huggingface.rules import Rule

MODEL: Rules = {
    "embedding": Rule("model.embed_tokens.weight", "V D -> V D"),
    "final_norm/scale": Rule("model.norm.weight", "D -> D"),
    "head": Rule("lm_head.weight", "V D -> V D"),
}

ATTENTION: Rules = {
    "attention_norm/scale": Rule("input_layernorm.weight", "D -> D"),
    "attention/query": Rule("self_attn.q_proj.weight", "(H N) D -> D H N"),
    "attention/query_bias": Rule("self_attn.q_proj.bias", "(H N) -> H N"),
    "attention/key": Rule("self_attn.k_proj.weight", "(K N) D -> D K N"),
    "attention/key_bias": Rule("self_attn.k_proj.bias", "(K N) -> K N"),
    "attention/value": Rule("self_attn.v_proj.weight", "(K N) D -> D K N"),
    "attention/value_bias": Rule("self_attn.v_proj.bias", "(K N) -> K N"),
    "attention/query_norm/scale": Rule("self_attn.q_norm.weight", "N -> N"),
    "attention/key_norm/scale": Rule("self_attn.k_norm.weight", "N -> N"),
    "attention/out": Rule("self_attn.o_proj.weight", "D (H N) -> H N D"),
    "attention/out_bias": Rule("self_attn.o_proj.bias", "D -> D"),
    "mlp_norm/scale": Rule("post_attention_layernorm.weight", "D -> D"),
}


def swiglu(ours: str, theirs: str) -> Rules:
    """A SwiGLU MLP with the usual names."""
    return {
        f"{ours}gate": Rule(f"{theirs}gate_proj.weight", "F D -> D F"),
        f"{ours}gate_bias": Rule(f"{theirs}gate_proj.bias", "F -> F"),
        f"{ours}up": Rule(f"{theirs}up_proj.weight", "F D -> D F"),
        f"{ours}up_bias": Rule(f"{theirs}up_proj.bias", "F -> F"),
        f"{ours}down": Rule(f"{theirs}down_proj.weight", "D F -> F D"),
        f"{ours}down_bias": Rule(f"{theirs}down_proj.bias", "D -> D"),
    }


DENSE: Rules = {**MODEL, **ATTENTION, **swiglu("mlp/", "mlp.")}

EXPERTS: Rules = {
    **DENSE,
    "moe/router": Rule("mlp.gate.weight", "E D -> D E"),
    **swiglu("moe/", "mlp.experts.{expert}."),
}
