"""Where a study is kept: a journal in the sweep's folder, or a database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from ..config import masked
from ..errors import ConfigError

JOURNAL = "study.log"


class Journal(JournalFileBackend):
    """The journal of a sweep, whose driver is its only writer.

    It needs no lock, and does not wait for the disk at every line, which would take longer than
    the sampler: what was written survives the death of the process, if not a power cut.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        path = Path(self._file_path)
        try:
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                data = lines.encode()
                while data:
                    data = data[file.write(data) :]
        except OSError as e:
            with path.open("rb+") as file:
                file.truncate(before)
            raise ConfigError(
                f"cannot write {path}: {e.strerror}; free some space, then go on with --resume"
            ) from None


def mend(journal: Path) -> None:
    """Cut off a last line that a crash left unfinished, before another is written after it."""
    if journal.exists():
        with journal.open("rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """A database by URL, else a journal file in the sweep's folder (readable by optuna's tools)."""
    if url is None:
        try:
            return JournalStorage(Journal(str(folder / JOURNAL)))
        except (ValueError, KeyError) as e:  # a line that is not of a journal
            raise ConfigError(
                f"{folder}: its study cannot be read: {JOURNAL}: {e}; restore it, or start a new "
                "sweep"
            ) from None
    try:
        return RDBStorage(url, {"pool_pre_ping": True})  # a connection may have been cut meanwhile
    except ImportError as e:
        hint = "pip install 'patternsearch[postgresql]'" if url.startswith("postgresql") else str(e)
        raise ConfigError(f"storage={masked(url)}: its driver is not installed; {hint}") from None
    except Exception as e:  # SQLAlchemy raises many kinds, all meaning that it cannot be used
        raise ConfigError(f"storage={masked(url)}: {_first_line(e)}; check the URL") from None


def close_storage(storage: BaseStorage) -> None:
    """Let go of a database's connections."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def reachable(url: str | None) -> Iterator[None]:
    """Say in one line that the storage has gone away while the sweep ran."""
    try:
        yield
    except StorageInternalError as e:
        why = f"storage={masked(str(url))}: {_first_line(e.__cause__ or e)}"
        raise ConfigError(f"{why}; once it is back, go on with --resume") from None


def _first_line(error: BaseException) -> str:
    return masked(str(error).splitlines()[0])
