"""The Hugging Face hub where it may be out of reach."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cache_only_if_unreachable", "reachable"]

logger = logging.getLogger(__name__)
_LOCK = threading.RLock()


@contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Have the hub's client answer from its cache at once where the hub is out of reach.

    Left to itself it retries for more than 20 seconds per file before it looks into its cache. Its
    settings cannot spare that: ``HF_HUB_ETAG_TIMEOUT`` limits a single try and is read when the
    client is imported, and timm passes no ``local_files_only``.
    """
    if reachable():
        yield
        return
    from huggingface_hub import constants

    with _LOCK:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


@functools.lru_cache(maxsize=1)
def reachable() -> bool:
    """Ask the hub for a sign of life, once per process; not if the user said to stay offline."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        logger.info("the hub cannot be reached (%s); using the local cache only", error)
        return False
    return True
