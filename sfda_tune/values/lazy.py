"""Modules that are imported when they are used: a package's own, and those not everybody has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["hand_out", "import_optional"]


def hand_out(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package; `names` are by the module that has them."""
    home = {name: module for module, found in names.items() for name in found.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home})


def import_optional(module: str, advice: str) -> Any:
    """Import a module that not everybody has, or say in a ModuleNotFoundError what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(advice, name=error.name) from error
