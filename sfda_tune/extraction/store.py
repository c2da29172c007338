"""Features kept on disk, so that the same image never passes through the same network again.

A key is a digest of all that features depend on besides the image: the weights, the
preprocessing, the precision and `FORMAT`. Below it lie *segments*: the features of up to some
hundred images, with the digests of the images at their head, by which they are found. So it does
not matter in which order, sample or run an image comes, nor under which name.

Segments are safetensors files that never change, written to a temporary file and moved into
place: a kill at any moment leaves whole segments or none, and several processes may share a store.
Small ones that pile up are joined (`FeatureStore.compact`): the new one is there before the old
ones go, and whoever read these looks again. What is truncated, damaged, no file, or not ours
counts as absent. *Notes* are small JSON files beside the segments: digests of weights, what is
known of networks, scores. Features of earlier versions (`OUTDATED`) are left alone, and not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sfda_tune.values.files import (
    check_folder,
    clear_leftovers,
    digest_file,
    open_regular,
    parse_json,
    read_text,
    write_bytes,
    write_text,
)
from sfda_tune.values.text import json_text, parse_bytes

__all__ = [
    "Entry", "FeatureStore", "RemoteStore", "default_root", "make_key", "open_cache", "open_store",
]  # fmt: skip

logger = logging.getLogger(__name__)

FORMAT = "sfda_tune.features/3"  # raise the number when what a segment means changes
SUFFIX = ".safetensors"
SEGMENTS, OUTDATED = (
    "segments",
    "features",
)  # folders below the root: ours, and that of formats 1, 2
NOTES = "notes"
LARGE = 1 << 20  # bytes of a file whose digest is noted
MOMENT = 2_000_000_000  # nanoseconds
SEGMENT = 512  # images in one segment, at most
SMALL, MANY = 256, 16  # so many segments of less than so many images are joined
HEAD = 1 << 16  # bytes in which the header of a segment mostly ends
TRIES = 20  # to read what others join meanwhile
# Protocols that know no folders: to make one would look at the whole bucket, or make a bucket.
OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"})
PART = {
    "backbone?": str,
    "dataset?": str,
    "device?": str,
    "forward_seconds?": float,
    "images": int,
}
PART |= dict.fromkeys(("n_params?", "batch?", "peak_memory?", "peak_batch?"), (int, None))
TEXTS = ("format", "key", "images", "unreadable", "parts")
HEADER = {"x": {"shape": [int]}, "__metadata__": dict.fromkeys((*TEXTS, "digest"), str)}
# What reading a damaged segment raises
DAMAGED = (SafetensorError, OSError, ValueError, KeyError)


class UnreachableError(OSError):
    """The host of a bucket does not answer, or not to us."""


def default_root() -> Path:
    """Return the user's cache folder, on Linux ``~/.cache/sfda_tune``.

    The environment variable ``SFDA_TUNE_CACHE`` takes precedence.
    """
    import platformdirs

    return Path(os.environ.get("SFDA_TUNE_CACHE") or platformdirs.user_cache_dir("sfda_tune"))


def size_limit() -> int | None:
    """Return the bytes that a folder of features may take, ``SFDA_TUNE_CACHE_SIZE``; None: any.

    Raises
    ------
    ValueError
        If the variable is no size, such as ``20GB``.
    """
    text = os.environ.get("SFDA_TUNE_CACHE_SIZE")
    return parse_bytes("the environment variable SFDA_TUNE_CACHE_SIZE", text) if text else None


def make_key(weights: str, preprocessing: str, precision: str) -> str:
    """Return a digest of all that features depend on besides the images.

    These are the fingerprints of the backbone and of its preprocessing, and the name of the
    precision.
    """
    text = json.dumps([FORMAT, weights, preprocessing, precision])
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, eq=False)
class Entry:
    """Features of one backbone on some images."""

    x: np.ndarray  # float32, (n_readable, n_dims)
    rows: np.ndarray  # int64, (n_readable,): position among the images of each row of `x`
    unreadable: Mapping[int, str] = field(default_factory=dict)  # position of others → reason
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON values, shown, never a key

    @property
    def known(self) -> np.ndarray:
        """The positions of which something is known, sorted."""
        return np.sort(np.concatenate([self.rows, np.fromiter(self.unreadable, np.int64)]))


@dataclass(frozen=True, eq=False)
class _Segment:
    """What a file holds: `x` are the features of those of `images` that are readable."""

    images: list[str]
    x: np.ndarray
    unreadable: dict[int, str]
    parts: list[dict[str, Any]]  # of how many images each was computed at once, and how


@dataclass(frozen=True)
class FeatureStore:
    """A folder of segments.

    Parameters
    ----------
    root : path, optional
        Default: `default_root`.
    """

    root: Path = field(default_factory=default_root)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser())
        check_folder("cache", self.root)
        if re.match(r"[\w+.-]{2,}:/", self.root.as_posix()):  # what is left of "://" in a path
            raise ValueError(
                f"`cache` must be a folder but {str(self.root)!r} is an address; `open_store` "
                "opens it."
            )

    # Look up, and keep -------------------------------------------------------------------------
    def get(self, key: str, images: Sequence[str]) -> Entry:
        """Return what is kept of images, by their digests; those without any are absent in it."""
        names = self._list(key)
        entry = self._get(key, names, images)
        for _ in range(TRIES):
            if len(entry.known) == len(images):
                break
            before, names = names, self._list(key)
            if names == before:  # else some were joined, perhaps before they were read
                break
            entry = self._get(key, names, images)
        return entry

    def _get(self, key: str, names: Sequence[str], images: Sequence[str]) -> Entry:
        place: dict[str, int] = {}  # an image may come several times
        codes = np.array([place.setdefault(one, len(place)) for one in images], np.int64)
        have = np.zeros(len(place), bool)
        parts: list[tuple[np.ndarray, np.ndarray]] = []  # codes, and their rows of `x`
        told: list[tuple[dict[str, Any], float]] = []  # and the share of it that is asked for
        unreadable: dict[int, str] = {}  # by code
        used: list[str] = []
        for name, head in zip(names, self._heads(key, names), strict=True):
            try:
                mine = _read_images(head) if head is not None else ()  # gone
            except DAMAGED as error:
                self._ignore(key, name, error)
                continue
            if all(have[code] for one in mine if (code := place.get(one)) is not None):
                continue
            try:
                found = _parse(self._read(key, name), key)
                if parts and found.x.size and found.x.shape[1] != parts[0][1].shape[1]:
                    raise ValueError("its features have another width")
            except FileNotFoundError:
                continue
            except UnreachableError:
                raise
            except DAMAGED as error:
                self._ignore(key, name, error)
                continue
            used.append(name)
            at = np.array([place.get(one, -1) for one in found.images], np.int64)
            new = (at >= 0) & ~have[at]
            ends = np.cumsum([part["images"] for part in found.parts])
            for part, some in zip(found.parts, np.split(new, ends), strict=False):
                told.append((part, float(some.mean())))
            readable = np.ones(len(at), bool)
            readable[list(found.unreadable)] = False
            unreadable |= {int(at[row]): why for row, why in found.unreadable.items() if new[row]}
            new, at = new[readable], at[readable]
            if new.any():
                have[at[new]] = True
                parts.append((at[new], found.x if new.all() else found.x[new]))
        self._touch(key, used)
        rank = np.cumsum(have) - 1
        x = np.empty((have.sum(), parts[0][1].shape[1]), np.float32) if parts else nothing()
        for mine, part in parts:
            x[rank[mine]] = part
        rows = np.flatnonzero(have[codes])
        if len(place) < len(codes):
            x = x[rank[codes[rows]]]
        lost = [
            p for p, code in enumerate(codes.tolist()) if code in unreadable and not have[code]
        ]
        return Entry(x, rows, {p: unreadable[codes[p]] for p in lost}, _sum_up(told))

    def put(self, key: str, images: Sequence[str], entry: Entry) -> None:
        """Keep what is known of images; another process that keeps the same does no harm.

        Raises
        ------
        OSError
            If the folder cannot be written, for instance on a full disk.
        """
        known = entry.known
        for start in range(0, len(known), SEGMENT):
            some = known[start : start + SEGMENT].tolist()
            mine = np.isin(entry.rows, some)
            part = {**entry.info, "images": len(some)}
            if (spent := part.get("forward_seconds")) is not None:
                part["forward_seconds"] = float(spent * mine.sum() / max(len(entry.rows), 1))
            lost = {k: entry.unreadable[p] for k, p in enumerate(some) if p in entry.unreadable}
            self._put(key, _Segment([images[int(p)] for p in some], entry.x[mine], lost, [part]))

    def _put(self, key: str, segment: _Segment) -> str:
        x = np.ascontiguousarray(segment.x)
        header = {
            "format": FORMAT,
            "key": key,
            "images": " ".join(segment.images),
            "unreadable": json.dumps({str(row): why for row, why in segment.unreadable.items()}),
            "parts": json.dumps(segment.parts),
        }
        name = f"{len(segment.images)}-{_name(segment, key)}"
        header["digest"] = _digest(x, header)
        try:
            self._write(key, name, save({"x": x}, metadata=header))
        except Exception as error:
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        return name

    def compact(self, key: str) -> int:
        """Join the small segments of a key, if there are many; return how many have gone."""
        small = [name for name in self._list(key) if int(name.partition("-")[0]) < SMALL]
        if len(small) < MANY:
            return 0
        found: dict[str, _Segment] = {}
        for name in small:
            with contextlib.suppress(*DAMAGED):
                found[name] = _parse(self._read(key, name), key)
        if len({s.x.shape[1] for s in found.values() if s.x.size}) > 1:
            return 0
        new = {self._put(key, segment) for segment in _join(found.values())}
        gone = found.keys() - new
        self._delete(key, gone)
        return len(gone)

    # The files -----------------------------------------------------------------------------------
    def path(self, key: str, name: str = "") -> Path:
        """Return the folder of a key, or the file of one of its segments."""
        folder = self.root / SEGMENTS / key[:2] / key
        return folder / f"{name}{SUFFIX}" if name else folder

    def _list(self, key: str) -> list[str]:
        try:
            return _names(os.listdir(self.path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _heads(self, key: str, names: Sequence[str]) -> Iterable[bytes | None]:
        """Yield the bytes at the beginning of each segment, as far as its header goes."""
        for name in names:
            try:
                with open_regular(self.path(key, name)) as file:
                    yield _read_head(file)
            except OSError:
                yield None

    def _read(self, key: str, name: str) -> bytes:
        with open_regular(self.path(key, name)) as file:
            return file.read()

    def _write(self, key: str, name: str, content: bytes) -> None:
        path = self.path(key, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)

    def _delete(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            self.path(key, name).unlink(missing_ok=True)

    def _touch(self, key: str, names: Iterable[str]) -> None:
        """Note that segments were used."""
        for name in names:
            with contextlib.suppress(OSError):  # a read-only store
                os.utime(self.path(key, name))

    def _ignore(self, key: str, name: str, error: Exception) -> None:
        logger.warning("ignoring the cache file %s: %s", self.path(key, name), error)

    # What else takes time to find out ----------------------------------------------------------
    def recall(self, subject: str, key: str, kind: Any) -> Any:
        """Return what was noted of a subject, of a `kind` that `files.check` knows, or None."""
        path = self._note(subject, key)
        try:
            seal, _, text = read_text(path).partition("\n")
            if seal != _seal(subject, key, text):
                raise ValueError("its content is damaged")
            value = parse_json(text, kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("ignoring the cache file %s: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # a read-only store
            os.utime(path)
        return value

    def note(self, subject: str, key: str, value: Any) -> None:
        """Note a JSON value; if that fails, it is found out again."""
        text = json_text(value)
        path = self._note(subject, key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, f"{_seal(subject, key, text)}\n{text}")

    def recall_weights(self, stand_in: str | None) -> str | None:
        """Return the fingerprint of weights that are here no more, by what stands for it."""
        kind = {"weights": str}
        noted = None if stand_in is None else self.recall("weights", stand_in, kind)
        return None if noted is None else noted["weights"]

    def _note(self, subject: str, key: str) -> Path:
        return self.root / NOTES / subject / key[:2] / f"{key}.json"

    def digest_file(self, path: str | os.PathLike[str]) -> str:
        """Return as `files.digest_file` does, from the notes where the file is as it was."""
        seen = _look_at(path)
        if seen[0] < LARGE:
            return digest_file(path)
        key = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=20).hexdigest()
        noted = self.recall("files", key, {"seen": [int], "digest": str})
        if noted is not None and noted["seen"] == seen:
            return noted["digest"]
        digest = digest_file(path)
        # What was changed a moment ago may be changed again and look the same.
        if _look_at(path) == seen and time.time_ns() - max(seen[1:3]) > MOMENT:
            self.note("files", key, {"seen": seen, "digest": digest})
        return digest

    # All of them ---------------------------------------------------------------------------------
    @property
    def has_outdated(self) -> bool:
        """Whether there are features of earlier versions, which are not used."""
        return (self.root / OUTDATED).is_dir()

    def entries(self, *, outdated: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
        """Iterate over the files of all segments, or of what earlier versions kept."""
        pattern = f"{OUTDATED}/??/*" if outdated else f"{SEGMENTS}/??/*/*"
        for path in sorted(self.root.glob(f"{pattern}{SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):  # another process clears it
                if path.is_file():
                    yield path, path.stat()

    def notes(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Iterate over the files of all notes."""
        for path in sorted(self.root.glob(f"{NOTES}/*/??/*.json")):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def summary(self) -> dict[tuple[str, str], dict[str, float]]:
        """Return segments, images, bytes and time of the last use, by data set and backbone.

        An image that is in several data sets counts for the one with which it was computed.
        """
        totals: dict[tuple[str, str], dict[str, float]] = {}

        def add(dataset: str, backbone: str, images: int, size: float, used: float) -> None:
            new = {"segments": 0, "images": 0, "bytes": 0.0, "used": 0.0}
            total = totals.setdefault((dataset, backbone), new)
            total["segments"] += 1
            total["images"] += images
            total["bytes"] += size
            total["used"] = max(total["used"], used)

        for path, stat in self.entries():
            try:
                with open_regular(path) as file:
                    header = _read_header(_read_head(file))
                parts = parse_json(header["parts"], [PART])
                all_images = max(sum(part["images"] for part in parts), 1)
                for part in parts:
                    size = stat.st_size * part["images"] / all_images
                    names = part.get("dataset", "?"), part.get("backbone", "?")
                    add(*names, part["images"], size, stat.st_mtime)
            except DAMAGED:
                add("(damaged or foreign)", "", 0, stat.st_size, stat.st_mtime)
        for _, stat in self.entries(outdated=True):
            add("(of an earlier version, not used)", "", 0, stat.st_size, stat.st_mtime)
        return totals

    def clear(
        self,
        older_than: float | None = None,
        larger_than: float | None = None,
        *,
        outdated: bool = False,
    ) -> tuple[int, int]:
        """Delete segments; return how many, and how many bytes.

        Parameters
        ----------
        older_than : float, optional
            Only those not used for so many days.
        larger_than : float, optional
            Only those of networks whose features take more bytes than that.
        outdated : bool, default False
            Only what earlier versions have left; not with `larger_than`, for they did not keep
            apart what belongs to one network.
        """
        if outdated and larger_than is not None:
            raise ValueError("`outdated` and `larger_than` exclude each other; leave one out.")
        files = [] if outdated else list(self.entries())
        if larger_than is not None:
            sizes: dict[Path, int] = {}
            for path, stat in files:
                sizes[path.parent] = sizes.get(path.parent, 0) + stat.st_size
            files = [file for file in files if sizes[file[0].parent] > larger_than]
        else:
            files += [*self.entries(outdated=True), *(() if outdated else self.notes())]
        if older_than is not None:
            limit = time.time() - older_than * 86400
            files = [(path, stat) for path, stat in files if stat.st_mtime < limit]
        everything = older_than is larger_than is None
        for pattern in f"{SEGMENTS}/??/*", f"{OUTDATED}/??", f"{NOTES}/*/??":
            for folder in self.root.glob(pattern):
                clear_leftovers(folder, *([0.0] if everything else []))
        result = _unlink(files)
        for folder in [*self.root.glob(f"{OUTDATED}/??"), self.root / OUTDATED]:
            with contextlib.suppress(OSError):  # something is left, or it is not there
                folder.rmdir()
        return result

    def shrink(self, limit: int, since: float) -> tuple[int, int]:
        """Delete what is longest unused until no more than `limit` bytes are left.

        Nothing that was used after the time `since` goes. Another process that misses something
        then computes it again. Return how many segments were deleted, and how many bytes.
        """
        files = [*self.entries(), *self.entries(outdated=True), *self.notes()]
        excess = sum(stat.st_size for _, stat in files) - limit
        old = []
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            if excess <= 0 or stat.st_mtime >= since:
                break
            old.append((path, stat))
            excess -= stat.st_size
        return _unlink(old)


def open_store(root: str | os.PathLike[str] | None = None) -> FeatureStore:
    """Return the store in a folder, or at the address of a bucket (``s3://…``).

    >>> open_store("memory://features").root
    'memory://features'
    """
    size_limit()  # refused before anything is computed, should it be none
    if root is None:
        root = os.environ.get("SFDA_TUNE_CACHE") or default_root()
    return RemoteStore(root) if "://" in str(root) else FeatureStore(Path(root))  # type: ignore


def open_cache(cache: bool | str | os.PathLike[str] | None) -> FeatureStore | None:
    """Return the store that an argument `cache` stands for: True the default one, False none.

    >>> open_cache(False) is None, open_cache("memory://features").root
    (True, 'memory://features')
    """
    if not cache:
        return None
    return open_store(None if cache is True else cache)


@dataclass(frozen=True)
class RemoteStore(FeatureStore):
    """Segments in a bucket, or wherever else fsspec reaches: ``s3://bucket/features``.

    Needs the package ``fsspec`` and the one it names for the protocol (``s3fs``, ``gcsfs``). An
    object appears when its upload is complete, so there are whole segments or none here, too.

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

    def path(self, key: str, name: str = "") -> Path:
        """Return the place of a segment, or of those of a key, below the root."""
        folder = Path(SEGMENTS) / key[:2] / key
        return folder / f"{name}{SUFFIX}" if name else folder

    def _list(self, key: str) -> list[str]:
        fs, path = self._place(key)
        with self._speaking():
            try:
                fs.invalidate_cache(path)  # others write there, too
                return _names(one.rpartition("/")[2] for one in fs.ls(path, detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _heads(self, key: str, names: Sequence[str]) -> Iterable[bytes | None]:
        if not names:
            return []
        fs = self._open()[0]
        paths = [self._place(key, name)[1] for name in names]
        ends = [HEAD] * len(paths)
        with self._speaking():  # all at once, where the protocol can
            heads = fs.cat_ranges(paths, [0] * len(paths), ends, on_error="return")
        found: list[bytes | None] = []
        for name, head in zip(names, heads, strict=True):
            if not isinstance(head, bytes):
                head = None
            elif 8 + int.from_bytes(head[:8], "little") > len(head) == HEAD:
                with contextlib.suppress(FileNotFoundError):
                    head = self._read(key, name)
            found.append(head)
        return found

    def _read(self, key: str, name: str) -> bytes:
        fs, path = self._place(key, name)
        with self._speaking():
            return fs.cat_file(path)

    def _write(self, key: str, name: str, content: bytes) -> None:
        fs, path = self._place(key, name)
        with self._speaking():
            if not OBJECTS & {fs.protocol, *fs.protocol}:  # a text, or several
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, content)

    def _delete(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            fs, path = self._place(key, name)
            with self._speaking(), contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)

    def _touch(self, key: str, names: Iterable[str]) -> None:
        """Do nothing: what is long unused is found with the tools of the bucket's host."""

    def _place(self, key: str, name: str = "") -> tuple[Any, str]:
        fs, root = self._open()
        return fs, f"{root.rstrip('/')}/{self.path(key, name).as_posix()}"

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

    def recall(self, subject: str, key: str, kind: Any) -> Any:
        """Return nothing: to ask a bucket may take longer than to find out again."""

    def note(self, subject: str, key: str, value: Any) -> None:
        """Do nothing."""

    @property
    def has_outdated(self) -> bool:
        """Nobody has looked."""
        return False

    def entries(self, *, outdated: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
        """Refuse: to list a bucket may take hours."""
        raise ValueError(f"{self.root} is managed with the tools of its host, not from here.")


def _seal(subject: str, key: str, text: str) -> str:
    return hashlib.blake2b(f"{subject} {key} {text}".encode(), digest_size=16).hexdigest()


def _look_at(path: str | os.PathLike[str]) -> list[int]:
    """Return what changes when a file does: size, times, number."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


# One segment ------------------------------------------------------------------------------------
def _names(files: Iterable[str]) -> list[str]:
    """Return the names of those that are called as segments are, in an order of their own."""
    return sorted(file[: -len(SUFFIX)] for file in files if _NAME(file))


_NAME: Callable[[str], Any] = re.compile(r"\d{1,9}-[0-9a-f]{32}\.safetensors").fullmatch


def _read_head(file: IO[bytes]) -> bytes:
    """Return a safetensors file as far as its header goes."""
    head = file.read(8)
    return head + file.read(min(int.from_bytes(head, "little"), 1 << 24))


def _read_header(content: bytes) -> dict[str, str]:
    """Return what a safetensors file says of itself; the arrays are not looked at."""
    size = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + min(size, 1 << 24)].decode(), HEADER)
    if header["__metadata__"]["format"] != FORMAT:
        raise ValueError("it is not of this format")
    return header["__metadata__"]


def _read_images(head: bytes) -> list[str]:
    return _read_header(head)["images"].split(" ")


def _parse(content: bytes, key: str) -> _Segment:
    header = _read_header(content)
    if header["key"] != key:
        raise ValueError("it is not a segment of this key")
    x = load(content)["x"]
    if header["digest"] != _digest(x, header):
        raise ValueError("its content is damaged")
    images = header["images"].split(" ")
    told = parse_json(header["unreadable"], {str: str})
    unreadable = {int(row): why for row, why in told.items()}
    parts = parse_json(header["parts"], [PART])
    if x.dtype != np.float32 or x.ndim != 2 or len(x) + len(unreadable) != len(images):
        raise ValueError("its array is not that of a segment")
    if any(not 0 <= row < len(images) for row in unreadable):
        raise ValueError("its rows are not those of a segment")
    sizes = [part["images"] for part in parts]
    if min(sizes, default=0) < 1 or sum(sizes) != len(images):
        raise ValueError("its parts are not those of a segment")
    return _Segment(images, x, unreadable, parts)


def _digest(x: np.ndarray, header: Mapping[str, str], told: Sequence[str] = TEXTS) -> str:
    text = json.dumps([x.shape, x.dtype.str, *(header[name] for name in told)])
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(x.data if x.size else b"")
    return digest.hexdigest()


def nothing() -> np.ndarray:
    """Return the features of no image."""
    return np.empty((0, 0), np.float32)


def _name(segment: _Segment, key: str) -> str:
    """Return a digest of what a segment holds, not of what it took, in whatever order.

    So the same features have the same name anywhere: of two processes that join the same ones each
    in its own order, neither deletes what the other has written.
    """
    order = sorted(range(len(segment.images)), key=segment.images.__getitem__)
    readable = np.array([row not in segment.unreadable for row in range(len(order))], bool)
    at = np.cumsum(readable) - 1
    told = {segment.images[i]: segment.unreadable[i] for i in order if not readable[i]}
    header = {"format": FORMAT, "key": key, "unreadable": json.dumps(told)}
    header["images"] = " ".join(segment.images[i] for i in order)
    x = np.ascontiguousarray(segment.x[[at[i] for i in order if readable[i]]])
    return _digest(x, header, TEXTS[:-1])


def _sum_up(told: Iterable[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    """Return what the parts say together: seconds by share, the rest as the hungriest says it."""
    used = [(part, share) for part, share in told if share]
    if not used:
        return {}
    info = dict(max((part for part, _ in used), key=lambda part: part.get("peak_memory") or 0))
    del info["images"]
    spent = [part["forward_seconds"] * share for part, share in used if "forward_seconds" in part]
    return {**info, "forward_seconds": sum(spent)} if spent else info


def _join(segments: Iterable[_Segment]) -> Iterator[_Segment]:
    """Put the images of segments, each once, into as few segments as hold them."""
    rows: dict[str, tuple[Any, np.ndarray | None, str, float]] = {}
    for segment in segments:
        read = iter(segment.x)
        kinds = [part for part in segment.parts for _ in range(part["images"])]
        for row, (image, part) in enumerate(zip(segment.images, kinds, strict=True)):
            why = segment.unreadable.get(row, "")
            x = None if row in segment.unreadable else next(read)
            if image not in rows or (rows[image][1] is None and x is not None):
                same = {k: v for k, v in part.items() if k not in ("images", "forward_seconds")}
                spent = part.get("forward_seconds", 0.0) / max(part["images"], 1)
                rows[image] = json.dumps(same, sort_keys=True), x, why, spent
    images = sorted(rows, key=lambda image: rows[image][0])  # parts lie together
    for start in range(0, len(images), SEGMENT):
        mine = images[start : start + SEGMENT]
        x = [row for image in mine if (row := rows[image][1]) is not None]
        lost = {k: rows[image][2] for k, image in enumerate(mine) if rows[image][1] is None}
        parts: dict[str, dict[str, Any]] = {}
        for image in mine:
            same, _, _, spent = rows[image]
            part = parts.setdefault(
                same, {**json.loads(same), "images": 0, "forward_seconds": 0.0}
            )
            part["images"] += 1
            part["forward_seconds"] += spent
        yield _Segment(mine, np.stack(x) if x else nothing(), lost, list(parts.values()))


def _unlink(files: Iterable[tuple[Path, os.stat_result]]) -> tuple[int, int]:
    count = size = 0
    for path, stat in files:
        path.unlink(missing_ok=True)
        count, size = count + 1, size + stat.st_size
    return count, size
