"""One finished tiny recipe, shared by all tests and worker processes."""

import fcntl
import pathlib

import pytest

from tests.experiments.commands import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """A work folder in which every stage is finished. Tests copy it before they change anything."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared  # xdist: the folder above the worker's
    workdir = shared / "finished"
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker runs the recipe, the others wait for it
        run("pipeline", workdir)
    return workdir
