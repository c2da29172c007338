"""Connecting to Ray, or starting one that nobody else can reach.

A Ray that we start listens on 127.0.0.1 only, asks for a random token that stands in no file, and
reports no usage. A cluster of somebody else's keeps its own settings, and is left running.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray

from sfda_tune.values.redaction import redact

__all__ = ["connect", "count_places", "share_cpus"]


@contextmanager
def connect(address: str | None = None, **options: Any) -> Iterator[bool]:
    """Be connected to Ray, and undo on leaving only what was done on entering.

    The `address` ``"local"`` starts a Ray on this machine; ``"auto"``, ``"host:6379"`` or
    ``"ray://…"`` connect to a cluster that runs. Default: the connection there is, else
    ``RAY_ADDRESS`` (set in a Ray job), else ``"local"``. The `options` are for `ray.init`. Yields
    whether the Ray is ours.

    Raises
    ------
    ValueError
        If another Ray is asked for than the one this process is connected to.
    ConnectionError
        If there is no cluster at the address, or none that answers within ten seconds.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto") and _resolve(address) != _resolve(here):
            raise ValueError(
                f"`address` is {redact(address)!r} but this process is connected to a Ray "
                f"already, at {here!r}; leave `address` out to use that one, or call "
                "`ray.shutdown()` first."
            )
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options = {"log_to_driver": False, "logging_level": "ERROR", **options}
    with _same_signals():
        if address != "local":
            ray.init(_knock(address, options), **options)
        else:
            _start(options)
    try:
        yield address == "local"
    finally:
        ray.shutdown()
        if address == "local":
            _restore()


def _resolve(address: str) -> str:
    """Return an address by number, where it has a name that is known."""
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return f"{host}:{port}"


KNOCK_SECONDS = 10


def _knock(address: str, options: Mapping[str, Any]) -> str:
    """Return an address at which a cluster answers; Ray itself tries dead ones for minutes."""
    from ray._private.services import get_ray_address_from_environment

    found, source = address, ""
    try:
        if address == "auto":
            found = get_ray_address_from_environment("auto", options.get("_temp_dir"))
            own = found == os.environ.get("RAY_ADDRESS")
            source = f", {redact(found)} by {'RAY_ADDRESS' if own else 'the last `ray start`'},"
        host, _, port = found.rpartition("/")[2].rpartition(":")
        if found.startswith("ray://") and not port.isdigit():
            host, port = f"{host}:{port}".strip(":"), "10001"
        if port.isdigit():
            with socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS) as line:
                encrypted = os.environ.get("RAY_USE_TLS", "0") not in ("0", "false")
                if not encrypted and "_credentials" not in options:
                    _expect_http2(line)
    except OSError as error:
        why = "no Ray runs on this machine" if address == found == "auto" else error
        raise ConnectionError(
            f"`address` is {redact(address)!r}{source} but no cluster answers there ({why}); "
            "start one (`ray start --head`), or leave the address out (where RAY_ADDRESS is set "
            "take 'local'), which starts a Ray for this run alone."
        ) from error
    return found


def _expect_http2(line: socket.socket) -> None:
    """Raise an OSError if who listens does not greet as gRPC does (RFC 9113, section 3.4)."""
    settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # an empty frame of type 4
    line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    greeting = line.recv(9, socket.MSG_WAITALL)
    if greeting[3:4] != settings[3:4]:
        raise ConnectionError("who listens is no Ray")


_BEFORE: dict[str, str | None] = {}
HOME = os.path.dirname(ray.__file__)


def _start(options: dict[str, Any]) -> None:
    from ray._private import ray_constants
    from ray._private.node import Node

    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": None,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which means loopback
    }
    _BEFORE.update({name: os.environ.get(name) for name in ours})
    _set(ours)
    before = set(psutil.Process().children())
    loopback, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        context: Any = ray.init("local", include_dashboard=False, **options)
        found = context.address_info["node_ip_address"]
        if found != "127.0.0.1":
            raise RuntimeError(
                f"Ray would listen on {found}, not on 127.0.0.1 only; it was stopped"
            )
    except BaseException as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(node := frame.f_locals.get("self"), Node):  # interrupted as it started
                node.kill_all_processes(check_alive=False)
        for child in set(psutil.Process().children()) - before:  # that the node had not noted yet
            with suppress(psutil.Error):
                if any(arg.startswith(HOME) for arg in child.cmdline()):
                    child.kill()
        ray.shutdown()
        _restore()
        raise
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = loopback


def _restore() -> None:
    _set(_BEFORE)
    _BEFORE.clear()


def _set(variables: dict[str, str | None]) -> None:
    """Set environment variables; Ray reads mode and token once, unless told to again."""
    from ray import _raylet

    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    raylet: Any = _raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _same_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def count_places(num_gpus: float, num_cpus: float) -> int:
    """Return how many actors of this kind the cluster as it is now has room for."""
    n = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            room = [has.get("CPU", 0) // num_cpus] if num_cpus else []
            room += [has.get("GPU", 0) // num_gpus] if num_gpus else []
            n += int(min(room, default=1))
    return n


def share_cpus(machines: Sequence[Mapping[str, float]], num_gpus: float) -> float:
    """Return how many CPUs an actor may have so that it fits on every machine with GPUs.

    >>> share_cpus([{"CPU": 64}, {"CPU": 8, "GPU": 1}, {"CPU": 48, "GPU": 4}], 1)
    8.0
    """
    if not num_gpus:
        return 1.0
    shares = [m.get("CPU", 0) * num_gpus // m["GPU"] for m in machines if m.get("GPU", 0)]
    return max(1.0, float(min(shares, default=1)))
