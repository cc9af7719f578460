"""What an export leaves: whole folders in bounded memory, gone on with after a kill, and models that generate alike."""

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from kwaicoder_jax import checkpoints, data, huggingface, inference, models, testing, transforms
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import shards
from kwaicoder_jax.models import ExpertsConfig, MlaConfig
from tests.kwaicoder_jax.huggingface import tiny
from tests.kwaicoder_jax.huggingface.test_round_trip import assert_same_tensors, batch, ours
from tests.kwaicoder_jax.transforms.test_prune import made_scores

ROOT = pathlib.Path(__file__).parents[3]
TOKENIZER = data.tokenizer.train(["def f(x):\n    return x + 1\n"] * 20, 270)


def dense(**changes):
    sizes = {"vocab_size": 53, "model_dim": 32, "heads": 4, "kv_heads": 2, "max_length": 64}
    return testing.dense_config(**sizes | changes)


def exported(place, params, config, **options):
    stored = checkpoints.from_params(jax.tree.map(np.asarray, params))
    planned = huggingface.plan_export(stored, config, **options)
    assert huggingface.export(stored, planned, place)
    return planned


def assert_transformers_agrees(place, params, config):
    """The folder loads, with nothing missing and nothing left over, and gives our logits."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        place, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    inputs_BT, mask_BT = batch()
    expected = tiny.logits(model, inputs_BT, mask_BT)
    np.testing.assert_allclose(ours(params, config, inputs_BT, mask_BT)[mask_BT], expected[mask_BT], atol=1e-4, rtol=0)
    return model


def assert_same_text(model, params, config):
    """12 tokens, greedily."""
    prompt = batch()[0][:1, :6]
    with torch.no_grad():
        text = model.generate(torch.from_numpy(prompt), do_sample=False, max_new_tokens=12, eos_token_id=None)[0, 6:]
    assert inference.generate(params, config, [prompt[0].tolist()], max_new_tokens=12) == [text.tolist()]


def texts_of(families, fast):
    """Of each family its logits; of one also the text, and of the others among the slow tests."""
    slow = [pytest.param(family, True, marks=pytest.mark.slow) for family in families if family != fast]
    return [(family, family == fast) for family in families] + slow


PRUNED = {"layers": 2, "model_dim": 20, "mlp_dim": 30, "heads": 2, "kv_heads": 1}
TEACHERS = {
    "llama": ({}, PRUNED),
    "mistral": ({"heads": 6, "windows": (5, 5, 5)}, {"layers": 2, "mlp_dim": 31, "heads": 3, "kv_heads": 1}),
    "qwen2": ({"qkv_bias": True, "tie_embeddings": False}, PRUNED),
    "qwen3": ({"qk_norm": "head"}, PRUNED),
}


@pytest.mark.parametrize(("family", "text"), texts_of(TEACHERS, "llama"))
def test_a_pruned_student(tmp_path, family, text):
    changes, target = TEACHERS[family]
    config = dense(**changes)
    params = testing.random_params(config)
    scores = made_scores(config)
    student, small, _ = transforms.prune.apply(params, config, scores, transforms.Target(**target))
    assert exported(tmp_path / "out", student, small).family.model_type == family
    model = assert_transformers_agrees(tmp_path / "out", student, small)
    if text:
        assert_same_text(model, student, small)


UPCYCLED = {
    "mixtral": ({}, {}),
    "qwen3_moe": ({"qk_norm": "head"}, {"router": "softmax_topk_renormalised"}),
    "qwen2_moe": ({"qkv_bias": True}, {}),
    "glm4_moe": ({}, {"router": "sigmoid", "routed_scale": 2.5, "router_bias": True}),
    "olmoe": ({"qk_norm": "full"}, {"router": "softmax_topk", "allow_lossy": True}),
    "deepseek_v3": ({"mla": MlaConfig(7, 10, 8, 4, 6), "kv_heads": 4, "head_dim": 12},
                    {"router": "sigmoid", "routed_scale": 2.5}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "text"), texts_of(UPCYCLED, "mixtral"))
def test_an_upcycled_mixture(tmp_path, family, text):
    changes, choices = UPCYCLED[family]
    config = dense(**changes)
    params = testing.random_params(config)
    moe, moe_config, _ = transforms.upcycle.apply(params, config, granularity=4, replicas=2, **choices)
    planned = exported(tmp_path / "out", moe, moe_config)
    assert planned.family.model_type == family
    model = assert_transformers_agrees(tmp_path / "out", moe, moe_config)
    if text:
        assert_same_text(model, moe, moe_config)
    source = huggingface.open_model(tmp_path / "out")
    loaded = models.flatten(huggingface.load(source))
    for name, value in models.flatten(moe).items():
        assert np.asarray(loaded[name]).tobytes() == np.asarray(value).tobytes(), name


def test_a_shared_expert_carved_from_a_student_leaves_as_qwen2_moe(tmp_path):
    config = dense(qkv_bias=True)
    params = testing.random_params(config)
    # 16 shared neurons, so that experts are 8 wide: torch's grouped product wants rows of 16 bytes
    options = {
        "granularity": 4,
        "replicas": 2,
        "shared_neurons": 16,
        "shared_gate": True,
        "scores": made_scores(config),
    }
    moe, moe_config, _ = transforms.upcycle.apply(params, config, **options)
    assert exported(tmp_path / "out", moe, moe_config).family.model_type == "qwen2_moe"
    assert_transformers_agrees(tmp_path / "out", moe, moe_config)


LINEAGE = [
    {"stage": "import_hf", "identity": "aa",
     "huggingface": {"name": "x", "family": "mistral", "token_ids": {"eos_token_id": 2}}},
    {"stage": "prune", "identity": "bb", "record": {"kept": list(range(1000)), "target": {"layers": 3}}},
]  # fmt: skip


def test_what_lies_beside_the_weights(tmp_path):
    config = dense(vocab_size=300)
    params = testing.random_params(config)
    companions = {"chat_template.jinja": "{{ x }}", "other.txt": "no"}
    planned = exported(
        tmp_path / "a", params, config, tokenizer=TOKENIZER, lineage=LINEAGE, name="small", companions=companions
    )
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "kwaicoder.json",
    }  # fmt: skip
    assert planned.padding_rows == 300 - TOKENIZER.vocab_size
    values = json.loads((tmp_path / "a/config.json").read_text())
    assert (values["model_type"], values["eos_token_id"], values["torch_dtype"]) == ("mistral", 2, "float32")
    card = (tmp_path / "a/README.md").read_text()
    for words in ("# small", "`MistralForCausalLM`", f"{models.count(config):,} parameters", "2. **prune** `bb`",
                  f"the last {planned.padding_rows} rows", 'target: {"layers": 3}', "family: mistral"):  # fmt: skip
        assert words in card
    assert "kept" not in card
    assert json.loads((tmp_path / "a/kwaicoder.json").read_text())["lineage"] == LINEAGE
    with safe_open(tmp_path / "a/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("def f(x):")["input_ids"] == [0, *TOKENIZER.encode("def f(x):")], "begun as our documents begin"


def test_the_tokenizers_own_special_tokens_are_named(tmp_path):
    config = dense(vocab_size=TOKENIZER.vocab_size)
    exported(tmp_path / "a", testing.random_params(config), config, tokenizer=TOKENIZER)
    values = json.loads((tmp_path / "a/config.json").read_text())
    assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 0, 1]
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["eos_token_id"] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.decode(TOKENIZER.encode("return x\n")) == "return x\n"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").generation_config.pad_token_id == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tokenizer": TOKENIZER},
            "model.vocab_size: the tokenizer has 270 tokens, the model 53; use the tokenizer that",
        ),
        ({"dtype": "int8"}, "--dtype: no choice 'int8'; use stored, float32"),
        ({"family": "gemma"}, "--family: there is no family 'gemma'"),
        ({"family": "qwen3"}, "model.qk_norm: no family of transformers holds this model exactly"),
        ({"max_shard_bytes": 0}, "--max_shard_bytes: 0 is not a size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, options, words):
    config = dense()
    with pytest.raises(UserError, match=f"^{words}"):
        exported(tmp_path / "out", testing.random_params(config), config, **options)
    assert not list(tmp_path.iterdir())


def test_files_are_cut_to_size():
    entries = [shards.Entry(f"t{i}", (size,), np.dtype(np.float32)) for i, size in enumerate([10, 20, 5, 100, 1, 1])]
    planned = shards.plan(entries, 120)
    assert [[entry.name for entry in shard.entries] for shard in planned] == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],
        ["t4", "t5"],
    ]
    assert planned[0].name == "model-00001-of-00004.safetensors"
    assert len(planned[0].header) % 8 == 0
    assert [shard.name for shard in shards.plan(entries, 10**6)] == ["model.safetensors"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    config = dense()
    params = testing.random_params(config)
    (tmp_path / "out").mkdir()
    exported(tmp_path / "out", params, config)  # an empty one is no loss
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    stored = checkpoints.from_params(jax.tree.map(np.asarray, params))
    assert not huggingface.export(stored, huggingface.plan_export(stored, config), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="out: exists already; choose another folder or remove it"):
        exported(tmp_path / "out", params, config.replace(rope_theta=5.0))


def test_a_full_disk_and_other_work(tmp_path, monkeypatch):
    config = dense()
    params = testing.random_params(config)
    original, files_written = shards.write, []

    def full(folder, shard, runs, written):
        if len(files_written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        files_written.append(shard.name)
        original(folder, shard, runs, written)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", full)
        with pytest.raises(
            UserError, match=r"out: No space left on device, with .* GB to write in all; make room, and the"
        ):
            exported(tmp_path / "out", params, config, max_shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    with pytest.raises(UserError, match=r"\.out\.partial: it was begun from another checkpoint, or with other choices"):
        exported(tmp_path / "out", params, config, max_shard_bytes=30_000)
    kept = {name: (tmp_path / ".out.partial" / name).stat().st_mtime_ns for name in files_written}
    exported(tmp_path / "out", params, config, max_shard_bytes=20_000)
    assert kept == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept}
    exported(tmp_path / "other", params, config, max_shard_bytes=20_000)
    assert_same_tensors(tmp_path / "out", tmp_path / "other")


def test_a_number_beyond_float16_leaves_nothing(tmp_path):
    config = dense()
    params = testing.random_params(config)
    params["layers"]["mlp"]["up"] *= 1e6
    with pytest.raises(UserError, match="layers/mlp/up: holds a number beyond float16; use another dtype"):
        exported(tmp_path / "out", params, config, dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(saved, tmp_path, kind):
    source = saved("mixtral")[0]
    if kind == "export":
        opened = huggingface.open_model(source)
        meta = {"model": opened.config.to_dict(), "lineage": [], "identity": "x"}
        source = tmp_path / "stage"
        huggingface.save(opened, source / "checkpoints", meta=meta)
    target, rng, named = tmp_path / "killed", random.Random(0), []
    command = [sys.executable, "-m", "tests.kwaicoder_jax.huggingface.until_killed", kind, str(source)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for attempt in range(4):
        with subprocess.Popen(
            [*command, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
        ) as run:
            assert run.stdout
            assert run.stdout.readline() == "begun\n"
            lines = []
            while attempt < 3 and len(lines) < 3 + 4 * attempt and (line := run.stdout.readline()):
                lines.append(line.strip())
            if attempt < 3:
                time.sleep(rng.uniform(0, 0.01))
                run.kill()
            lines += run.stdout.read().split()
        if kind == "import":  # what can be seen is whole; the signal may have come too late
            assert (target / "0").exists() == checkpoints.is_complete(target, 0)
        elif target.exists():
            huggingface.open_model(target)
        named.append([line for line in lines if "safetensors" in line or line.rsplit("/", 1)[-1][0].isdigit()])
    assert run.returncode == 0
    assert len(named[-1]) < sum(map(len, named))
    chunks = [line for run_ in named for line in run_]
    assert len(chunks) == len(set(chunks))  # what has its name is not made again
    subprocess.run(
        [*command, str(tmp_path / "whole")], cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL
    )
    assert contents(target) == contents(tmp_path / "whole")


def contents(folder):
    """Bytes of every file, without what tells the time or the folder's name."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: raw for name, raw in found.items() if not name.endswith("_CHECKPOINT_METADATA")}


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_largest_tensors(tmp_path):
    """An embedding of 134 MB and experts of 67 MB a matrix pass through in chunks of 4 MB."""
    config = transformers.MixtralConfig(**{
        **tiny.SIZES, "vocab_size": 2**19, "hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 1,
        "num_local_experts": 256, "tie_word_embeddings": True,
    })  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "in")
    experts = sum(value.nbytes for name, value in model.named_parameters() if "experts" in name)
    assert model.model.embed_tokens.weight.nbytes == 2**27
    assert experts > 190e6
    del model
    command = [sys.executable, "-m", "tests.kwaicoder_jax.huggingface.peak", str(tmp_path / "in"), str(tmp_path)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ}).stdout
    imported, exported_ = map(int, output.split())
    assert max(imported, exported_) < 64e6, output
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path)


def test_a_latent_model_with_a_shared_expert_of_another_width_stays(tmp_path):
    """The error names the field: DeepSeek's shared experts are as wide as routed ones."""
    experts = ExpertsConfig(4, 2, 12, "sigmoid", shared_mlp_dim=13)
    config = dense(mla=MlaConfig(0, 10, 8, 4, 6), kv_heads=4, head_dim=12, experts=experts)
    with pytest.raises(UserError, match=r"^model.experts.shared_mlp_dim: .*deepseek_v3: model.experts.shared_mlp_dim"):
        exported(tmp_path / "out", testing.random_params(config), config)
