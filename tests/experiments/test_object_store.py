"""The stage contract, metrics and the timeline in a bucket, as far as they can be had without a network.

The bucket is fsspec's memory behind etils' s3:// paths; like a real one, it does not know how to append. Checkpoints go
through Orbax and TensorStore to a service on this machine that answers as Google's does, in a process of its own.
"""

import pytest
from etils.epath import backend

from experiments import command, contract
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import checkpoints, files, training
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.training import devices
from tests.kwaicoder_jax.training.bucket import Bucket


@pytest.fixture
def bucket(monkeypatch):
    store = Bucket()
    store.store.clear()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: store)
    return files.path("s3://bucket/run")


def test_metrics_are_kept_and_cut_as_on_a_disk(bucket):
    folder = bucket / "cpt"
    log = training.MetricsLog(folder, None)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    log.close()
    log = training.MetricsLog(folder, 2)
    log.write({"step": 3, "loss": 0.25})
    log.close()
    found = training.read_metrics(folder / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in found] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_the_timeline_is_kept(bucket):
    line = training.timeline.Timeline(bucket)
    line.note(training.timeline.START, 0, {}, 10.0)
    line.note(training.timeline.END, 5, {"step": 4.0}, 15.0)
    assert training.timeline.summarise(training.timeline.read(bucket))["goodput"] == 0.8


def test_a_stage_is_finished_once_and_a_change_is_refused(bucket):
    ran = []

    def work(context):
        ran.append(context.identity)
        files.write_text(context.folder / "result.txt", "done")
        return {"number": 7}

    stage = contract.Stage("report", work)

    def run(title, **options):
        config = contract.Section({"seed": 0, "stages": ("report",), "report": {"title": title}})
        return contract.run(contract.Context(stage, config, bucket, Display(), Stop()), **options)

    assert run("a")["number"] == run("a")["number"] == 7
    assert len(ran) == 1
    with pytest.raises(UserError, match=r"report\.title: was 'a', is now 'b'"):
        run("b")
    assert (bucket / "report" / "result.txt").read_text() == "done"


def test_a_run_in_a_bucket_is_stopped_cut_off_and_gone_on_with_to_the_same_bits():
    got = devices.run("training.run_in_bucket", 1)
    assert (got["first"], got["second"], got["whole_before"]) == (12, 17, 15)
    assert got["warnings"] == ["the checkpoint of step 17 is not whole, and passed over"]
    assert (got["step"], got["same"], got["table"]) == (24, True, True)
    assert got["streamed"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not got["seen_early"]
    assert not got["left"]


def test_checkpoints_elsewhere_than_on_a_disk_or_with_google_are_refused_in_one_line():
    with pytest.raises(UserError) as caught:
        checkpoints.CheckpointStore("s3://bucket/cpt/checkpoints")
    assert str(caught.value) == (
        "s3://bucket/cpt/checkpoints: checkpoints cannot lie on s3://, which Orbax does not write; use a disk or gs://"
    )


def test_a_work_folder_in_a_bucket_stays_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place, expected in (("gs://bucket/run", "gs://bucket/run"), ("runs/a", f"{tmp_path}/runs/a")):
        monkeypatch.setattr(command, "_flag", lambda name, place=place: place)
        assert str(command.tool_workdir()) == expected
