"""A small finished work folder, written by hand, so that every number on its report is known."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

STAGES = ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e\x00\ud800\"'"
DENSE = {"layers": 2, "model_dim": 4, "mlp_dim": 8, "heads": 2, "kv_heads": 1, "vocab_size": 16, "experts": None}
SMALL = {**DENSE, "layers": 1, "model_dim": 3, "mlp_dim": 4}
MOE = {**SMALL, "experts": {"num_experts": 4, "experts_per_token": 2, "mlp_dim": 2}}
PRUNED = {
    "kept": {"layers": [1], "embed": [0, 1, 3], "mlp": [[0, 2, 4, 6]], "heads": [[0, 1]], "kv_heads": [[0]]},
    "config_before": DENSE,
    "config_after": SMALL,
}
UPCYCLED = {
    "granularity": 2, "replicas": 2, "top_replicas": 1, "experts_per_token": 2, "router": "topk_softmax", "scale": 2.0,
    "scale_placement": "balanced", "factors": {"layers/moe/down": 2.0}, "partition": {"method": "contiguous"},
    "lossless": True, "config_before": SMALL, "config_after": MOE,
}  # fmt: skip
SUMMARIES: dict[str, dict[str, Any]] = {
    "prepare_data": {"documents_train": 4321, "tokens_train": 234_567, "vocab_size": 4096},
    "pretrain": {"valid_loss_start": 8.111, "valid_loss_end": 4.222, "tokens": 8000, "steps": 20, "train_flops": 3.21e12},
    "prune": {"params_before": 900_001, "params_after": 700_001, "valid_loss_before": 4.222, "valid_loss_after": 5.333},
    "distill": {"valid_loss_start": 5.333, "valid_loss_end": 4.444, "valid_loss_end_without_teacher": 4.555,
                "tokens": 4000, "steps": 10, "train_flops": 1.5e12},
    "upcycle": {"valid_loss_dense": 4.444, "valid_loss_moe": 4.444, "max_relative_logit_error": 3.4e-7,
                "lossless": True},
    "cpt": {"valid_loss_start": 4.444, "valid_loss_end": 3.666, "tokens": 4000, "steps": 10, "train_flops": 1.6e12},
    "evaluate": {"valid_loss": 3.666, "valid_loss_code": 3.777, "house_functions_pass_at_1": 0.125,
                 "house_functions_tasks": 2, "fim_exact_match": 0.5, "fim_tasks": 2},
}  # fmt: skip


def _metrics(steps: int, start: float, end: float, **more: Any) -> list[dict[str, Any]]:
    train = [{"step": s, "tokens": 400 * s, "phase": 1, "loss": start + (end - start) * s / steps, **more}
             for s in range(1, steps + 1)]  # fmt: skip
    valid = [{"step": s, "valid_loss": x, "valid_loss_by_source": {"code": x}} for s, x in ((0, start), (steps, end))]
    return [valid[0], *train, valid[1]]


def _lines(place: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_workdir(root: pathlib.Path) -> pathlib.Path:
    for number, name in enumerate(STAGES):
        (root / name).mkdir(parents=True)
        common = {
            "seconds": 11.0 + number,
            "peak_rss_bytes": 1_230_000_000,
            "git_commit": "c0ffee",
            "started_at": "then",
        }
        (root / name / "summary.json").write_text(json.dumps({**SUMMARIES[name], **common}))
        config = {name: {"field": name}}
        if name == "cpt":
            config[name] |= {"steps": 10, "phases": {"broad": {"share": 0.5}, "best": {"share": 0.5}}}
        if name == "distill":
            config[name] |= {"loss": {"temperature": 1.0}}
        (root / name / "stage.json").write_text(json.dumps({"config": config, "inputs": {}, "identity": f"id{number}"}))
    router = {"expert_load": [[0.4, 0.1, 0.25, 0.25]], "expert_load_max_over_mean": 1.6, "router_entropy": 1.3,
              "load_balance_loss": 1.1, "router_z_loss": 2.2}  # fmt: skip
    _lines(root / "pretrain/metrics.jsonl", _metrics(20, 8.111, 4.222))
    _lines(root / "distill/metrics.jsonl", _metrics(10, 5.333, 4.444))
    _lines(root / "distill/baseline/metrics.jsonl", _metrics(10, 5.333, 4.555))
    _lines(root / "cpt/metrics.jsonl", _metrics(10, 4.444, 3.666, **router))
    rows = {"neurons_LF": (2, 8), "heads_LH": (2, 2), "channels_D": (4,), "layers_L": (2,)}
    np.savez(root / "prune/scores.npz", **{n: np.linspace(1, 2, int(np.prod(s))).reshape(s) for n, s in rows.items()})
    (root / "upcycle/verify.json").write_text(json.dumps({"layer_relative_error_L": [2.5e-7]}))
    source = {"documents_in": 5000, "duplicates": 7, "documents_train": 4321, "documents_valid": 99,
              "tokens_train": 234_567, "tokens_valid": 1234, "bytes_train": 469_134}  # fmt: skip
    (root / "prepare_data/corpus").mkdir()
    (root / "prepare_data/corpus/manifest.json").write_text(json.dumps({"sources": {"code": source}}))
    sample = {"task_id": "house/" + HOSTILE, "prompt": "def f():", "completion": HOSTILE}
    good = {"task_id": "house/b", "prompt": "def g():", "completion": "\n    pass", "status": "passed", "detail": ""}
    outcomes = [{**sample, "status": "failed", "detail": HOSTILE}, good]
    _lines(root / "evaluate/outcomes_house_functions.jsonl", outcomes)
    span = {"prefix": HOSTILE, "middle": "x = 1", "suffix": HOSTILE, "completion": "x = 1"}
    _lines(root / "evaluate/infilling.jsonl", [span, {**span, "middle": HOSTILE, "completion": HOSTILE + "!"}])
    return root


def describe(*names: str) -> dict[str, tuple[dict[str, Any], int, int]]:
    """What experiments.report reads from the checkpoints."""
    prune, upcycle = {"stage": "prune", "record": PRUNED}, {"stage": "upcycle", "record": UPCYCLED}
    known = {
        "pretrain": ({"model": DENSE, "lineage": []}, 900_001, 900_001),
        "prune": ({"model": SMALL, "lineage": [prune]}, 700_001, 700_001),
        "distill": ({"model": SMALL, "lineage": [prune]}, 700_001, 700_001),
        "distill/baseline": ({"model": SMALL, "lineage": [prune], "progress": {"train_flops": 1e12}}, 700_001, 700_001),
        "upcycle": ({"model": MOE, "lineage": [prune, upcycle]}, 1_100_001, 750_001),
        "cpt": ({"model": MOE, "lineage": [prune, upcycle]}, 1_100_001, 750_001),
    }
    return {name: known[name] for name in names or known if name in known}


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_workdir(tmp_path / "work")


@pytest.fixture
def descriptions():
    return describe


@pytest.fixture
def summaries() -> dict[str, dict[str, Any]]:
    return SUMMARIES


@pytest.fixture
def hostile() -> str:
    return HOSTILE
