"""The stage contract, metrics and the timeline in a bucket, as far as they can be had without a network.

The bucket is fsspec's memory behind etils' s3:// paths; like a real one, it does not know how to append. Checkpoints are
left out: TensorStore talks to the service itself.
"""

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from experiments import contract
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import files, training
from kwaicoder_jax.errors import UserError


class Bucket(MemoryFileSystem):
    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("s3://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode.startswith("a"):
            raise NotImplementedError("objects are written whole")
        return super()._open(path, mode, **options)


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
