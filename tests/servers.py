"""Real servers on loopback for the tests of storage and record."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import wait_for


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _program(name: str) -> str:
    """Debian keeps PostgreSQL's programs off the path."""
    found = [shutil.which(name), *sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]
    program = next((f for f in reversed(found) if f), None)
    if program is None:
        pytest.skip(f"no {name} here; apt-get install postgresql")
    return program


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a new database, with its password, of a server that refuses to be run by root."""
    pytest.importorskip("psycopg", reason="no psycopg; pip install 'patternsearch[postgresql]'")
    initdb, server = _program("initdb"), _program("postgres")
    folder, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    user = {"user": "nobody", "group": "nogroup", "cwd": "/"} if os.getuid() == 0 else {}
    data, password = folder / "data", folder / "password"
    password.write_text("secret")
    if user:
        for path in (folder, password):
            shutil.chown(path, user["user"], user["group"])
    try:
        made = subprocess.run(
            [initdb, "-D", data, "-U", "sweeps", "-A", "scram-sha-256", f"--pwfile={password}",
             "-N", "-E", "UTF8"], **user, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [server, "-D", data, "-p", str(port), *(f"--{o}" for o in options)],
                **user, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            wait_for(lambda: _listens(port) or process.poll() is not None, 60, "PostgreSQL")
            assert process.poll() is None, (folder / "log").read_text()
            yield f"postgresql+psycopg://sweeps:secret@127.0.0.1:{port}/postgres"
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class MlflowServer:
    """`mlflow server` with artifacts over HTTP; it can be away and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.folder / 'server.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(self.folder / "kept"), "--serve-artifacts"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers, 120, "mlflow server")

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        return answers(f"{self.uri}/health")

    def stop(self) -> None:
        _end(self.process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)  # its workers
