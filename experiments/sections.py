"""The fields of the config sections, for the types and ranges that are checked before a stage does anything.

Only what no library function or dataclass says already: their fields are read off them (`fields.of_function`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from experiments.fields import Count, Natural, NotNegative, Positive, Range, Seed, Share


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase; `fim` and `rate` are checked where they are built."""

    share: float
    batch_size: int
    sequence_length: int
    mixture: Mapping[str, float]
    fim: Mapping[str, Any]
    rate: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What stands beside the sections."""

    seed: Seed
    stages: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Loader:
    """loader."""

    streams: int
    workers: int = 0  # processes that read; any number gives the same batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What every stage has that draws something."""

    seed: Seed | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Drawing):
    """pretrain."""

    init_from: str | None = None
    steps: int
    phases: Mapping[str, Phase]
    optimizer: Mapping[str, Any]
    log_every: int
    eval_every: int
    save_every: int
    max_skipped_steps: Count = 10
    microbatches: Count = 1
    quantization: str = "none"
    quantize_gradients: bool = False
    spike: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectTeacher(Training):
    """correct_teacher."""

    balance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    continue_data: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheTeacher:
    """cache_teacher; what data it sees stands in distill."""

    teacher: str | None = None
    top_k: Count = 64
    dtype: str = "float16"
    shard_steps: Count = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """distill."""

    teacher: str | None = None
    loss: Mapping[str, Any]
    hidden_every: int
    continue_data: bool
    baseline: bool
    balance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cpt(Training):
    """cpt."""

    balance: Mapping[str, Any]
    continue_data: bool
    continue_optimizer: bool
    match_rates: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(Drawing):
    """What prune and upcycle share."""

    init_from: str | None = None
    steps: Count
    calibration: Phase
    streamed: bool
    verify: bool


@dataclasses.dataclass(frozen=True)
class Search:
    """prune.search."""

    max_params: Count | None
    max_active_params: Count | None
    max_bytes: Count | None
    max_latency: Positive | None
    chip: str | None
    context: Natural
    batch: Count
    candidates: Count
    batches: Count
    least: Share
    minimum: Mapping[str, float | None]
    multiples: Mapping[str, int | None]
    granularity: Count
    distill_top: Natural
    distill_steps: Natural
    distill_rate: Positive


@dataclasses.dataclass(frozen=True)
class Curve:
    """prune.curve."""

    layers: Sequence[int] = ()
    model_dim: Sequence[int] = ()
    mlp_dim: Sequence[int] = ()
    heads: Sequence[int] = ()
    kv_heads: Sequence[int] = ()
    layer_rules: Sequence[str] = ()
    leave_one_out: bool = False
    max_tokens_per_source: Count = 8192
    source: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Transform):
    """prune."""

    importance: Mapping[str, Any]
    norm_correction: bool
    protect_ends: bool
    layer_scores: str
    head_merge: bool
    target: Mapping[str, Any]
    search: Search | None = None
    curve: Curve | None = None
    scores: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Transform):
    """upcycle, but for the arguments of `upcycle.plan`."""

    coactivation: Mapping[str, Any]
    optimizer_state: bool
    second_moment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Drawing):
    """evaluate."""

    init_from: str | None = None
    benchmarks: Sequence[str]
    data_dir: str | None = None
    num_samples: Count
    temperature: float
    max_new_tokens: Count
    samples: str | None = None
    infilling_source: str
    infilling_tasks: Count
    infilling_window: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """prepare_data.engine: who does the work of places."""

    kind: str = "local"
    workers: Natural = 0
    options: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """prepare_data.quality: what scores documents, and what becomes of low scores."""

    scorer: str | None = None
    labels: str | None = None
    drop: NotNegative = 0.1
    of: str = "good"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareData(Drawing):
    """prepare_data, but for the arguments of `data.prepare`."""

    sources: Mapping[str, Any]
    tokenizer: str | None = None
    places: Mapping[str, Any] | None = None
    reading: Mapping[str, Any] | None = None
    cleaning: Mapping[str, Any] | None = None
    deduplication: Mapping[str, Any] | None = None
    decontamination: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None
    engine: Engine | None = None
    store: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """report."""

    title: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportHf:
    """import_hf; its flags have the same names."""

    source: str | None = None
    tokenizer: str | None = None
    param_dtype: str = "stored"
    dtype: str = "float32"
    specials: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportHf:
    """export_hf; its flags have the same names, but for --checkpoint, which is init_from."""

    init_from: str | None = None
    target: str | None = None
    tokenizer: str | None = None
    family: str | None = None
    dtype: str = "stored"
    max_shard_bytes: Count = 5_000_000_000
    max_length: Count | None = None
    compare: bool = False
    prompts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """What generate and serve share; their flags have the same names, but for --checkpoint, which is init_from."""

    init_from: str | None = None
    tokenizer: str | None = None
    form: str = "float"
    dtype: str | None = None
    begin: str = "auto"
    fim_order: str = "psm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Loading, Drawing):
    """generate."""

    max_new_tokens: Count = 128
    temperature: NotNegative = 0.0
    top_p: Share = 1.0
    top_k: Natural = 0
    num_samples: Count = 1
    stop: Sequence[str] = ()
    max_rows: Count = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Loading):
    """serve."""

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    model_name: str | None = None
    max_rows: Count = 8
    max_queue: Natural = 64
    max_tokens: Annotated[int, Range(2)] = 4096
    max_body_bytes: Count = 4_000_000
    grace_seconds: NotNegative = 20.0
