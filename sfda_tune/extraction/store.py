"""Features kept on disk, so that the same images never pass through a backbone again.

One entry holds the features of one backbone on one *shard*, a run of at most `SHARD` images. Its
key is a digest of everything the features depend on: the content of the images, the weights, the
preprocessing, the precision and `FORMAT`. Entries are safetensors files, written to a temporary
file and moved into place: a kill at any moment leaves whole entries or none, and several
processes may share a store. An entry that is truncated, damaged, no file, or not ours counts as
absent and is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sfda_tune.values.files import (
    check_folder,
    clear_leftovers,
    open_regular,
    parse_json,
    write_bytes,
)

__all__ = ["Entry", "FeatureStore", "RemoteStore", "default_root", "make_key", "open_store"]

logger = logging.getLogger(__name__)

FORMAT = "sfda_tune.features/2"  # raise the number when what an entry means changes
SUFFIX = ".safetensors"
# Protocols that know no folders: to make one would look at the whole bucket, or make a bucket.
OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"})
INFO = {"backbone?": str, "device?": str, "forward_seconds?": float}
INFO |= dict.fromkeys(("n_params?", "peak_memory?", "peak_batch?"), (int, None))
HEADER = {name: {"shape": [int]} for name in ("x", "rows")}
HEADER |= {"__metadata__": dict.fromkeys(("format", "key", "digest", "unreadable", "info"), str)}
# What reading a damaged entry raises
DAMAGED = (SafetensorError, OSError, ValueError, KeyError)


class UnreachableError(OSError):
    """The host of a bucket does not answer, or not to us."""


def default_root() -> Path:
    """Return the user's cache folder, on Linux ``~/.cache/sfda_tune``.

    The environment variable ``SFDA_TUNE_CACHE`` takes precedence.
    """
    import platformdirs

    return Path(os.environ.get("SFDA_TUNE_CACHE") or platformdirs.user_cache_dir("sfda_tune"))


def make_key(images: Iterable[str], weights: str, preprocessing: str, precision: str) -> str:
    """Return the key of an entry: a digest of all that its features depend on.

    These are the content digests of the images, in order, the fingerprints of the backbone and of
    its preprocessing, and the name of the precision.
    """
    text = json.dumps([FORMAT, list(images), weights, preprocessing, precision])
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, eq=False)
class Entry:
    """Features of one backbone on one shard."""

    x: np.ndarray  # float32, (n_readable, n_dims)
    rows: np.ndarray  # int64, (n_readable,): position in the shard of each row of `x`
    unreadable: Mapping[str, str] = field(default_factory=dict)  # position of the others → reason
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON values, shown, never a key


@dataclass(frozen=True)
class FeatureStore:
    """A folder of entries.

    Parameters
    ----------
    root : path, optional
        Default: `default_root`.
    """

    root: Path = field(default_factory=default_root)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser())
        check_folder("cache", self.root)

    def path(self, key: str) -> Path:
        """Return where the entry of a key is or would be."""
        return self.root / "features" / key[:2] / f"{key}{SUFFIX}"

    def get(self, key: str) -> Entry | None:
        """Return an entry, or None if there is no sound one."""
        try:
            return _parse(self._read(key), key)
        except FileNotFoundError:
            return None
        except UnreachableError:
            raise
        except DAMAGED as error:
            logger.warning("ignoring the cache file %s: %s", self.path(key), error)
            return None

    def _read(self, key: str) -> bytes:
        path = self.path(key)
        with open_regular(path) as file:
            content = file.read()
        with contextlib.suppress(OSError):  # a read-only store
            os.utime(path)  # last use, for `clear(older_than=…)`
        return content

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry; another process that writes the same key does no harm.

        Raises
        ------
        OSError
            If the folder cannot be written, for instance on a full disk.
        """
        x, rows = np.ascontiguousarray(entry.x), np.ascontiguousarray(entry.rows)
        header = {
            "format": FORMAT,
            "key": key,
            "unreadable": json.dumps(dict(entry.unreadable)),
            "info": json.dumps(dict(entry.info)),
        }
        header["digest"] = _digest(x, rows, header)
        try:
            self._write(key, save({"x": x, "rows": rows}, metadata=header))
        except Exception as error:
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    def _write(self, key: str, content: bytes) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)

    def entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Iterate over the files of all entries."""
        for path in sorted(self.root.glob(f"features/??/*{SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):  # another process clears it
                if path.is_file():
                    yield path, path.stat()

    def summary(self) -> dict[str, dict[str, int]]:
        """Return number of entries, images and bytes for each backbone name."""
        totals: dict[str, dict[str, int]] = {}
        for path, stat in self.entries():
            try:
                with open_regular(path) as file:
                    header = _read_header(file)
                n, info = header["rows"]["shape"][0], header["__metadata__"]["info"]
                name = parse_json(info, INFO).get("backbone", "?")
            except DAMAGED:
                n, name = 0, "(damaged or foreign)"
            total = totals.setdefault(name, {"entries": 0, "images": 0, "bytes": 0})
            total["entries"] += 1
            total["images"] += n
            total["bytes"] += stat.st_size
        return totals

    def clear(self, older_than: float | None = None) -> tuple[int, int]:
        """Delete entries; return how many, and how many bytes.

        Parameters
        ----------
        older_than : float, optional
            Only those not used for so many days.
        """
        now, count, size = time.time(), 0, 0
        for path, stat in self.entries():
            if older_than is None or now - stat.st_mtime > older_than * 86400:
                path.unlink(missing_ok=True)
                count, size = count + 1, size + stat.st_size
        for folder in self.root.glob("features/??"):
            clear_leftovers(folder, *([0.0] if older_than is None else []))
        return count, size


def open_store(root: str | os.PathLike[str] | None = None) -> FeatureStore:
    """Return the store in a folder, or at the address of a bucket (``s3://…``).

    >>> open_store("memory://features").root
    'memory://features'
    """
    if root is None:
        return FeatureStore()
    return RemoteStore(root) if "://" in str(root) else FeatureStore(Path(root))  # type: ignore


@dataclass(frozen=True)
class RemoteStore(FeatureStore):
    """Entries in a bucket, or wherever else fsspec reaches: ``s3://bucket/features``.

    Needs the package ``fsspec`` and the one it names for the protocol (``s3fs``, ``gcsfs``). An
    object appears when its upload is complete, so there are whole entries or none here, too.

    Parameters
    ----------
    root : str
    """

    root: Any = ""

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.root)  # which keeps the connection for the next time
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"`cache` is {self.root!r} but that cannot be opened ({error}); install fsspec "
                "and the package for the protocol, or pass a folder."
            ) from error

    def path(self, key: str) -> Path:
        """Return the place of an entry below the root."""
        return Path("features") / key[:2] / f"{key}{SUFFIX}"

    def _read(self, key: str) -> bytes:
        fs, path = self._place(key)
        with self._speaking():
            return fs.cat_file(path)

    def _write(self, key: str, content: bytes) -> None:
        fs, path = self._place(key)
        with self._speaking():
            if not OBJECTS & {fs.protocol, *fs.protocol}:  # a text, or several
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, content)

    def _place(self, key: str) -> tuple[Any, str]:
        fs, root = self._open()
        return fs, f"{root.rstrip('/')}/{self.path(key).as_posix()}"

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Give errors of a client library, other than those of a file system, a clear text."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise UnreachableError(
                f"`cache` is {self.root!r} but it cannot be reached ({error}); look at the "
                "address, the credentials and the network, or pass a folder."
            ) from error

    def entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Refuse: to list a bucket may take hours."""
        raise ValueError(f"{self.root} is managed with the tools of its host, not from here.")


# One entry --------------------------------------------------------------------------------------
def _read_header(file: IO[bytes]) -> dict[str, Any]:
    """Return what a safetensors file says of itself, at its beginning; the arrays are not read."""
    size = int.from_bytes(file.read(8), "little")
    return parse_json(file.read(min(size, 1 << 24)).decode(), HEADER)


def _parse(content: bytes, key: str) -> Entry:
    header = _read_header(io.BytesIO(content))["__metadata__"]
    if header["format"] != FORMAT or header["key"] != key:
        raise ValueError("it is not an entry of this key")
    arrays = load(content)
    x, rows = arrays["x"], arrays["rows"]
    if header["digest"] != _digest(x, rows, header):
        raise ValueError("its content is damaged")
    if (x.dtype, rows.dtype) != (np.float32, np.int64) or (x.ndim, rows.shape) != (2, x.shape[:1]):
        raise ValueError("its arrays are not those of an entry")
    unreadable = parse_json(header["unreadable"], {str: str})
    told = np.sort([*rows, *map(int, unreadable)])
    if (np.diff(rows) <= 0).any() or not np.array_equal(told, np.arange(len(told))):
        raise ValueError("its rows are not those of a shard")
    return Entry(x, rows, unreadable, parse_json(header["info"], INFO))


def _digest(x: np.ndarray, rows: np.ndarray, header: Mapping[str, str]) -> str:
    told = [header[name] for name in ("format", "key", "unreadable", "info")]
    text = json.dumps([x.shape, x.dtype.str, rows.shape, rows.dtype.str, *told])
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(x.data if x.size else b"")
    digest.update(rows.tobytes())
    return digest.hexdigest()
