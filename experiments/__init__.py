"""One command a file. `contract` keeps the promises that all stages share; no algorithm lives here."""

import os
import signal
import sys


def _stop_before_anything(number: int, frame: object) -> None:
    """Asked to stop while the imports still run: nothing is written yet, so the process ends on the spot."""
    del number, frame
    status = [word.partition("=")[2] for word in sys.orig_argv if word.startswith("--preempt_exit_code=")]
    os.write(2, b"stopped; the same command goes on from here\n")
    os._exit(int(status[-1]) if status and status[-1].isdigit() else 0)


if sys.argv[0] == "-m":  # as Python has it while it looks for the module of `python -m experiments.STAGE`
    signal.signal(signal.SIGTERM, _stop_before_anything)
