"""The Hugging Face hub where it may be out of reach."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cache_only_if_unreachable", "forget_reachable", "reachable"]

logger = logging.getLogger(__name__)
_LOCK = threading.RLock()
AGAIN = 60.0  # seconds after which a hub out of reach is asked again
_answer: tuple[bool, float] | None = None  # whether it was in reach, and when


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


def reachable() -> bool:
    """Ask the hub for a sign of life, unless the user said to stay offline.

    It is asked once, and again a minute after it gave none, or somebody said `forget_reachable`.
    """
    global _answer
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    with _LOCK:  # which is held while the client is offline for somebody
        if constants.HF_HUB_OFFLINE:
            return False
        if _answer is not None and (_answer[0] or time.monotonic() - _answer[1] < AGAIN):
            return _answer[0]
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
            alive = True
        except Exception as error:
            logger.info("the hub cannot be reached (%s); using the local cache only", error)
            alive = False
        _answer = alive, time.monotonic()
        return alive


def forget_reachable() -> None:
    """Have the hub asked anew."""
    global _answer
    _answer = None
