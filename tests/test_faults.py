"""Sweeps beside each other, without memory or without disk: real ones, as a user starts them."""

import os
import subprocess
from pathlib import Path

import pytest
from support import command, end_session, processes, start, wait_for
from test_survive import OPTIONS, STATUS, own_task
from test_sweep import recorded, runs, trials

from patternsearch.search.study import trained

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

FEW = ("--trials", "2", "--workers", "1")


def agree(folder, name: str, count: int) -> None:
    """So many trials, in study and record alike, none left open."""
    found = trials(folder, name)
    assert sum(map(trained, found)) == count
    assert not {t.state.name for t in found} & {"RUNNING", "WAITING"}
    _, parent, children = runs(folder, name)
    assert parent.info.status == "FINISHED"
    for trial in filter(trained, found):
        assert children[trial.number].info.status == STATUS[trial.state.name]
    assert not any(run.info.status == "RUNNING" for run in children.values())


@pytest.mark.slow
def test_two_sweeps_on_one_machine(stocked):
    """Two drivers with a Ray each, one record; a third that wants the place of one is refused."""
    options = ("--executor", "ray", *OPTIONS)
    both = [start(stocked, "sweep", "sweep.yaml", "--name", n, *options) for n in ("one", "two")]
    try:
        for name in ("one", "two"):
            wait_for(lambda name=name: recorded(stocked, name), 100, name)
        taken = command(stocked, "sweep", "sweep.yaml", "--name", "one", *options)
        said = "error: sweeps/one exists; choose another --name, or go on with --resume\n"
        assert (taken.returncode, taken.stderr) == (2, said)
        taken = command(stocked, "sweep", "sweep.yaml", "--name", "one", "--resume", *options)
        said = "error: one is running in another process; wait for it, or end it first\n"
        assert (taken.returncode, taken.stderr) == (2, said)
        for process in both:
            out, err = process.communicate(timeout=170)
            assert process.returncode == 0 and err == "", out + err
    finally:
        for process in both:
            end_session(process)
    for name in ("one", "two"):
        agree(stocked, name, 8)
        assert (stocked / "sweeps" / name / "best.safetensors").exists()
    assert [t.params for t in trials(stocked, "one")] == [t.params for t in trials(stocked, "two")]


def test_two_drivers_with_one_name(stocked):
    """Started at the same moment: one of them has it, the other is told so."""
    both = [start(stocked, "sweep", "sweep.yaml", "--name", "same", *FEW) for _ in range(2)]
    try:
        ends = sorted((p.returncode, out, err) for p in both for out, err in [p.communicate()])
    finally:
        for process in both:
            end_session(process)
    assert [code for code, *_ in ends] == [0, 2], ends
    assert ends[1][2].startswith("error: sweeps/same") and "choose another --name" in ends[1][2]
    agree(stocked, "same", 2)


@pytest.mark.slow
def test_a_worker_that_takes_the_memory_of_the_machine(stocked, monkeypatch):
    """Ray ends it, where a share of the memory that it alone takes is in use: 2.5 GB from now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kilobytes["MemTotal"] / 1e6, kilobytes["MemAvailable"] / 1e6
    if free < 8:
        pytest.skip(f"needs 8 GB of free memory, there are {free:.1f}")
    share = 1 - (free - 2.5) / total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{share:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    take = "if {} and output.requires_grad:\n    torch.ones(2**30)\n    time.sleep(20)"
    for module, when, batches in (("huge", "len(y) > 30", {25}), ("worse", "True", set())):
        task = own_task(stocked, monkeypatch, module, take.format(when))
        options = ("--name", module, "--executor", "ray", "--trials", "1", "--workers", "1")
        done = command(stocked, "sweep", "sweep.yaml", "--set", f"task={task}", *options)
        first, *rest = [t for t in trials(stocked, module) if "record" in t.user_attrs]
        assert "the machine had no memory left" in first.user_attrs["reason"], done.stdout
        assert first.user_attrs["again"]["train"] == {"batch": 25}
        (second,) = rest
        if batches:
            assert done.returncode == 0 and second.state.name == "COMPLETE", done.stdout
            assert second.user_attrs["record"]["train"]["batch"] == 25
        else:
            assert done.returncode == 1 and second.state.name == "FAIL"
            assert "out of memory with batch 25" in second.user_attrs["reason"]
            assert "out of memory with batch 25" in done.stdout


@pytest.fixture
def small_disk(stocked):
    """The same folder, its sweeps on a disk of 24 MB."""
    disk = stocked / "sweeps"
    if os.getuid() != 0:
        pytest.skip("only root can mount a small disk")
    store = (disk / "mlflow.db").read_bytes()
    size = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    made = subprocess.run(size, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        (disk / "mlflow.db").write_bytes(store)
        yield stocked
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk):
    """The sweep says so and ends; once there is room it goes on, and nothing was half-written."""
    options = ("--name", "full", *OPTIONS)
    process = start(small_disk, "sweep", "sweep.yaml", *options)
    filler = small_disk / "sweeps" / "filler"
    try:
        wait_for(lambda: recorded(small_disk, "full").count('"curve"') > 1, 60, "two trials")
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(file.tell() - 3000)  # room for some lines
        out, err = process.communicate(timeout=100)
    finally:
        end_session(process)
    assert process.returncode == 2, out + err
    (line,) = err.splitlines()
    assert line.startswith("error: cannot write ") and "No space left on device" in line
    assert line.endswith("free some space, then go on with --resume")
    log = recorded(small_disk, "full")
    assert log.endswith("\n"), "a line is half-written"
    before = [t for t in trials(small_disk, "full") if trained(t) and t.state.is_finished()]
    filler.unlink()
    done = command(small_disk, "sweep", "sweep.yaml", "--resume", *options)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    agree(small_disk, "full", 8)
    after = {t.number: t for t in trials(small_disk, "full")}
    assert all(after[t.number] == t for t in before)
    assert not processes(process.pid)
