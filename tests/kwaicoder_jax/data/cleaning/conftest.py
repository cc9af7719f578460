"""Real files that every installation has."""

import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def library():
    """Some 150 modules of the standard library, by path below it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*root.glob("*.py"), *root.glob("json/*.py"), *root.glob("email/*.py")])
    texts = {str(path.relative_to(root)): path.read_bytes() for path in files}
    return {path: raw.decode() for path, raw in texts.items() if raw.strip() and b"\r" not in raw and b"\f" not in raw}
