"""Quiet logs, and `optuna_lab` for the tests to import."""

from __future__ import annotations

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
