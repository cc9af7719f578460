"""The whole recipe on a laptop: `make demo`, or

    python -m experiments.pipeline --config=configs/demo.py --workdir=runs/demo

Two CPU cores, no accelerator, at most 10 minutes and 6 GB. Code, documentation and arithmetic found or made on the
machine train a small teacher, which is pruned, distilled, split into a mixture and trained on.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

CODE, PACKAGES, KNOWLEDGE, MATHEMATICS = "standard_library", "installed_packages", "knowledge", "mathematics"


def phase(share: float, mixture: dict[str, float], fim_rate: float, rate: dict) -> ConfigDict:
    """One phase; `share` is its part of the stage's steps."""
    shape = {"batch_size": 8, "sequence_length": 256}
    fim = {"rate": fim_rate, "spm_rate": 0.5, "unit": "mixed"}
    return ConfigDict({"share": share, **shape, "mixture": mixture, "fim": fim, "rate": rate})


def seed() -> Any:
    """A seed of a stage's own, in place of the recipe's."""
    return config_dict.placeholder(int)


def training(steps: int, phases: dict[str, ConfigDict]) -> dict:
    """What every training stage has."""
    return {
        "init_from": config_dict.placeholder(str),  # a stage of this work folder, or a stage folder anywhere
        "seed": seed(),
        "steps": steps,
        "phases": phases,
        "optimizer": {"b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
        "log_every": 10,
        "eval_every": 50,
        "save_every": 50,
        "microbatches": 1,  # parts of a batch that are worked on one after the other
        "quantization": "none",  # or int8, fp8: of dense projections
        "quantize_gradients": False,
        "max_skipped_steps": 10,  # in a row, without a finite gradient; then training ends
    }


def mixture_sizes(kind: type) -> dict:
    """The sizes that only a mixture has, left as they are."""
    return {
        name: config_dict.placeholder(kind) for name in ("experts", "expert_dim", "shared_dim", "experts_per_token")
    }


def search() -> dict:
    """The search for a shape: on as soon as a limit is set, and `prune.target` is not read then."""
    return {
        "max_params": config_dict.placeholder(int),
        "max_active_params": config_dict.placeholder(int),
        "max_bytes": config_dict.placeholder(int),  # of the weights as they are stored
        "max_latency": config_dict.placeholder(float),  # seconds of a decode step on `chip`, a bound from below
        "chip": config_dict.placeholder(str),
        "context": 4096,  # tokens in the cache, for the latency
        "batch": 1,  # sequences decoded together, for the latency
        "candidates": 16,  # shapes that are pruned in memory and compared with the teacher
        "batches": 4,  # calibration batches to compare on
        "least": 0.5,  # share of each size that stays at least
        "minimum": {  # the same for one size; 1 leaves it alone
            **{
                name: config_dict.placeholder(float) for name in ("layers", "model_dim", "mlp_dim", "heads", "kv_heads")
            },
            **mixture_sizes(float),
        },
        "multiples": {"layers": 1, "model_dim": 32, "mlp_dim": 32, "heads": 1, "kv_heads": 1, **mixture_sizes(int)},
        "granularity": 4,  # divides mlp_dim, for upcycling
        "distill_top": 0,  # distil the best few for a moment, and choose among them by validation loss
        "distill_steps": 0,
        "distill_rate": 1e-3,
    }


def get_config() -> ConfigDict:
    """The recipe, one section a stage."""
    broad = {CODE: 0.35, PACKAGES: 0.35, KNOWLEDGE: 0.2, MATHEMATICS: 0.1}
    quality = {CODE: 0.5, PACKAGES: 0.25, KNOWLEDGE: 0.1, MATHEMATICS: 0.15}
    best = {CODE: 0.7, PACKAGES: 0.1, KNOWLEDGE: 0.05, MATHEMATICS: 0.15}

    config = ConfigDict()
    config.seed = 0
    config.stages = ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate", "report")
    config.mesh = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}
    config.runtime = {"remat": "none", "scan_unroll": 0, "attention": "auto", "experts": "auto", "routing": "auto"}
    config.loader = {"streams": 4, "workers": 0}
    config.validation = {"batch_size": 16, "sequence_length": 256, "max_tokens_per_source": 20_000}

    config.prepare_data = {
        "sources": {
            CODE: {"kind": "standard_library", "max_bytes": 3_000_000},
            PACKAGES: {"kind": "installed_packages", "max_bytes": 3_000_000},
            KNOWLEDGE: {"kind": "knowledge", "max_bytes": 1_500_000},
            MATHEMATICS: {"kind": "mathematics", "max_bytes": 800_000, "seed": 0},
        },
        "vocab_size": 4096,
        "tokenizer": config_dict.placeholder(str),  # import_hf's, or a tokenizer.json, instead of a new one
        "valid_fraction": 0.04,
        "seed": seed(),
    }
    config.model = {  # the teacher; vocab_size comes from the tokenizer
        "layers": 6,
        "model_dim": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "mlp_dim": 384,
    }
    config.pretrain = training(
        500, {"phase1": phase(1.0, broad, 0.3, {"peak": 3e-3, "end": 2e-4, "warmup_share": 0.06, "law": "cosine"})}
    )
    config.correct_teacher = training(  # put it among the stages, behind pretrain; distill's teacher is then this one
        100, {"phase1": phase(1.0, broad, 0.3, {"peak": 3e-4, "end": 3e-5, "warmup_share": 0.05, "law": "cosine"})}
    ) | {
        "balance": {"load": 0.01, "z": 0.001, "capacity_factor": config_dict.placeholder(float)},
        "continue_data": True,
    }
    config.prune = {
        "init_from": config_dict.placeholder(str),
        "seed": seed(),
        "steps": 16,  # calibration batches
        "calibration": phase(1.0, broad, 0.0, {"peak": 0.0}),
        "importance": {"batch": "l2", "sequence": "mean", "weight_aware": False},
        "norm_correction": True,
        "protect_ends": True,  # never drop the first and the last layer
        "layer_scores": "influence",  # or "block", or "leave_one_out"
        "head_merge": False,  # add to kept query heads what they have beyond the dropped ones
        "target": {"layers": 4, "model_dim": 96, "mlp_dim": 256, "heads": 4, "kv_heads": 2, **mixture_sizes(int)},
        "search": search(),
        "curve": {  # sizes to cut alone and measure: what pruning costs before any training
            **{name: () for name in ("layers", "model_dim", "mlp_dim", "heads", "kv_heads")},
            "layer_rules": (),  # "deepest", "shallowest", beside importance
            "leave_one_out": False,  # also the loss without each layer
            "max_tokens_per_source": 8_192,
            "source": config_dict.placeholder(str),  # all sources, or one
        },
        "scores": config_dict.placeholder(str),  # a scores.npz of an earlier run, instead of calibration
        "streamed": False,  # from checkpoint to checkpoint, for models larger than memory
        "verify": True,  # of a streamed model: compare losses, with both models in memory
    }
    config.distill = training(
        80, {"phase1": phase(1.0, broad, 0.3, {"peak": 2e-3, "end": 2e-4, "warmup_share": 0.05, "law": "cosine"})}
    ) | {
        "teacher": config_dict.placeholder(str),  # correct_teacher where it is among the stages, else pretrain
        "loss": {
            "logits_loss": "forward_kl",  # or reverse_kl, jensen_shannon, skewed_kl, cosine, mse
            "temperature": 1.0,
            "skew": 0.1,  # the teacher's share in the mixture of skewed_kl
            "top_k": config_dict.placeholder(int),  # the teacher's likeliest tokens, and the rest as one bucket
            "hidden": True,
            "hidden_loss": "mse",  # or cosine
            "cross_entropy": 0.0,
        },
        "hidden_every": 1,  # every n-th kept layer is taught
        "balance": {
            "load": 0.01,
            "z": 0.001,
            "capacity_factor": config_dict.placeholder(float),
        },  # of a student that is a mixture
        "cache": config_dict.placeholder(str),  # cache_teacher, or a folder: learn from files, without hidden states
        "continue_data": True,  # go on in the data where the stage before ended, so that nothing comes twice
        "baseline": True,  # also train the student without the teacher, to compare
    }
    config.cache_teacher = {  # put it among the stages, before distill
        "teacher": config_dict.placeholder(str),  # as distill.teacher
        "top_k": 64,  # tokens kept at each position
        "dtype": "float16",  # of their log-probabilities, or bfloat16, float32
        "shard_steps": 16,  # a run that was killed loses at most so many steps
    }
    config.upcycle = {
        "init_from": config_dict.placeholder(str),
        "seed": seed(),
        "granularity": 4,
        "replicas": 2,
        "top_replicas": 1,
        "experts_per_token": config_dict.placeholder(int),  # lossy unless a multiple of granularity
        "router": "topk_softmax",  # or softmax_topk_renormalised, sigmoid; softmax_topk is lossy
        "routed_scale": 1.0,  # of the sigmoid router
        "router_bias": False,  # a selection bias per expert, for the sigmoid router
        "router_init": "normal",  # or zeros, orthogonal, centroids
        "router_std": config_dict.placeholder(float),
        "scale_placement": "balanced",  # or down, up; cube_root is lossy
        "partition": "contiguous",  # or balanced, random, coactivation, ..._per_replica, or one for each replica
        "shared_neurons": 0,  # most important neurons of a layer, which form an always-on expert
        "shared_gate": False,
        "shared_scale": config_dict.placeholder(float),  # lossy unless 2 behind a gate and 1 without
        "drop_ratio": 0.0,  # share of an expert's neurons to draw anew; lossy
        "drop_replicas": (),  # indices of the replicas that it concerns; none named for all
        "allow_lossy": False,
        "steps": 8,  # calibration batches, where scores or statistics are needed
        "calibration": phase(1.0, broad, 0.0, {"peak": 0.0}),
        "coactivation": {"share": 0.1, "sketch": 0},
        "streamed": False,  # from checkpoint to checkpoint, for models larger than memory
        "verify": True,  # of a streamed model: compare it with the dense one, with both in memory
        "optimizer_state": False,  # take Adam's moments along, for cpt.continue_optimizer
        "second_moment": "between",  # or signal, noise: what the gradients are taken to be made of
    }
    config.cpt = training(
        200,
        {
            "phase1": phase(0.5, broad, 0.5, {"peak": 1.5e-3, "warmup_share": 0.1, "law": "constant"}),
            "phase2": phase(0.3, quality, 0.5, {"peak": 1.5e-3, "end": 7e-4, "law": "cosine"}),
            "phase3": phase(0.2, best, 0.3, {"peak": 7e-4, "end": 2e-5, "law": "1-sqrt"}),
        },
    ) | {
        "balance": {"load": 0.01, "z": 0.001, "capacity_factor": config_dict.placeholder(float)},
        "continue_data": True,
        "continue_optimizer": False,  # with Adam's moments, from upcycle.optimizer_state
        "match_rates": False,  # learning rate times s, epsilon over s * R, on matrices that upcycling scaled by s
    }
    config.evaluate = {
        "init_from": config_dict.placeholder(str),
        "seed": seed(),
        "benchmarks": ("house_functions", "infilling"),
        "data_dir": config_dict.placeholder(str),  # folder of public benchmark files
        "num_samples": 4,
        "temperature": 0.4,
        "max_new_tokens": 48,
        "samples": config_dict.placeholder(str),  # a file of samples to score; no checkpoint is read then
        "infilling_source": CODE,
        "infilling_tasks": 48,
        "infilling_window": 350,  # characters on each side
    }
    config.report = {"title": "From real code to an upcycled model"}
    return config
