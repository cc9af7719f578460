"""Several processes that run one command together, as a launcher starts them."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

from tests.experiments import commands

TOY = "tests/experiments/toy_config.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def quick(devices: int, **more: str) -> dict[str, str]:
    """The environment of a process that compiles fast; other bits than one that compiles well."""
    found = commands.environment(devices, **more)
    found["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return found


class Crowd:
    """Processes that were started together; their output goes to files in `logs`."""

    def __init__(
        self, module: str, workdir: Any, count: int, *arguments: str, devices: int = 1, config: str = TOY, **more: str
    ):
        port, self.logs = free_port(), pathlib.Path(f"{workdir}.logs")
        self.logs.mkdir(exist_ok=True)
        environment = quick(devices, **more)
        together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"] if count > 1 else []
        self.processes = []
        for number in range(count):
            own = [f"--process_id={number}"] if count > 1 else []
            command = [
                sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}", *together, *own, *arguments
            ]  # fmt: skip
            with open(self.logs / f"{number}", "w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=commands.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def statuses(self, timeout: float = 120) -> list[int]:
        """The exit statuses, when all have ended."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"they do not end: {self.output()}") from None
        finally:
            self.kill()

    def kill(self, *numbers: int) -> None:
        for number in numbers or range(len(self.processes)):
            self.processes[number].kill()

    def output(self, number: int | None = None) -> str:
        return "\n".join(
            (self.logs / f"{each}").read_text()
            for each in range(len(self.processes)) if number in (None, each)
        )  # fmt: skip

    def wait_for_file(self, file: pathlib.Path) -> None:
        """Until it is there."""
        deadline = time.monotonic() + 200
        while not file.exists():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def wait_for(self, folder: pathlib.Path, step: int) -> None:
        """Until a step is in the metrics."""
        deadline = time.monotonic() + 300
        file = folder / "metrics.jsonl"
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            if file.exists() and f'"step": {step},' in file.read_text():
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"no step {step}: {self.output()}")


def last_step(stage: pathlib.Path) -> int:
    """Of the metrics, or 0."""
    file = stage / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved_step(stage: pathlib.Path) -> int:
    """Of the newest checkpoint that has its name, or 0."""
    folder = stage / "checkpoints"
    return max((int(each.name) for each in folder.glob("*") if each.name.isdigit()), default=0)


def arrays(stage: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, whoever wrote it."""
    from kwaicoder_jax import checkpoints

    newest = checkpoints.find(stage) / str(checkpoints.newest_step(stage))
    return {
        f"{item}/{name}": tensor.read()
        for item in ("params", "train")
        if (newest / item).exists()
        for name, tensor in checkpoints.open_tensors(stage, item).items()
    }


def assert_same_bits(one: pathlib.Path, other: pathlib.Path) -> None:
    """Both stages ended in the same state, by the same steps, at the same position of the data."""
    from kwaicoder_jax import checkpoints

    first, second = arrays(one), arrays(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name
    assert commands.records(one) == commands.records(other)
    assert checkpoints.read_meta(one)["loader"] == checkpoints.read_meta(other)["loader"]


def cpu_seconds() -> float:
    return sum(os.times()[2:4])
