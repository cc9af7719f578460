"""The contract's parts without a process: identities, flattened configs, phases, stopping."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest

from experiments import command, contract, memory, stopping, training_stage, transformed
from experiments.display import Display
from kwaicoder_jax import distillation, models, testing, training, transforms
from kwaicoder_jax.errors import UserError
from tests.experiments import tiny_config


def context(tmp_path, name="one", **section):
    stage = contract.Stage(name, lambda context: {"answer": 42})
    config = {"seed": 0, "stages": (name,), name: {"x": 1, "deep": {"y": (1, 2)}, **section}}
    return contract.Context(stage, config, contract.files.path(tmp_path), Display(), stopping.Stop())


def test_identity_does_not_know_the_place(tmp_path):
    identities = set()
    for place in ("a", "b/c"):
        one = context(tmp_path / place)
        contract.run(one)
        identities.add(one.identity)
    assert len(identities) == 1


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = contract.run(context(tmp_path))

    def never(context):
        raise AssertionError("run again")

    again = context(tmp_path)
    again.stage = contract.Stage("one", never)
    assert contract.run(again) == first


@pytest.mark.parametrize(
    ("change", "field"), [({"x": 2}, "one.x"), ({"deep": {"y": (1, 3)}}, "one.deep.y"), ({"z": 0}, "one.z")]
)
def test_a_changed_field_is_named(tmp_path, change, field):
    contract.run(context(tmp_path))
    with pytest.raises(UserError) as error:
        contract.run(context(tmp_path, **change))
    assert error.value.where == field
    contract.run(context(tmp_path, **change), restart=True)


def test_how_many_read_may_change_and_what_they_read_may_not(tmp_path):
    def with_loader(**loader):
        made = context(tmp_path)
        made.stage = contract.Stage("one", lambda context: {"answer": 42}, ("loader",))
        made.config = {**made.config, "loader": loader}
        return made

    contract.run(with_loader(streams=4))
    contract.run(with_loader(streams=4, workers=2))
    with pytest.raises(UserError) as error:
        contract.run(with_loader(streams=8, workers=2))
    assert error.value.where == "loader.streams"


def failing(context):
    (context.folder / "half").write_text("half")
    raise UserError("bad", where="one.x")


def test_bad_input_that_shows_late_leaves_nothing_and_can_be_corrected(tmp_path):
    wrong = context(tmp_path)
    wrong.stage = contract.Stage("one", failing)
    with pytest.raises(UserError, match="bad"):
        contract.run(wrong)
    assert not (tmp_path / "one").exists()
    assert contract.run(context(tmp_path, x=2))["answer"] == 42


def test_a_stage_that_has_done_nothing_may_change(tmp_path):
    killed = context(tmp_path)
    killed.stage = contract.Stage("one", lambda context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        contract.run(killed)
    assert (tmp_path / "one/stage.json").exists()
    assert contract.run(context(tmp_path, x=2))["answer"] == 42


def test_a_restart_with_bad_input_keeps_what_was_finished(tmp_path):
    first = contract.run(context(tmp_path))
    wrong = context(tmp_path, x=3)
    wrong.stage = contract.Stage("one", failing)
    with pytest.raises(UserError, match="bad"):
        contract.run(wrong, restart=True)
    assert contract.run(context(tmp_path)) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    missing = context(tmp_path)
    missing.stage = contract.Stage("one", failing, inputs=lambda context: {"init_from": "prepare_data"})
    with pytest.raises(UserError, match="run prepare_data first"):
        contract.run(missing, restart=True)
    assert contract.run(context(tmp_path)) == first


@pytest.mark.parametrize(("number", "kept"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.ENOENT, False)])
def test_a_full_disk_keeps_what_was_written(tmp_path, number, kept):
    def full(context):
        (context.folder / "checkpoints/.0.partial").mkdir(parents=True)
        try:
            raise OSError(number, "No space left on device")
        except OSError as error:
            raise UserError("no room", remedy="make room") from error

    stopped = context(tmp_path)
    stopped.stage = contract.Stage("one", full)
    with pytest.raises(UserError, match="no room"):
        contract.run(stopped)
    assert (tmp_path / "one" / "checkpoints").exists() == kept


def reader(tmp_path, work=None, **section):
    """A stage that leaves a file, and reads the one that its config names."""

    def run(context):
        place = context.section.get("scores")
        if work is not None:
            work(context)
        text = contract.files.path(place).read_text() if place else "measured"
        (context.folder / "scores.npz").write_text(text)
        return {"scores": text}

    one = context(tmp_path, **section)
    one.stage = contract.Stage("one", run, other_files=lambda c: {"scores": c.section["scores"]} if section else {})
    return one


def test_a_restart_can_read_a_file_of_the_run_that_it_replaces(tmp_path):
    contract.run(reader(tmp_path))
    own = {"scores": str(tmp_path / "one" / "scores.npz")}
    with pytest.raises(ZeroDivisionError):
        contract.run(reader(tmp_path, lambda context: 1 / 0, **own), restart=True)
    (tmp_path / "one" / "scores.npz").unlink()  # as if the kill had come before the file was copied
    again = contract.run(reader(tmp_path, **own))
    assert again["scores"] == "measured"
    assert contract.run(reader(tmp_path, **own)) == again  # finished: its input is still there
    assert contract.run(reader(tmp_path, **own), restart=True)["scores"] == "measured"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def test_a_restart_that_fails_restores_the_run_whose_file_it_reads(tmp_path):
    first = contract.run(reader(tmp_path))

    def broken(context):
        try:
            (tmp_path / "nowhere").read_text()
        except OSError as error:
            raise UserError("not a file of scores") from error

    with pytest.raises(UserError, match="not a file of scores"):
        contract.run(reader(tmp_path, broken, scores=str(tmp_path / "one" / "scores.npz")), restart=True)
    assert contract.run(reader(tmp_path)) == first


def test_what_a_kill_left_of_the_replaced_run_is_not_taken_for_the_finished_one(tmp_path):
    """The kill came after summary.json was written, while the old folder was being removed."""
    first = contract.run(context(tmp_path))
    aside = tmp_path / ".one.replaced"
    aside.mkdir()
    (aside / "junk").write_text("")
    wrong = context(tmp_path, x=3)
    wrong.stage = contract.Stage("one", failing)
    with pytest.raises(UserError, match="bad"):
        contract.run(wrong, restart=True)
    assert contract.run(context(tmp_path)) == first
    aside.mkdir()
    assert contract.run(context(tmp_path)) == first
    assert not aside.exists()


def test_restarts_that_were_killed_keep_the_last_finished_run_aside(tmp_path):
    contract.run(context(tmp_path))
    for _ in range(2):
        killed = context(tmp_path)
        killed.stage = contract.Stage("one", lambda context: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            contract.run(killed, restart=True)
        assert (tmp_path / ".one.replaced" / "summary.json").exists()
    assert contract.run(context(tmp_path))["answer"] == 42
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def test_a_restart_leaves_a_running_stage_alone(tmp_path):
    def second(running):
        with pytest.raises(UserError, match="another process is running this stage"):
            contract.run(context(tmp_path), restart=True)
        return {}

    first = context(tmp_path)
    first.stage = contract.Stage("one", second)
    contract.run(first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("name", ["stage.json", "summary.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    contract.run(context(tmp_path))
    (tmp_path / "one" / name).write_text('{"seconds": ')
    with pytest.raises(UserError, match=f"{name}: is not JSON"):
        contract.run(context(tmp_path))


def test_a_field_that_is_not_there_is_named():
    section = contract.Section({"a": {"b": {"c": 1}}, "d": (1, 2)})
    assert section["a"]["b"]["c"] == 1
    assert section == {"a": {"b": {"c": 1}}, "d": (1, 2)}
    with pytest.raises(UserError, match=r"^a\.b\.x: is missing"):
        section["a"]["b"]["x"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eval_every": 0}, "cpt.eval_every: 0 is less than 1"),
        ({"steps": "6"}, "cpt.steps: '6' is not of type int"),
        ({"other": 1}, "cpt.other: no such field"),
        ({}, "cpt.steps: is missing"),
    ],
)
def test_built_from_a_section(values, words):
    with pytest.raises(UserError, match=words):
        training_stage.build(training.LoopConfig, ({} if not values else {"steps": 3}) | values, "cpt")


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (training.OptimizerConfig, {"epsilon": -1.0}, "epsilon"),
        (training.OptimizerConfig, {"b2": 1.0}, "b2"),
        (training.OptimizerConfig, {"clip_norm": 0.0}, "clip_norm"),
        (training.PhaseRate, {"steps": 4, "peak": -1.0}, "peak"),
        (distillation.DistillConfig, {"temperature": 0.0}, "temperature"),
        (distillation.DistillConfig, {"hidden_loss": "l1"}, "hidden_loss"),
        (models.Runtime, {"remat": "some"}, "remat"),
        (models.Runtime, {"experts": "fast"}, "experts"),
        (models.Runtime, {"attention": "fast"}, "attention"),
        (models.Runtime, {"scan_unroll": -1}, "scan_unroll"),
    ],
)
def test_a_value_that_cannot_be_is_named_as_in_the_config(cls, values, words):
    with pytest.raises(UserError, match=rf"^stage\.part\.{words}: "):
        training_stage.build(cls, values, "stage.part")


def test_lists_of_names_may_be_given_with_commas():
    assert command._lists({"a": ("x,y",), "b": ("x", "y"), "c": 3}) == {"a": ("x", "y"), "b": ("x", "y"), "c": 3}


@pytest.mark.parametrize(
    ("words", "kept", "nones"),
    [
        (["--config.a.b=None", "--x=1"], ["--x=1"], ["a.b"]),
        (["--config.a=3", "--config.b=None", "-config.a=None"], [], ["a", "b"]),
        (["--config.a=None", "--config.a=3"], ["--config.a=None", "--config.a=3"], []),
        (["--workdir=None", "--config=None"], ["--workdir=None", "--config=None"], []),
        (["--config.a.b", "None", "--x", "None"], ["--x", "None"], ["a.b"]),
    ],
)
def test_fields_that_are_set_to_none_are_taken_off_the_command_line(words, kept, nones):
    assert command._split_nones(words) == (kept, nones)


def test_any_field_can_be_unset():
    config = tiny_config.get_config()
    config.lock()
    for name in ("prune.target.mlp_dim", "cpt.init_from", "prune.search.max_params", "prune.search"):
        command._set_none(config, name)
    assert config.prune.target.mlp_dim is None
    assert config.prune.search is None
    for name in ("prune.target.width", "nowhere.a"):
        with pytest.raises(KeyError):
            command._set_none(config, name)


def test_a_stage_s_own_seed_comes_before_the_recipe_s(tmp_path):
    assert context(tmp_path).seed == 0
    assert context(tmp_path, seed=None).seed == 0
    assert context(tmp_path, seed=3).seed == 3


def test_inputs_that_cannot_be_started_from_are_named(tmp_path):
    contract.run(context(tmp_path, "other"))
    one = context(tmp_path)
    one.config["stages"] = ("other", "one")
    for name, words in (("other", "one.init_from: other leaves no checkpoint"), ("one", "one.init_from: one is not")):
        one.stage = contract.Stage("one", failing, inputs=lambda context, name=name: {"init_from": name})
        with pytest.raises(UserError, match=words):
            contract.run(one)
    (tmp_path / "one/checkpoints").mkdir(parents=True)
    for name in ("stage", "summary"):
        (tmp_path / f"one/{name}.json").write_text('{"identity": "x"}')
    with pytest.raises(UserError, match=r"one\.init_from: a stage cannot start from itself"):
        contract.run(one, restart=True)


def test_a_result_that_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
    config = testing.dense_config()
    record = transforms.upcycle.plan(config, granularity=4, replicas=2)
    needed = 4 * record["params_total"]
    for free in (needed, None):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        transformed.check_memory(context(tmp_path, "upcycle"), record)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    with pytest.raises(
        UserError, match=r"^upcycle\.streamed: .* set upcycle\.streamed=True .* fewer upcycle\.replicas"
    ):
        transformed.check_memory(context(tmp_path, "upcycle"), record)


def test_free_memory_is_what_the_kernel_says(tmp_path, monkeypatch):
    assert 0 < memory.available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available() == 7 * 1024
    for name, text in (("max", "5000"), ("current", "4500"), ("stat", "anon 1\ninactive_file 30\nactive_file 4\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available() == 5000 - (4500 - 34)
    (tmp_path / "memory.max").write_text("max")
    assert memory.available() == 7 * 1024
    (tmp_path / "meminfo").unlink()
    assert memory.available() is None


def test_a_model_with_fewer_rows_than_tokens_is_refused():
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=500))
    training_stage.check_vocabulary(500, corpus, "model.vocab_size")
    with pytest.raises(UserError, match=r"^model\.vocab_size: a vocabulary of 499 is less than the 500 tokens"):
        training_stage.check_vocabulary(499, corpus, "model.vocab_size")


def section(steps, *shares):
    shape = {"batch_size": 4, "sequence_length": 32, "mixture": {"a": 1.0}, "fim": {}, "rate": {"peak": 1.0}}
    return {"steps": steps, "phases": {f"phase{i}": {"share": s, **shape} for i, s in enumerate(shares)}}


def test_phases_add_up_to_the_steps():
    phases = training_stage.phases_of(section(101, 0.5, 0.3, 0.2), "cpt")
    assert [phase.steps for phase in phases.data] == [50, 31, 20]
    assert [phases.phase_of(step) for step in (0, 49, 50, 80, 81, 100)] == [1, 1, 2, 2, 3, 3]
    assert phases.rates[1].start == phases.rates[0].end


@pytest.mark.parametrize(
    ("steps", "shares"), [(2, (1, 1, 1)), (10, (1, 0)), (10, ()), (3, (100, 1, 1)), (5, (float("nan"),)), (0, (1,))]
)
def test_phases_without_a_step_are_refused(steps, shares):
    with pytest.raises(UserError, match=r"cpt\."):
        training_stage.phases_of(section(steps, *shares), "cpt")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"fim": {"rate": 2.0}}, "fim.rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"mixture": {"a": -1.0}}, "mixture"),
        ({"rate": {"peak": 1.0, "law": "cubic"}}, "rate.law"),
        ({"rate": {"peak": 1.0, "warmup_share": 1.5}}, "rate.warmup_share"),
    ],
)
def test_what_is_wrong_with_a_phase_is_named_as_in_the_config(change, field):
    config = section(10, 1)
    config["phases"]["phase0"] |= change
    with pytest.raises(UserError, match=rf"^cpt\.phases\.phase0\.{field}: "):
        training_stage.phases_of(config, "cpt")


def test_a_signal_is_deferred_inside_a_loop_and_raised_after_it():
    stop = stopping.Stop()

    def loop():
        with stop.deferred():
            stop._handle(signal.SIGTERM, None)
            assert stop.requested

    with pytest.raises(stopping.Stopped):
        loop()
    with pytest.raises(stopping.Stopped):
        stop._handle(signal.SIGTERM, None)


def test_where_nothing_would_be_lost_a_signal_raises_at_once():
    def asked_while_idle(stop):
        with stop.deferred():
            stop.idle(True)
            stop._handle(signal.SIGTERM, None)

    def idle_after_it_was_asked(stop):
        with stop.deferred():
            stop.idle(False)
            stop._handle(signal.SIGTERM, None)
            assert stop.requested
            stop.idle(True)
            pytest.fail("it goes on")

    for work in (asked_while_idle, idle_after_it_was_asked):
        with pytest.raises(stopping.Stopped):
            work(stopping.Stop())
