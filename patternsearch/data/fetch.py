"""The files of a published data set: found in a folder, or downloaded into it."""

from __future__ import annotations

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TaskError

FOLDER, CACHE = "PATTERNSEARCH_DATA", "PATTERNSEARCH_CACHE"
_CHUNK = 2**16
_TIMEOUT = (10, 60)  # seconds to connect, and without a byte


@dataclass(frozen=True)
class Remote:
    """A file to download: its address, its checksum, and its name here (that of the address)."""

    url: str
    sha256: str
    name: str = ""

    @property
    def file(self) -> str:
        return self.name or self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Published:
    """A data set as its publisher lays it out.

    files: what is read, below `folder` in the data folder. remotes: one a file, or one archive that
    holds `folder`. A file that is found is read as it is; the checksum is that of a download.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    remotes: tuple[Remote, ...]

    def locate(self) -> list[Path]:
        """Paths of `files`, downloaded where they are missing.

        Raises TaskError naming the address and the folder where that is not possible.
        """
        root = data_folder()
        for name in self.files:
            if self._find(root, name) is None:
                self._get(root, name)
        found = [self._find(root, name) for name in self.files]
        for name, path in zip(self.files, found, strict=True):
            if path is None:
                archive = self._remote(name).file
                raise TaskError(
                    f"{root / archive}: expected {self.folder}/{name} in it, found none"
                )
        return [path for path in found if path is not None]

    def _find(self, root: Path, name: str) -> Path | None:
        plain = name.removesuffix(".gz")
        places = [root / self.folder / n for n in (name, plain)] + [root / n for n in (name, plain)]
        return next((p for p in places if p.exists()), None)

    def _remote(self, name: str) -> Remote:
        return next((r for r in self.remotes if r.file == Path(name).name), self.remotes[0])

    def _get(self, root: Path, name: str) -> None:
        remote = self._remote(name)
        if remote.file == Path(name).name:
            download(self.name, remote, root / self.folder)
            return
        if not (root / remote.file).exists():
            download(self.name, remote, root)
        unpack(root / remote.file, root)


def cache_folder() -> Path:
    """Where downloads and parsed arrays are kept: PATTERNSEARCH_CACHE, or the user's own cache."""
    if given := os.environ.get(CACHE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "patternsearch"


def data_folder() -> Path:
    """Where the published files are looked for, and downloaded to."""
    if not (given := os.environ.get(FOLDER)):
        return cache_folder() / "data"
    root = Path(given).expanduser()
    if not root.is_dir():
        raise TaskError(f"--data or {FOLDER}: no folder {root}; make it, or name the right one")
    return root


def download(what: str, remote: Remote, folder: Path) -> Path:
    """Download into a folder with a progress bar and check it; an interrupted one goes on.

    Raises TaskError naming the address and the folder.
    """
    import pooch

    try:
        folder.mkdir(parents=True, exist_ok=True)
        pooch.utils.get_logger().setLevel("WARNING")  # the progress bar says it
        pooch.retrieve(
            remote.url, f"sha256:{remote.sha256}", remote.file, folder, downloader=_resuming
        )
    except ValueError as e:
        raise TaskError(
            f"{remote.url}: expected sha256 {remote.sha256}, found another ({_last(e)}); download "
            f"it elsewhere and put it into {folder}"
        ) from None
    except OSError as e:  # requests' errors are OSErrors
        raise TaskError(
            f"{what}: no {remote.file} in {folder}, and {remote.url} cannot be had "
            f"({type(e).__name__}); download it elsewhere and put it into {folder}"
        ) from None
    return folder / remote.file


def _last(error: Exception) -> str:
    return str(error).split("(")[-1].split(")")[0]


def _resuming(url: str, output: str, _: Any) -> None:
    """Pooch's downloader, with what an earlier one left in `NAME.part` not fetched again."""
    import requests
    from tqdm import tqdm

    target = Path(output)
    part = target.parent / f"{url.rpartition('/')[2]}.part"
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # nothing is left to send
            part.replace(target)
            return
        answer.raise_for_status()
        start = start if answer.status_code == 206 else 0
        total = start + int(answer.headers.get("Content-Length", 0))
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    part.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Extract a .tar.gz or .zip; TaskError where it is broken."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(folder, filter="data")
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as e:
        raise TaskError(f"{archive}: expected a whole archive, found {e}; remove it") from None


def check_size(path: Path, expected: int, what: str) -> None:
    """TaskError where a file is not as long as it must be."""
    if (found := path.stat().st_size) != expected:
        raise TaskError(f"{path}: expected {expected:,} bytes ({what}), found {found:,}")


def check_count(path: Path, what: str, expected: int, found: int) -> None:
    """TaskError where a file holds another number of `what` than published."""
    if found != expected:
        raise TaskError(f"{path}: expected {expected:,} {what}, found {found:,}")
