"""The decode step as the compiler for TPU v5e makes it, on a CPU: SmolLM2-135M's sizes, 2 of its layers, 8 rows of 8192."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def programs():
    command = [sys.executable, "-m", "tests.kwaicoder_jax.inference.decode_for_tpu", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["float", "int8"])
def test_no_copy_of_a_cache(programs, form):
    """Each layer's keys and values are updated where the caller's arrays lie, and given back as the same memory."""
    program = programs[form]
    assert program["copies"] == program["copies_of_half"] == []
    assert program["updates"] == 4, "keys and values of two layers: a slot is written into each argument itself"
    assert program["aliases"] == program["rows"]
    assert program["alias_bytes"] >= program["rows_bytes"]
    # Temporaries are an embedding in the layout that its gather wants (bfloat16, 57 MB), not caches.
    assert program["temp_bytes"] < (1.5 if form == "float" else 0.25) * program["layer_bytes"]
