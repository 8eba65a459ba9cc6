"""The embedded MLflow store: a sqlite file beside the sweeps, with their artifacts."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock

from .config import masked
from .data.fetch import cache_folder
from .errors import TrackingError

_SCHEME = "sqlite:///"


def default_uri(folder: Path) -> str:
    """The store beside a sweep's folder, shared by the sweeps there."""
    return f"{_SCHEME}{folder.resolve().parent / 'mlflow.db'}"


def artifact_location(uri: str) -> str | None:
    """Files go beside a sqlite store, not into whatever folder this runs in; others have theirs."""
    path = _path(uri)
    return None if path is None else (path.resolve().parent / "artifacts").as_uri()


def check_store(uri: str) -> None:
    """Raise TrackingError where a sqlite store cannot be read and written: known at once."""
    if (path := _path(uri)) is None:
        return
    try:
        if path.exists():
            address = f"{path.resolve().as_uri()}?mode=rw"
            with closing(sqlite3.connect(address, timeout=0.1, uri=True)) as store:
                store.execute("PRAGMA schema_version").fetchone()
                store.execute("BEGIN IMMEDIATE")  # refused where the file cannot be written
                store.rollback()
        elif not path.parent.is_dir():
            raise TrackingError(f"{uri}: no folder {path.parent}; make it, or correct the path")
    except sqlite3.OperationalError as e:
        if "locked" not in str(e):  # another sweep writes it right now
            raise TrackingError(why(uri, e)) from None
    except sqlite3.DatabaseError as e:
        raise TrackingError(
            f"the tracking store {path} cannot be read: {e}; move the file away or pass another "
            "with --tracking-uri"
        ) from None


def why(uri: str, error: Exception) -> str:
    """A store's error in one line, with the remedy."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return masked(
        f"the tracking store {uri} cannot be used: {first[:300]}; start the server or pass another "
        "with --tracking-uri"
    )


@contextmanager
def creation(uri: str, version: str) -> Iterator[None]:
    """Around what opens a store, and makes it where there is none.

    Two processes that create one sqlite store at once would both fail, so they take turns. MLflow
    makes an empty one by all its migrations, two seconds of work; what they give is kept in the
    user's cache for each `version` of MLflow, and the next store begins as a copy. The write-ahead
    log halves the time of every write, and lets the UI read meanwhile.
    """
    path = _path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    template = cache_folder() / f"mlflow-{version}.db"
    with FileLock(f"{path}.lock"):
        fresh = not path.exists()
        if fresh and template.exists():
            part = path.with_name(f".{path.name}.part")
            shutil.copyfile(template, part)
            part.replace(path)
        yield
        if fresh and not template.exists():
            with contextlib.suppress(OSError, sqlite3.Error):  # only time is lost
                _keep(path, template)
        with closing(sqlite3.connect(path)) as store:
            store.execute("PRAGMA journal_mode=WAL")


def _keep(path: Path, template: Path) -> None:
    """The store's tables without its experiments."""
    template.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=template.parent) as folder:
        part = Path(folder) / template.name
        with closing(sqlite3.connect(path)) as store:
            store.execute("VACUUM INTO ?", (str(part),))
        with closing(sqlite3.connect(part)) as store, store:
            store.execute("DELETE FROM experiment_tags")
            store.execute("DELETE FROM experiments")
        part.replace(template)


def _path(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SCHEME)) if uri.startswith(_SCHEME) else None
