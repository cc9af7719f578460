"""KwaiCoder-23BA4 at full size: an 8B code model, pruned, distilled, split into 64 experts, trained on in three phases.

    python -m experiments.compile --config=configs/kwaicoder_23b_a4b.py --topology=v5p:4x4x4
    python -m experiments.cpt --config=configs/kwaicoder_23b_a4b.py --workdir=/shared/run

Argument: words separated by commas, as in configs/kwaicoder_23b_a4b.py:qwen,v5p-512,8k

    qwen        Qwen2.5-Coder-7B as the teacher (QKV bias, leaves as Qwen2-MoE), in place of OpenCoder-8B (leaves as Mixtral)
    v5p-64 (if no machine is named)  v5p-512  v5e-256  h100-64     the machine, see docs/pods.md
    4k (if none is named)  8k  32k   sequence length of the last phase; where that leaves fewer rows than chips, the mesh
                                     has a context axis, on which chips share a row

What the publication does not give is a choice; its reason stands beside it.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

CODE, MATHEMATICS, KNOWLEDGE = "code", "mathematics", "knowledge"

TEACHERS = {
    "opencoder": {
        "vocab_size": 96_640, "layers": 32, "model_dim": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "mlp_dim": 14_336, "rope_theta": 500_000.0, "norm_epsilon": 1e-5, "tie_embeddings": False, "max_length": 8192,
    },
    "qwen": {
        "vocab_size": 152_064, "layers": 28, "model_dim": 3584, "heads": 28, "kv_heads": 4, "head_dim": 128,
        "mlp_dim": 18_944, "rope_theta": 1_000_000.0, "norm_epsilon": 1e-6, "tie_embeddings": False,
        "max_length": 32_768, "qkv_bias": True,
    },
}  # fmt: skip

# Four fifths of the layers and channels and three quarters of the neurons stay: pruning costs least spread over all of
# them, channels cost most, and attention is left whole (docs/results.md, what a cut costs). 8 replicas of 8 shards give 64
# experts, the best number found by He et al. 2024, of 1408 or 1664 neurons, a multiple of the TPU's 128 lanes.
STUDENTS = {
    "opencoder": {"layers": 26, "model_dim": 3072, "mlp_dim": 11_264},  # 4.1B; as a mixture 23.0B, as many active
    "qwen": {"layers": 24, "model_dim": 2816, "mlp_dim": 13_312},  # 4.1B; as a mixture 23.0B
}

# Rows of 4096 tokens in a global batch: 1M tokens where chips are few, 4M on the large slice.
MACHINES: dict[str, dict[str, Any]] = {
    "v5p-64": {"rows": 256, "remat": "projections"},
    # Weights over 64 chips, eight times: of 3072 channels 512 chips would have 6 each, less than a register's 8 rows.
    "v5p-512": {"rows": 1024, "remat": "products", "data": -1, "fsdp": 64},
    # 16 x 16 chips with little memory: tokens go to groups of 4 chips, and gradients are scattered along one side first.
    "v5e-256": {"rows": 256, "remat": "full", "stage": 16, "expert": 4, "dispatch": "tokens"},
    "h100-64": {"rows": 256, "remat": "projections"},
}
CPT_TOKENS = 3_000_000_000_000  # published
DISTILL_TOKENS = 100_000_000_000  # as Minitron (94B for 15B to 8B)


def phase(share: float, rows: int, length: int, mixture: dict[str, float], fim_rate: float, rate: dict) -> ConfigDict:
    """One phase; longer rows are fewer, so that a batch keeps its tokens."""
    shape = {"batch_size": max(rows * 4096 // length, 1), "sequence_length": length}
    fim = {"rate": fim_rate, "spm_rate": 0.5, "unit": "mixed"}
    return ConfigDict({"share": share, **shape, "mixture": mixture, "fim": fim, "rate": rate})


def training(tokens: int, rows: int, phases: dict[str, ConfigDict]) -> dict[str, Any]:
    """What every training stage has."""
    return {
        "init_from": config_dict.placeholder(str),
        "seed": config_dict.placeholder(int),
        "steps": tokens // (rows * 4096),
        "phases": phases,
        "optimizer": {"b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
        "log_every": 10,
        "eval_every": 1000,
        "save_every": 500,
        "microbatches": 1,  # parts of a batch that are worked on one after the other
        "quantization": "none",  # or int8, fp8: of dense projections
        "quantize_gradients": False,
        "max_skipped_steps": 10,
        "spike": {"factor": 2.0, "window": 64, "max_rollbacks": 10},
    }


def sizes(**given: int) -> dict[str, Any]:
    """A target: the sizes given, the others left as they are."""
    names = ("layers", "model_dim", "mlp_dim", "heads", "kv_heads", "experts", "expert_dim", "shared_dim")
    left = {name: config_dict.placeholder(int) for name in (*names, "experts_per_token") if name not in given}
    return {**left, **given}


def chosen(words: list[str], choices: Any, default: str) -> str:
    """The one of the choices that is among the words."""
    return next((word for word in words if word in choices), default)


def get_config(argument: str = "") -> ConfigDict:
    """The recipe, one section a stage."""
    words = [word for word in argument.split(",") if word]
    lengths = {"4k": 4096, "8k": 8192, "32k": 32_768}
    known = {"qwen", *MACHINES, *lengths}
    if unknown := sorted(set(words) - known):
        raise ValueError(f"no variant {unknown[0]!r}; use {', '.join(sorted(known))}")
    teacher = "qwen" if "qwen" in words else "opencoder"
    name = chosen(words, MACHINES, "v5p-64")
    machine, chips = MACHINES[name], int(name.split("-")[1])
    length, rows = lengths[chosen(words, lengths, "4k")], machine["rows"]

    broad = {CODE: 0.7, KNOWLEDGE: 0.2, MATHEMATICS: 0.1}  # as DeepSeek-Coder-V2's, and KwaiCoder-DS-V2's 70 / 10 / 20
    quality = {CODE: 0.75, KNOWLEDGE: 0.1, MATHEMATICS: 0.15}
    best = {CODE: 0.8, KNOWLEDGE: 0.05, MATHEMATICS: 0.15}

    config = ConfigDict()
    config.seed = 0
    config.stages = (
        "import_hf",
        "prepare_data",
        "prune",
        "distill",
        "upcycle",
        "cpt",
        "export_hf",
        "evaluate",
        "report",
    )
    context = max(1, chips * length // (rows * 4096))  # no more: weights are sharded over the chips of the other axes
    config.mesh = {"data": machine.get("data", 1), "fsdp": machine.get("fsdp", -1), "tensor": 1, "context": context}
    config.mesh.expert = machine.get("expert", 1)
    config.runtime = {
        "remat": machine["remat"],
        "scan_unroll": 1,
        "attention": "auto",
        "experts": "auto",
        "routing": "auto",
    }
    config.runtime.scatter_stage = machine.get("stage", 0)
    config.runtime.dispatch = machine.get("dispatch", "weights")
    config.runtime.expert_buffer = 1.5
    # A multiple of any number of hosts, as far as the rows of the longest sequences go round.
    config.loader = {"streams": min(rows, rows * 4096 // length), "workers": 0}
    config.validation = {"batch_size": rows, "sequence_length": 4096, "max_tokens_per_source": 2_000_000}
    # The imported model, so that shapes are known before it is there. float32 weights, bfloat16 arithmetic.
    config.model = {**TEACHERS[teacher], "dtype": "bfloat16", "param_dtype": "float32"}

    config.import_hf = {
        "source": config_dict.placeholder(str),  # --config.import_hf.source=FOLDER
        "tokenizer": config_dict.placeholder(str),
        "param_dtype": "float32",
        "dtype": "bfloat16",
        "specials": {},
    }
    folder = {"kind": "folder", "max_bytes": 10**14, "path": config_dict.placeholder(str)}
    config.prepare_data = {
        "sources": {name: dict(folder) for name in (CODE, KNOWLEDGE, MATHEMATICS)},
        "tokenizer": "import_hf",
        "valid_fraction": 0.001,
        "seed": config_dict.placeholder(int),
    }
    config.prune = {
        "init_from": config_dict.placeholder(str),
        "seed": config_dict.placeholder(int),
        "steps": 4,  # 1024 rows of calibration, as Minitron
        "calibration": phase(1.0, rows, 4096, broad, 0.0, {"peak": 0.0}),
        "importance": {"batch": "l2", "sequence": "mean", "weight_aware": False},
        "norm_correction": True,
        "protect_ends": True,
        "layer_scores": "influence",
        "head_merge": False,
        "target": sizes(**STUDENTS[teacher]),
        "scores": config_dict.placeholder(str),
        "streamed": False,
        "verify": True,
    }
    config.distill = training(
        DISTILL_TOKENS, rows, {"phase1": phase(
            1.0, rows, 4096, broad, 0.5, {"peak": 1e-4, "end": 1e-5, "warmup_share": 0.01, "law": "cosine"}
        )},
    ) | {
        "teacher": "import_hf",
        "loss": {
            "logits_loss": "forward_kl", "temperature": 1.0, "skew": 0.1, "top_k": config_dict.placeholder(int),
            "hidden": True, "hidden_loss": "mse", "cross_entropy": 0.0,
        },
        "hidden_every": 5,
        "balance": {"load": 0.01, "z": 0.001, "capacity_factor": config_dict.placeholder(float)},
        "cache": config_dict.placeholder(str),  # of cache_teacher: then without hidden states, and no teacher in memory
        "continue_data": False,
        "baseline": False,
    }  # fmt: skip
    # Both are used if they are put among the stages: --config.stages=import_hf,prepare_data,correct_teacher,...
    config.correct_teacher = training(
        10_000_000_000, rows, {"phase1": phase(
            1.0, rows, 4096, broad, 0.5, {"peak": 2e-5, "end": 2e-6, "warmup_share": 0.05, "law": "cosine"}
        )},
    ) | {
        "balance": {"load": 0.01, "z": 0.001, "capacity_factor": config_dict.placeholder(float)},
        "continue_data": True,
    }  # fmt: skip
    config.cache_teacher = {
        "teacher": config_dict.placeholder(str),
        "top_k": 128,  # fewer than 100 cost quality
        "dtype": "float16",
        "shard_steps": 16,
    }
    config.upcycle = {
        "init_from": config_dict.placeholder(str),
        "seed": config_dict.placeholder(int),
        "granularity": 8,
        "replicas": 8,
        "top_replicas": 1,  # 8 experts a token
        "experts_per_token": config_dict.placeholder(int),
        "router": "topk_softmax",  # Mixtral's, as published
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
        "calibration": phase(1.0, rows, 4096, broad, 0.0, {"peak": 0.0}),
        "coactivation": {"share": 0.1, "sketch": 0},
        "streamed": True,
        "verify": False,
        "optimizer_state": False,
        "second_moment": "between",
    }
    config.cpt = training(
        CPT_TOKENS, rows,
        {
            # He et al. 2024: after upcycling the rate goes back to the peak of pre-training.
            "phase1": phase(0.6, rows, 4096, broad, 0.5, {"peak": 3e-4, "warmup_share": 0.002, "law": "constant"}),
            "phase2": phase(0.3, rows, 4096, quality, 0.5, {"peak": 3e-4, "end": 1e-4, "law": "cosine"}),
            "phase3": phase(0.1, rows, length, best, 0.5, {"peak": 1e-4, "end": 1e-6, "law": "1-sqrt"}),
        },
    ) | {
        "balance": {
            "load": 0.01, "z": 0.001, "sequence": 0.0, "bias_rate": 0.0,
            "capacity_factor": config_dict.placeholder(float),  # drop nothing
        },
        "continue_data": True,
        "continue_optimizer": False,
        "match_rates": False,
    }  # fmt: skip
    config.export_hf = {"family": config_dict.placeholder(str), "dtype": "bfloat16"}
    config.evaluate = {
        "init_from": config_dict.placeholder(str),
        "seed": config_dict.placeholder(int),
        "benchmarks": ("infilling",),
        "data_dir": config_dict.placeholder(str),
        "num_samples": 1,
        "temperature": 0.0,
        "max_new_tokens": 512,
        "samples": config_dict.placeholder(str),
        "infilling_source": CODE,
        "infilling_tasks": 1000,
        "infilling_window": 2000,
    }
    config.report = {"title": "KwaiCoder-23BA4"}
    return config
