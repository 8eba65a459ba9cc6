"""What the tests of the search share besides fixtures: a small space, and sweeps as processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
SPACE = """\
train:
  lr: {float: [1e-3, 2.0e-2], log: true}
assignment:
  width: {int: [4, 12], step: 4}
  stem:
    mixer:
      positions:
        family: banded
        lower: {int: [0, 1]}
        upper: {same_as: lower}
        entry: {family: dense}
    stride: 2
    activation: relu
  blocks:
    repeat: {int: [0, 2]}
    each:
      one_of:
        conv:
          mixer:
            positions:
              {family: banded, lower: 1, upper: 1, entry: {families: [dense, diagonal]}}
          norm: none
          residual: false
          activation: relu
        attention:
          mixer:
            order: 3
            positions: {family: dense}
            heads: {choice: [1, 2]}
            maps:
              query: {family: dense}
              key: {family: dense}
              value: {family: dense}
              output: {family: dense}
        mlp:
          channel: [{families: [dense, low_rank]}]
  head: {regions: {choice: [1, 2]}}
experts:
  cnn:
    width: 8
    stem.mixer.positions.lower: 1
    blocks: 1
    block0: conv
    block0.conv.mixer.positions.entry: dense
    head.regions: 2
    train.lr: 0.01
"""
SWEEP = """\
task: digits
space: small.yaml
trials: 4
executor: inline
train: {epochs: 2, batch: 50}
"""


def write_sweep(folder: Path) -> None:
    (folder / "small.yaml").write_text(SPACE)
    (folder / "sweep.yaml").write_text(SWEEP)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`patternsearch ARGUMENTS` in a folder, as a user starts it, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "patternsearch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=170)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def processes(session: int) -> dict[int, str]:
    """Every process of a session that still runs: number -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if int(fields[2]) == session and state != "Z":
                found[int(entry.name)] = line
    return found


def wait_for(condition, seconds: float, what: str):
    """What `condition` gives once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


def end_session(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind, whatever a test did."""
    for number in processes(process.pid):
        os.kill(number, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        stream.close()
