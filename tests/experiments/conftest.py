"""One finished tiny recipe, shared by all tests and worker processes."""

import fcntl
import os
import pathlib

import pytest

from tests.experiments.commands import run


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all worker processes of one test run have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if folder.name.startswith("popen-") else folder  # xdist: the folder above the worker's


@pytest.fixture(scope="session", autouse=True)
def _programs_are_compiled_once(shared):
    """Two thirds of a tiny recipe's time is XLA, and many commands here compile the same programs."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    os.environ.update(settings)  # for the commands; jax in this process has read its settings already
    yield
    for name in settings:
        del os.environ[name]


@pytest.fixture(scope="session")
def finished(shared) -> pathlib.Path:
    """A work folder in which every stage is finished. Tests copy it before they change anything."""
    workdir = shared / "finished"
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker runs the recipe, the others wait for it
        run("pipeline", workdir)
    return workdir
