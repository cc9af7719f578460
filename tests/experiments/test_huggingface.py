"""import_hf and export_hf as a user runs them: a model comes in, goes through stages, leaves, and loads in transformers."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import contract, export_hf, import_hf, stopping
from experiments.display import Display
from kwaicoder_jax import checkpoints, data, huggingface, models
from kwaicoder_jax.errors import UserError
from tests.experiments import commands
from tests.kwaicoder_jax.huggingface import tiny

torch, transformers = tiny.torch, tiny.transformers


def tool(name, *arguments, status=0):
    """Runs a tool without a config, in a process of its own."""
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    environment = commands.environment()
    done = subprocess.run(command, cwd=commands.ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stderr
    if status == 2:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert not done.stdout
    return done.stderr


def here(module, workdir, **section):
    """The context of a tool in this process."""
    values = contract.Section({"seed": 0, "stages": (), module.STAGE.name: {**module.DEFAULTS, **section}})
    place = None if workdir is None else contract.files.path(workdir)
    return contract.Context(module.STAGE, values, place, Display(), stopping.Stop())


def imports(workdir, source, **section):
    return contract.run(here(import_hf, workdir, source=str(source), **section))


def exports(checkpoint, target, **section):
    return export_hf.write(here(export_hf, None, **section), pathlib.Path(checkpoint), target)


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A Llama of transformers with the tokenizer of the tiny recipe's corpus, and some rows of padding."""
    place = tmp_path_factory.mktemp("source") / "llama"
    tokenizer = data.Tokenizer.from_file(finished / "prepare_data/corpus/tokenizer.json")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 6, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place, max_shard_size="20KB")
    (place / "tokenizer.json").write_text(tokenizer.serialized())
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "mark": 7}))
    return place


@pytest.fixture(scope="module")
def imported(finished, folder, tmp_path_factory):
    """A work folder with that model and the tiny recipe's corpus."""
    workdir = tmp_path_factory.mktemp("imported")
    shutil.copytree(finished / "prepare_data", workdir / "prepare_data")
    output = tool("import_hf", f"--source={folder}", f"--workdir={workdir}")
    assert "LlamaForCausalLM" in output
    assert "MB" in output
    return workdir


def test_what_an_import_leaves(imported, folder, finished):
    summary = commands.summary(imported / "import_hf")
    source = huggingface.open_model(folder)
    assert summary.items() >= {"params_total": models.count(source.config), "padding_rows": 6, "tensors": 29}.items()
    assert summary["vocab_size"] == source.tokenizer.vocab_size
    meta = checkpoints.read_meta(imported / "import_hf")
    assert models.ModelConfig.from_dict(meta["model"]) == source.config
    assert meta["tokenizer"] == source.tokenizer.hash
    assert meta["lineage"][0]["huggingface"]["token_ids"]["pad_token_id"] == 1
    assert str(folder.parent) not in json.dumps(meta)
    arrays = commands.arrays(imported / "import_hf")
    table = arrays["params['embedding']"]
    np.testing.assert_array_equal(table, source.tensors["model.embed_tokens.weight"].rows(0, len(table)))


def test_it_is_not_run_again_and_notices_a_change(imported, folder, tmp_path):
    again = pathlib.Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    first = json.loads((imported / "import_hf/summary.json").read_text())
    assert imports(imported, again) == first
    values = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(values | {"rope_theta": 5.0, "rope_parameters": None}))
    import_hf._open.cache_clear()
    with pytest.raises(
        UserError, match=r"^import_hf.source: its input is not the one it was made from; undo the change"
    ):
        imports(imported, again)
    with pytest.raises(UserError, match=r"^import_hf.param_dtype: was 'stored', is now 'bfloat16'"):
        imports(imported, folder, param_dtype="bfloat16")
    with pytest.raises(UserError, match=r"^import_hf.dtype: 3 is not of type str"):
        imports(imported, folder, dtype=3)


RECIPE = """
import importlib.util

spec = importlib.util.spec_from_file_location("real", {real!r})
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)


def get_config():
    config = real.get_config("quick")
    config.stages = ("import_hf", "prepare_data", "prune", "upcycle", "export_hf", "report")
    config.import_hf.source = {source!r}
    config.import_hf.specials = config.import_hf.specials.__class__({{"fim_prefix": "new"}})
    config.prepare_data.sources.standard_library.max_bytes = 200_000
    config.prepare_data.sources.installed_packages.max_bytes = 200_000
    config.prepare_data.valid_fraction = 0.2
    config.validation = {{"batch_size": 4, "sequence_length": 64, "max_tokens_per_source": 600}}
    config.prune.update({{"steps": 1}})
    config.prune.target.update({{"layers": 2, "model_dim": 24, "mlp_dim": 32, "heads": 4, "kv_heads": 2}})
    config.prune.curve.update({{"layers": (2,), "mlp_dim": (32, 16), "model_dim": (), "heads": (2,),
                               "layer_rules": ("deepest",), "leave_one_out": True, "max_tokens_per_source": 500}})
    for section in (config.prune, config.upcycle):
        section.calibration.update({{"batch_size": 4, "sequence_length": 64}})
    config.export_hf.update({{"max_shard_bytes": 30_000, "prompts": ("import os", "def f(x):")}})
    return config
"""


@pytest.fixture(scope="module")
def through_the_recipe(folder, tmp_path_factory):
    """The recipe of the real model, at the size of that tiny one; its tokenizer gives its prefix token another name."""
    place = tmp_path_factory.mktemp("recipe")
    source = pathlib.Path(shutil.copytree(folder, place / "other_names"))
    text = (source / "tokenizer.json").read_text()
    assert text.count("<|fim_prefix|>") > 1
    (source / "tokenizer.json").write_text(text.replace("<|fim_prefix|>", "<|unused|>"))
    recipe = place / "recipe.py"
    recipe.write_text(RECIPE.format(real=str(commands.ROOT / "configs/smollm2_135m.py"), source=str(source)))
    commands.run("pipeline", place / "work", config=str(recipe))
    return place / "work", recipe


def test_the_curve_of_the_recipe(through_the_recipe):
    workdir, recipe = through_the_recipe
    rows = [json.loads(line) for line in (workdir / "prune/curve.jsonl").read_text().splitlines()]
    assert [(row["field"], row["size"], row["rule"]) for row in rows] == [
        ("layers", 3, "importance"), ("layers", 2, "importance"), ("layers", 2, "deepest"),
        ("mlp_dim", 32, "importance"), ("mlp_dim", 16, "importance"), ("heads", 2, "importance"),
    ]  # fmt: skip
    assert all(np.isfinite(row["loss"]) for row in rows)
    alone = json.loads((workdir / "prune/leave_one_out.json").read_text())
    assert len(alone["increase_L"]) == 3
    assert alone["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)  # the same model on the same tokens
    assert commands.summary(workdir / "prune")["curve_points"] == len(rows)
    page = (workdir / "report.html").read_text()
    for words in ("What a cut costs", "Loss without one layer", "In transformers"):
        assert words in page
    again = commands.run(
        "prune", workdir, "--config.prune.curve.mlp_dim=(48, 49)", "--restart", status=2, config=str(recipe)
    )
    assert "prune.curve.mlp_dim: 49 cannot be kept of 48; use 1 to 48" in again


def test_a_curve_goes_on_from_the_points_that_are_there(through_the_recipe, tmp_path):
    """As a kill leaves it: some points, no summary. The ones that are there are not measured again."""
    workdir, recipe = through_the_recipe
    work = pathlib.Path(shutil.copytree(workdir, tmp_path / "work"))
    place = work / "prune/curve.jsonl"
    whole = place.read_text()
    first, second, *_ = whole.splitlines(keepends=True)
    marked = json.dumps({**json.loads(second), "loss": 1000.5}) + "\n"
    place.write_text(first + marked)
    (work / "prune/summary.json").unlink()
    commands.run("prune", work, config=str(recipe))
    assert place.read_text() == whole.replace(second, marked)


def test_stages_start_from_it_and_the_mixture_leaves(through_the_recipe, tmp_path):
    """Pruned and upcycled by the recipe's own stages, exported, loaded by transformers with the same logits."""
    workdir, _ = through_the_recipe
    summary = commands.summary(workdir / "export_hf")
    assert (summary["family"], summary["padding_rows"]) == ("mixtral", 5)  # the new token took one of the six
    assert summary["weight_files"] == len(list((workdir / "export_hf/model").glob("*.safetensors"))) > 2
    assert summary["transformers_max_logit_difference"] <= 1e-4
    assert summary["transformers_same_texts"] == summary["transformers_texts"] == 2
    compared = json.loads((workdir / "export_hf/comparison.json").read_text())
    assert [text["prompt"] for text in compared["texts"]] == ["import os", "def f(x):"]
    own = data.Tokenizer.from_file(workdir / "export_hf/model/tokenizer.json")
    assert own.fim_prefix == own.vocab_size - 1
    assert own.hash == data.Corpus.open(workdir / "prepare_data/corpus").tokenizer.hash
    exports(workdir / "upcycle/checkpoints", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert all(f"**{stage}**" in card for stage in ("import_hf", "prune", "upcycle"))
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["mark"] == 7
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["eos_token_id"], values["max_position_embeddings"]) == (0, 128)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(place)
        for place in (tmp_path / "out", workdir / "export_hf/model")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = np.array([tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]], np.int32)
    config = models.ModelConfig.from_dict(checkpoints.read_meta(workdir / "upcycle")["model"])
    params = checkpoints.read_params(workdir / "upcycle", models.abstract(config))
    hidden = models.forward(params, config, ids, np.arange(ids.shape[1])[None], np.ones_like(ids)).hidden_BTD
    got = models.logits(hidden, models.projection(params))
    np.testing.assert_allclose(got, tiny.logits(one, ids, np.ones_like(ids, bool)), atol=1e-4, rtol=0)


def test_bad_imports_are_one_line_and_leave_nothing(folder, tmp_path):
    place = pathlib.Path(shutil.copytree(folder, tmp_path / "source"))
    workdir = tmp_path / "work"
    shard = sorted(place.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    error = tool("import_hf", f"--source={place}", f"--workdir={workdir}", status=2)
    assert f"{shard.name}: cannot be read as safetensors, it may be cut off" in error
    shard.write_bytes(whole)
    (place / "tokenizer.json").rename(place / "aside.json")
    with pytest.raises(UserError, match=r"^import_hf.tokenizer: the model has no tokenizer.json; name one with --tok"):
        imports(workdir, place)
    with pytest.raises(UserError, match=r"^import_hf.source \(--source\): is required; as in --source="):
        imports(workdir, "")
    assert not workdir.exists() or not list(workdir.iterdir())
    imports(workdir, place, tokenizer=str(place / "aside.json"))
    assert (workdir / "import_hf/tokenizer.json").read_text() == (place / "aside.json").read_text()


def test_bad_exports_are_one_line_and_leave_nothing(imported, tmp_path):
    checkpoint, target = imported / "import_hf", tmp_path / "out"
    assert "--target: is required; as in --checkpoint=" in tool("export_hf", f"--checkpoint={checkpoint}", status=2)
    for place, section, words in (
        (tmp_path / "x", {}, "x does not exist"),
        (checkpoint, {"family": "gpt"}, "--family: there is no family 'gpt'"),
        (checkpoint, {"family": "qwen2"}, "model.qkv_bias: no family of transformers holds this model exactly"),
    ):
        with pytest.raises(UserError, match=words):
            exports(place, target, **section)
    with pytest.raises(UserError, match=r"^export_hf.max_shard_bytes: 0 is out of range; use 1 or more"):
        contract.run(here(export_hf, tmp_path / "work", init_from=str(checkpoint), max_shard_bytes=0))
    alone = pathlib.Path(shutil.copytree(checkpoint, tmp_path / "alone/stage"))
    (alone / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"^--tokenizer: the checkpoint's tokenizer \(.*\) is in no folder beside it; name"
    ):
        exports(alone, target)
    (tmp_path / "other.json").write_text(data.tokenizer.train(["x"], 261).serialized())
    with pytest.raises(UserError, match=r"other.json: is not the tokenizer that the checkpoint was trained with"):
        exports(alone, target, tokenizer=str(tmp_path / "other.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "other.json", "tokenizer.json"]
    exports(alone, target, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="out: exists already; choose another folder or remove it"):
        exports(checkpoint, target, dtype="bfloat16")


def test_both_are_stages_of_a_pipeline(folder, finished, tmp_path):
    """Without any change between them, what comes in goes out, to the bit."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        f"    sections = {{'import_hf': {{'source': {str(folder)!r}}}, 'export_hf': {{'max_shard_bytes': 20_000}}}}\n"
        "    return ConfigDict({'seed': 0, 'stages': ('import_hf', 'export_hf'), **sections})\n"
    )
    commands.run("pipeline", tmp_path / "work", config=str(recipe))
    one, other = (
        {n: w.rows(0, w.shape[0]).tobytes() for n, w in huggingface.open_model(p).tensors.items()}
        for p in (folder, tmp_path / "work/export_hf/model")
    )
    assert one == other
