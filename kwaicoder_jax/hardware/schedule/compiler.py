"""The child process of `compilation.py`: compiles the module in a file for one device of a topology.

python -m kwaicoder_jax.hardware.schedule.compiler MODULE TOPOLOGY

The flags of libtpu are in its environment.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jaxlib import xla_client


def main(module: str, topology: str) -> None:
    """Compiles and forgets the program; what the compiler dumps stays."""
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    with mlir.make_ir_context():
        text = ir.Module.parse(Path(module).read_text())
        device.client.compile(text, xla_client.DeviceList((device,)), options)


if __name__ == "__main__":
    main(*sys.argv[1:])
