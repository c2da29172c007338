"""Weights on the Hugging Face hub: where they are, how large, and how they come here.

The client of the hub downloads, resumes what was cut, and retries where it is asked to wait or
nobody answers. Done here is what it leaves: it gives up at once when a download (not the look-up
before it) is answered with 5xx, reset or of the wrong length, it does not compare checksums, and
it would ask for a newer version of what is in its cache already. Nor does it resume what another
process has begun: that is removed when a process ends, and told of one that was killed
(`find_cut`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from sfda_tune.data.hub import forget_reachable, reachable
from sfda_tune.values.redaction import hide_secrets
from sfda_tune.values.text import one_line

__all__ = [
    "Remote", "Told", "fetch", "find_blobs", "find_cached", "find_cut", "find_remote",
    "find_source", "free_space", "hold", "is_here", "look_up", "look_up_sizes", "read_license",
    "remove", "remove_cut", "remove_damaged", "remove_unused", "version",
]  # fmt: skip

logger = logging.getLogger(__name__)
TRIES, WAIT = 4, 1.0  # downloads of a file that may fail; seconds before the second, then doubled
ASKING = 8  # requests at a time
CARD = "README.md"  # of a repository, with its licence at the head
# What the client of the hub calls a download until it is whole: by the etag, and at random (what
# older clients call by the etag alone is not meant, for they resume it)
CUT = re.compile(r"([^.]+)\.[0-9a-f]{8}\.incomplete")
Tell = Callable[[int, "int | None"], None]  # bytes that are here, of how many


@dataclass(frozen=True)
class Remote:
    """Where timm looks for weights on the hub: the first of some files of a repository."""

    repo: str
    revision: str | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What the hub tells of weights before they are fetched; None where it does not."""

    size: int | None = None
    license: str | None = None


class DamagedError(OSError):
    """What came is not what the hub announced."""


def find_source(name: str) -> tuple[str, Any]:
    """Return where timm takes the weights of what it opens from, and what they are called there.

    "hf-hub", "url" (kept in torch's cache), "local-dir", "file", "state_dict"; "" for nowhere.

    >>> find_source("legacy_seresnet18.in1k")[0]
    'url'
    """
    import timm
    from timm.models._builder import _resolve_pretrained_source

    kind, _, rest = name.partition(":")
    if kind in ("hf-hub", "local-dir"):
        return kind, rest
    config = timm.get_pretrained_cfg(name)
    return _resolve_pretrained_source(config.to_dict()) if config else ("", None)


def find_remote(name: str) -> Remote | None:
    """Return where the weights of what timm opens lie on the hub; None if not there.

    >>> find_remote("resnet18.a1_in1k").repo
    'timm/resnet18.a1_in1k'
    """
    source, at = find_source(name)
    if source != "hf-hub":
        return None
    hub_id, own = at if isinstance(at, tuple) else (at, None)
    names = [re.sub(r"\.bin$", ".safetensors", own), own] if own else []
    names += [] if own else ["model.safetensors", "pytorch_model.bin"]
    repo, _, revision = hub_id.partition("@")
    return Remote(repo, revision or None, tuple(dict.fromkeys(names)))


def find_cached(name: str) -> str | None:
    """Find the weights of a remote backbone in the cache that timm takes them from."""
    import torch

    if (remote := find_remote(name)) is not None:
        return find_file(remote, remote.names)
    source, at = find_source(name)
    if source == "url":
        file = os.path.join(
            torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(at).path)
        )
        return file if os.path.isfile(file) else None
    return None


def is_here(name: str) -> bool:
    """Whether the weights of what timm opens need not be fetched."""
    return name.startswith("local-dir:") or find_cached(name) is not None


def find_file(remote: Remote, names: Iterable[str]) -> str | None:
    """Find the first of some files of a repository in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        file = try_to_load_from_cache(remote.repo, name, revision=remote.revision)
        if isinstance(file, str):
            return file
    return None


def version(remote: Remote) -> str | None:
    """Return the commit that the hub's cache knows of a repository, whatever files are there."""
    try:
        known = _folder(remote) / "refs" / (remote.revision or "main")
        return known.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _folder(remote: Remote) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=remote.repo, repo_type="model"))


def fetch(name: str, tell: Tell | None = None) -> tuple[str | None, bool]:
    """See to it that the weights of what timm opens are here.

    What is in the cache is taken as it is. Where only the commit is known of it, the weights that
    come are of that commit.

    Returns
    -------
    file : str or None
        None if they are not on the hub, so that timm has to find them.
    fetched : bool
        Whether they were not here before.

    Raises
    ------
    Exception
        What the client of the hub raises, after some tries.
    """
    remote = find_remote(name)
    if remote is None:
        return None, False
    if file := find_file(remote, remote.names):
        return file, False
    for one in remote.names:
        if (file := fetch_file(remote, one, tell)) is not None:
            _fetch_card(name, remote)
            return file, True
    return None, False


def _fetch_card(name: str, remote: Remote) -> None:
    """Have the card of a repository beside its weights; timm knows those of its registry."""
    if not name.startswith("hf-hub:"):
        return
    try:
        _download(remote.repo, CARD, version(remote) or remote.revision, None)
    except Exception as error:  # the weights are here, and that is what was asked for
        logger.debug("the card of %s is not known: %s", remote.repo, error)


def read_license(name: str) -> str | None:
    """Return the licence on the card that came with the weights of a repository; None without."""
    from huggingface_hub import metadata_load

    remote = find_remote(name)
    file = None if remote is None else find_file(remote, [CARD])
    if file is None:
        return None
    try:
        return _license_of(metadata_load(file) or {})
    except Exception as error:  # anybody may have written it
        logger.debug("the card of %s cannot be read: %s", name, error)
        return None


def _license_of(about: Any) -> str | None:
    """Return the licence in the metadata of a card: text, or a list of texts."""
    found = about.get("license")
    if found == "other":
        found = about.get("license_name") or found
    found = ", ".join(map(str, found)) if isinstance(found, list) else found
    return one_line(found, 100) or None if isinstance(found, str) else None


def fetch_file(remote: Remote, filename: str, tell: Tell | None = None) -> str | None:
    """Return the path of a file of a repository, after a download; None if there is none."""
    from huggingface_hub import constants, errors

    if file := find_file(remote, [filename]):
        return file
    if not reachable():
        raise errors.LocalEntryNotFoundError(f"{filename} is not in the cache")
    revision = version(remote) or remote.revision
    for tries in range(1, TRIES + 1):
        if tries > 1 and tell is not None:
            tell(0, None)  # which may have ended meanwhile
        try:
            return _download(remote.repo, filename, revision, tell)
        except errors.LocalEntryNotFoundError:  # the client has tried for long
            forget_reachable()
            raise
        except errors.EntryNotFoundError:
            return None
        except errors.RevisionNotFoundError:
            if revision == remote.revision:
                raise
            revision = remote.revision  # the commit of before is no longer there
        except Exception as error:
            if tries == TRIES and _is_of_the_network(error):
                forget_reachable()
                raise errors.LocalEntryNotFoundError(f"{filename} does not come") from error
            if tries == TRIES or not _may_pass(error):
                raise
            wait = max(WAIT * 2 ** (tries - 1), _asked_to_wait(error))
            said = hide_secrets(str(error), constants.ENDPOINT)
            logger.warning("%s of %s: %s; again in %.0f s", filename, remote.repo, said, wait)
            time.sleep(wait)
    return None


def _download(repo: str, filename: str, revision: str | None, tell: Tell | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Told(tqdm):  # which shows nothing itself
        monitor_interval = 0  # or each of these classes starts a thread that stays

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(0)  # so that the size is known before the first piece is here

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if tell is not None:
                tell(int(self.n), self.total)

        def update_transfer(self, n: float | None = 1) -> None:
            """Do nothing; that it is there spares a second bar, of what Xet has compressed."""

    _remove_at_exit()
    path = hf_hub_download(repo, filename, revision=revision, tqdm_class=Told)
    if wrong := _find_damage(path):
        remove(path)
        raise DamagedError(f"it came damaged: {wrong}")
    return path


def _find_damage(path: str) -> str:
    """Return what is wrong with a file in the hub's cache; large ones are called by checksums."""
    blob = _follow(Path(path))
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return ""
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    same = found == blob.name
    return "" if same else f"its checksum is {found[:8]}…, not {blob.name[:8]}…"


def remove_damaged(name: str) -> bool:
    """Delete the weights of what timm opens if they are damaged and the hub has them whole.

    Return whether they were: a disk was full, a copy was cut.
    """
    file = find_cached(name)
    if file is None or find_remote(name) is None or not reachable():
        return False
    if wrong := _find_damage(file):
        logger.warning("%s is damaged (%s) and is fetched again", file, wrong)
        remove(file)
    return bool(wrong)


def _may_pass(error: Exception) -> bool:
    """Whether another try may do better: after the hub's troubles, and those on the way."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, OSError):
        return isinstance(error, DamagedError) or error.errno is None  # also a wrong length
    return _is_of_the_network(error)


def _is_of_the_network(error: Exception) -> bool:
    """Whether nobody answered: the errors of what the client of the hub calls, in any version."""
    from huggingface_hub import errors

    package = type(error).__module__.partition(".")[0]
    return package in ("httpx", "httpx2", "requests") and not isinstance(
        error, errors.HfHubHTTPError
    )


def _asked_to_wait(error: Exception) -> float:
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def hold(file: str, *, alone: bool = False) -> Any:
    """Keep other processes from removing a file while it is opened; close what is returned.

    None if it is gone, or, to have it `alone`, if another process holds it.
    """
    try:
        held = open(file, "rb")  # noqa: SIM115 - the caller closes it
    except OSError:
        return None
    with contextlib.suppress(ImportError):  # Windows lets nobody remove what is open
        import fcntl

        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            held.close()
            return None
        except OSError:  # a file system without locks
            return held
        if not os.path.exists(file):  # removed, before it was held
            held.close()
            return None
    return held


def remove_unused(file: str) -> bool:
    """Delete a file from the hub's cache; return whether it is gone: others may be opening it."""
    if (held := hold(file, alone=True)) is None:
        return not os.path.exists(file)
    with held if os.name == "posix" else contextlib.nullcontext(held.close()):
        remove(file)
    return True


def remove(file: str) -> None:
    """Delete a file from the hub's cache; what is known of its repository stays.

    So does what lies in the client's store of all contents, while another repository has it, too.
    """
    path = Path(file)
    blob = _follow(path)  # of the repository
    content = _follow(blob)
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    if content != blob:
        from huggingface_hub import constants

        with contextlib.suppress(ImportError):  # what made it is the same version of the client
            from huggingface_hub.utils._shared_blobs import sweep_shared_blob

            sweep_shared_blob(content, cache_dir=constants.HF_HUB_CACHE)


def _follow(path: Path) -> Path:
    """Return what a link leads to, in one step; else the path itself."""
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def find_blobs(name: str) -> Path | None:
    """Return the folder in which the client of the hub keeps the files of a backbone."""
    remote = find_remote(name)
    return None if remote is None else _folder(remote) / "blobs"


def find_cut(folder: Path | None = None) -> dict[Path, os.stat_result]:
    """Return what cut downloads have left in a folder of `find_blobs`; default: of any model.

    Not what a living process downloads: the client holds a lock meanwhile.
    """
    from huggingface_hub import constants

    cache, found = Path(constants.HF_HUB_CACHE), {}
    for blobs in sorted(cache.glob("models--*/blobs")) if folder is None else [folder]:
        for path in sorted(blobs.glob("*.incomplete")):
            known = CUT.fullmatch(path.name)
            lock = cache / ".locks" / blobs.parent.name / f"{known and known[1]}.lock"
            with contextlib.suppress(OSError):
                if known is not None and _is_free(lock):
                    found[path] = path.stat()
    return found


def _is_free(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return True
    except (Timeout, NotImplementedError):  # held; or nobody can tell
        return False


def remove_cut(folder: Path | None = None, older_than: float = 0.0) -> tuple[int, int]:
    """Delete what `find_cut` finds that is as many seconds old; return how many, and the bytes."""
    now, count, size = time.time(), 0, 0
    for path, stat in find_cut(folder).items():
        if now - stat.st_mtime >= older_than:
            path.unlink(missing_ok=True)
            count, size = count + 1, size + stat.st_size
    return count, size


@functools.cache
def _remove_at_exit() -> None:
    """Have removed, when this process ends, what its threads are downloading then."""

    def remove_open() -> None:
        import psutil
        from huggingface_hub import constants

        here = os.path.realpath(constants.HF_HUB_CACHE)
        with contextlib.suppress(psutil.Error, OSError):
            for path in (Path(file.path) for file in psutil.Process().open_files()):
                cut = CUT.fullmatch(path.name)
                if cut and path.is_relative_to(here):
                    path.unlink(missing_ok=True)

    atexit.register(remove_open)


def free_space() -> int:
    """Return the bytes that are free where the hub's client keeps weights."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def look_up_sizes(names: Iterable[str]) -> dict[str, int | None]:
    """Return `Told.size` of each, see `look_up`."""
    return {name: told.size for name, told in look_up(names).items()}


def look_up(names: Iterable[str]) -> dict[str, Told]:
    """Ask the hub for the bytes of the weights of what timm opens, and for their licence.

    One request per repository, some at a time; nothing is fetched.
    """
    names = list(names)
    if not names or not reachable():
        return dict.fromkeys(names, Told())
    with ThreadPoolExecutor(ASKING) as pool:
        return dict(zip(names, pool.map(_look_up, names), strict=True))


def _look_up(name: str) -> Told:
    from huggingface_hub import HfApi, constants

    remote = find_remote(name)
    if remote is None:
        return Told()
    try:
        info = HfApi(constants.ENDPOINT).model_info(
            remote.repo, revision=remote.revision, files_metadata=True, timeout=10
        )
    except Exception as error:  # gated, absent, out of reach: what fetches it will say so
        logger.debug("the size of %s is not known: %s", name, error)
        return Told()
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    size = next((sizes[one] for one in remote.names if sizes.get(one) is not None), None)
    return Told(size, _license_of(info.card_data or {}))
