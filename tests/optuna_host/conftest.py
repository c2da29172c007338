"""Quiet logs, loopback for databases and servers, and `optuna_lab` for the tests to import."""

from __future__ import annotations

import socket
import sqlite3
import sys
from pathlib import Path

import optuna
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

sys.path.insert(0, str(Path(__file__).parent))  # `--import-mode=importlib` does not


@event.listens_for(Engine, "connect")
def do_not_wait_for_the_disk(connection: object, _record: object) -> None:
    """A test needs no database that outlives a power cut: SQLite waits most of its time for it."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("pragma synchronous = off")


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As elsewhere, but databases, gRPC and the dashboard may be reached on this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        if inet and address[0] not in ("127.0.0.1", "::1", "localhost"):  # type: ignore[index]
            raise OSError(f"the tests have no network: {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
