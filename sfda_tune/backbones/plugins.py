"""Files and modules of users that register further architectures with timm."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

from sfda_tune.values.files import say_kind

__all__ = ["BackboneError", "load_plugin"]


class BackboneError(ValueError):
    """A backbone spec that cannot be understood, or a backbone that cannot be opened."""


_PLUGINS: dict[str, ModuleType] = {}
_PLUGIN_LOCK = threading.RLock()


def load_plugin(source: str | os.PathLike[str]) -> ModuleType:
    """Run a Python file, or import a module, that registers further architectures with timm.

    `source` is ``"my_models.py"``, ``"path/to/my_models.py"`` or ``"package.my_models"``. A file
    is run once per process; files beside it can be imported by it.

    Raises
    ------
    BackboneError
        If there is no such file or module, or if running it fails.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_file = path.suffix == ".py" or path.exists() or os.sep in name
    key = str(path.resolve()) if is_file else name
    with _PLUGIN_LOCK:
        if key in _PLUGINS:
            return _PLUGINS[key]
        try:
            if not is_file:
                module = importlib.import_module(name)
            else:
                if not path.is_file():
                    raise FileNotFoundError(f"{str(path)!r} {say_kind(path)}")
                module = _imported_from(key) or _run_file(path.resolve())
        except (Exception, SystemExit) as error:
            raise BackboneError(
                f"the plug-in {name!r} could not be imported ({type(error).__name__}: {error}); "
                "pass a Python file or the name of an importable module."
            ) from error
        _PLUGINS[key] = module
        return module


def _imported_from(file: str) -> ModuleType | None:
    """Return the module that the user's program imported from this file already."""
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        if origin and str(Path(origin).resolve()) == file:
            return module
    return None


def _run_file(path: Path) -> ModuleType:
    name = f"sfda_tune_plugin_{path.stem}"  # a file called json.py must not become `json`
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as `python path/to/file.py` would
    sys.modules[name] = module  # timm's registry looks the module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
