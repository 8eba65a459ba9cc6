"""Where a study is kept: a journal in the sweep's folder, or a database."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
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
            with path.open("rb+", buffering=0) as file:  # a mode that makes no new file
                before, data = file.seek(0, os.SEEK_END), lines.encode()
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(before)
                    raise
        except FileNotFoundError:
            raise _gone(path) from None
        except OSError as e:
            raise ConfigError(
                f"cannot write {path}: {e.strerror}; free some space, then go on with --resume"
            ) from None

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except FileNotFoundError:
            raise _gone(Path(self._file_path)) from None


def _gone(journal: Path) -> ConfigError:
    return ConfigError(
        f"{journal} was deleted while the sweep ran; put it back, or start a new one"
    )


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


def own_study(storage: BaseStorage, folder: Path) -> str | None:
    """The name of a sweep's study; None where there is none.

    It is the folder's, but in a journal, which holds no other, what the folder was called at first.
    """
    if isinstance(storage, JournalStorage):
        names = [study.study_name for study in storage.get_all_studies()]
        if len(names) == 1:
            return names[0]
    try:
        storage.get_study_id_from_name(folder.name)
    except KeyError:
        return None
    return folder.name


def no_study(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder}: its study cannot be read: its storage has no study {folder.name!r}; if the "
        "folder was renamed, rename it back, or start a new sweep"
    )


def check_storage(url: str, folder: Path, begun: bool) -> None:
    """Raise ConfigError where a database cannot be used, or lacks the study of a begun sweep."""
    storage = open_storage(url, folder)
    try:
        if begun and own_study(storage, folder) is None:
            raise no_study(folder)
    finally:
        close_storage(storage)


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
