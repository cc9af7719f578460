"""Our TPU kernels cost what they did: cycles and bytes of the compiled schedules."""

import importlib.metadata
import json

import pytest

from benchmarks import kernel_gate

COMMITTED = json.loads(kernel_gate.FILE.read_text())


@pytest.mark.parametrize("name", kernel_gate.CASES)
def test_cycles_and_bytes_stay(name):
    """After a change that is meant: python -m benchmarks.kernel_gate."""
    assert importlib.metadata.version("libtpu") == COMMITTED["libtpu"], "another compiler has other schedules"
    found = kernel_gate.costs(name)
    assert found == {key: pytest.approx(COMMITTED[name][key], rel=kernel_gate.TOLERANCE) for key in found}
