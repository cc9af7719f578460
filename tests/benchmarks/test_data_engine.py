"""The command runs, alone."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks import data_engine


def test_ours_alone(tmp_path, monkeypatch, capsys):
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    target = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys, "argv", ["data_engine", f"--source={source}", "--megabytes=1", "--rounds=1", f"--json={target}"]
    )
    data_engine.main()
    assert "| ours |" in capsys.readouterr().out
    (row,) = json.loads(target.read_text())
    assert row["ratio"] == 1.0
    assert row["megabytes_per_second"] > 0


def test_a_folder_without_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_engine", f"--source={tmp_path}"])
    with pytest.raises(SystemExit, match="no Python file"):
        data_engine.main()
