"""What a network or a transform computes, as a digest: its structure, not its name or place.

Everything that an object's behaviour is made of is walked through: weights and plain attributes,
at any depth; functions and classes by their byte code, with the defaults, closures and globals
that they use. The byte code is what runs: the file may have been edited since. Code of installed
packages counts by name and version of the package instead. Devices, modes and numbers of threads
do not take part, so features from anywhere are found again.

What cannot be compared (a generator, a socket) gives a digest that no other process has: features
may then be computed twice, but are never another's.
"""

from __future__ import annotations

import ast
import contextlib
import copyreg
import dis
import enum
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import sys
import sysconfig
import threading
import types
import uuid
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, cast

import numpy as np

from sfda_tune.values.files import digest_file, read_text

__all__ = ["files_behind", "identify", "is_foreign", "version_of"]

LIBRARIES = ("timm", "torch")
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, type(...), range, slice)
PASSIVE = (type(threading.Lock()), type(threading.RLock()), logging.Logger, logging.LoggerAdapter)
_PROCESS = uuid.uuid4().hex


def identify(value: Any, what: str = "", by_shape: Iterable[Any] = ()) -> str:
    """Return a digest of what `value` computes.

    Of the tensors `by_shape` only type and shape count. A warning calls it `what`, should it hold
    what cannot be compared.

    >>> def power(n):
    ...     return lambda x: x**n
    >>> identify(power(2)) == identify(power(2)), identify(power(2)) == identify(power(3))
    (True, False)
    """
    walk = _Walk({id(tensor) for tensor in by_shape})
    try:
        walk.add(value)
    except RecursionError:
        walk.give_up("what is nested too deeply")
    if walk.opaque:
        warnings.warn(
            f"features of {what or type(value).__name__} cannot be found again by later runs, for "
            f"it holds what cannot be compared: {', '.join(sorted(walk.opaque))}",
            stacklevel=2,
        )
    return walk.digest.hexdigest()


# Code -------------------------------------------------------------------------------------------
@functools.cache
def _homes() -> tuple[str, ...]:
    paths = {sysconfig.get_path(k) for k in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(os.path.realpath(path) + os.sep for path in paths if path)


def is_installed(path: str | None) -> bool:
    """Tell whether a file belongs to Python or to an installed package, rather than the user."""
    if not path:
        return False
    real = os.path.realpath(path)
    if real.startswith(_homes()) or not {"site-packages", "dist-packages"}.isdisjoint(
        real.split(os.sep)
    ):
        return True
    tops = ((root, real[len(root) :].split(os.sep)[0]) for root in map(_realpath, sys.path)
            if real.startswith(root))  # fmt: skip
    return any(_is_recorded(root, top) for root, top in tops)


@functools.cache
def _realpath(place: str) -> str:
    return os.path.join(os.path.realpath(place), "")


@functools.cache
def _is_recorded(root: str, top: str) -> bool:
    """Tell whether a file or folder was installed elsewhere, as by ``pip install --target``."""
    for distribution in importlib.metadata.distributions(path=[root]):
        record = distribution.read_text("RECORD") or ""  # what is only linked here has none
        if any(re.split("[/,]", line, maxsplit=1)[0] == top for line in record.splitlines()):
            return True
    return False


@functools.cache
def is_foreign(module: str | None) -> bool:
    """Tell whether a module is of Python or an installed package: it counts by its version.

    So do PyTorch and timm where they run from a checkout: to walk through them takes a minute.
    """
    top = (module or "").partition(".")[0]
    if top in LIBRARIES:
        return True
    for loaded in (sys.modules.get(module or ""), sys.modules.get(top)):
        if file := getattr(loaded, "__file__", None):  # may be the user's, called like Python's
            return top != "__main__" and is_installed(file)
    return top in sys.builtin_module_names or top in sys.stdlib_module_names


def version_of(package: str) -> str:
    """Return the version of an installed package, of PyTorch the major one; else no text.

    What a layer of PyTorch computes changes with a major version; between others it may change in
    its last bits, as between devices, which share their features, too. Of timm that runs from a
    checkout the text counts, too.
    """
    version = getattr(sys.modules.get(package), "__version__", None) or _installed_version(package)
    if package == "torch":
        return str(version).partition(".")[0]
    return f"{version} {_sources(package)}".strip() if package in LIBRARIES else str(version)


@functools.cache
def _sources(package: str) -> str:
    """Return a digest of all files of a package, or of the archive it is in, if not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin or is_installed(spec.origin):
        return ""
    folder = Path(spec.origin).parent
    files = {str(file.relative_to(folder)): str(file) for file in folder.rglob("*.py")}
    if not files:
        files = {"": str(next(place for place in folder.parents if place.is_file()))}
    return _digest_files(files, ())


@functools.cache
def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


class _Walk:
    """Feeds an object, and all that it is made of, to a digest."""

    def __init__(self, by_shape: Iterable[int] = ()) -> None:
        self.by_shape = frozenset(by_shape)
        self.digest = hashlib.blake2b(digest_size=20)
        self.opaque: set[str] = set()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is given twice

    def say(self, *words: Any) -> None:
        text = repr(words).encode("utf-8", "backslashreplace")
        self.digest.update(f"{len(text)}:".encode())
        self.digest.update(text)

    def add(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN:
            self.say(kind.__name__, hex(value) if kind is int else value)
            return
        if kind is not tuple:  # which of them are one object depends on where they come from
            if id(value) in self._seen:
                self.say("again", self._seen[id(value)])
                return
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
        for types_, method in self._METHODS:
            if isinstance(value, types_):
                method(self, value)
                return
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            self.add_tensor(value)
        elif torch is not None and isinstance(value, torch.jit.ScriptModule):
            self.add_script(value)
        elif torch is not None and isinstance(value, torch.nn.Module):
            self.add_network(value)
        else:
            self.add_object(value)

    def give_up(self, what: str) -> None:
        """Make the digest one that no other process has."""
        self.opaque.add(what)
        self.say("opaque", _PROCESS, uuid.uuid4().hex)

    def add_all(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def add_fields(self, fields: Mapping[str, Any]) -> None:
        """Add attributes, whatever the order in which they were set."""
        self.say("fields", len(fields))
        for name in sorted(fields, key=str):
            self.say(str(name))
            self.add(fields[name])

    # Data
    def add_mapping(self, value: Mapping[Any, Any]) -> None:
        self.say(type(value).__name__, len(value))
        for key, item in value.items():  # in their order: it is that of the layers
            self.add_all(key, item)

    def add_sequence(self, value: Any) -> None:
        self.say(type(value).__name__, len(value))
        self.add_all(*value)

    def add_set(self, value: Set[Any]) -> None:
        walks = [_Walk() for _ in value]
        for walk, item in zip(walks, value, strict=True):
            walk.add(item)
            self.opaque |= walk.opaque
        self.say(type(value).__name__, sorted(walk.digest.hexdigest() for walk in walks))

    def add_array(self, value: np.ndarray) -> None:
        self.say(type(value).__name__, value.dtype.str, value.shape)
        if value.dtype.hasobject:
            self.add_all(*value.ravel().tolist())
        else:
            self.digest.update(value.tobytes())

    def add_tensor(self, value: Any) -> None:
        import torch

        self.say("tensor", str(value.dtype), tuple(value.shape), str(value.layout))
        if value.is_meta or id(value) in self.by_shape:
            return
        value = value.detach()
        try:
            if value.is_quantized:
                value = value.dequantize()
            if value.layout != torch.strided:
                value = value.to_dense()
            value = value.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            self.digest.update(value.view(torch.uint8).numpy().tobytes())
        except (RuntimeError, TypeError, NotImplementedError):  # of some library's own kind
            self.give_up(type(value).__qualname__)

    def add_enum(self, value: enum.Enum) -> None:
        self.say("enum", type(value).__qualname__, value.name)

    # Code
    def add_function(self, value: types.FunctionType) -> None:
        self.say("function", value.__qualname__)
        if is_foreign(value.__module__):
            self.add_reference(value)
        else:
            self.add_code(value.__code__, value.__globals__)
        self.add_all(value.__defaults__, value.__kwdefaults__)
        self.add_fields({k: v for k, v in vars(value).items() if k != "__wrapped__"})
        if "__wrapped__" in vars(value):
            self.add(vars(value)["__wrapped__"])
        for cell in value.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self.say("empty cell")

    def add_code(self, code: types.CodeType, names: Mapping[str, Any]) -> None:
        """Add byte code and the globals that it loads; not the place where it stands."""
        self.say(code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        self.say(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self.say(getattr(code, "co_exceptiontable", b""))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.add_code(constant, names)
            else:
                self.add(constant)
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in names:
                found = names[step.argval]
                self.say("global", step.argval)
                if isinstance(found, types.ModuleType):
                    self.add_module(found, code.co_names)
                else:
                    self.add(found)
            elif step.opname == "IMPORT_NAME":
                self.add_import(step.argval, names.get("__package__") or "")

    def add_import(self, name: str, package: str) -> None:
        """Add what a function imports when it runs: by its text, for it may not be loaded yet."""
        packages: set[str] = set()
        for full in (name, f"{package}.{name}".strip(".")):
            found = [*_locate(full, sys.path, "", packages)]
            self.say("import", full, _digest_files(*_follow(found, sys.path)))
        self.say(sorted((name, version_of(name)) for name in packages))

    def add_module(self, module: types.ModuleType, used: Iterable[str] | None = None) -> None:
        """Add of a module of the user's all, or what code with the names `used` takes from it."""
        self.say("module")
        if is_foreign(module.__name__):
            self.add_reference(module)
            return
        names = [n for n in vars(module) if not n.startswith("__")] if used is None else used
        for name in sorted(set(names) & vars(module).keys()):
            found = vars(module)[name]
            self.say(name)
            if used is not None and isinstance(found, types.ModuleType):
                self.add_module(found, set(used) - {name})
            else:
                self.add(found)

    def add_class(self, value: type) -> None:
        self.say("class", value.__qualname__)
        foreign = is_foreign(value.__module__)
        if foreign:
            self.add_reference(value)
        else:
            self.add_all(*value.__bases__)
        for owner in value.__mro__ if foreign else (value,):
            for name, item in sorted(vars(owner).items()):
                dunder = name.startswith("__") and name.endswith("__")
                if (dunder and not callable(item)) or name.startswith("_abc_"):
                    continue  # documentation, annotations, where it stands; caches
                if not foreign or _is_patch(item):
                    self.say(name)
                    self.add(item)

    def add_reference(self, value: Any) -> None:
        """Add what is installed by its name and the version of its package."""
        module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
        self.say("installed", module, name, version_of(str(module).partition(".")[0]))

    def add_bound(self, value: Any) -> None:
        self.say("bound", value.__name__)
        self.add(value.__self__)
        if isinstance(value, types.MethodType):
            self.add(value.__func__)

    def add_builtin(self, value: Any) -> None:
        self.add_reference(value)
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner)

    def add_wrapper(self, value: Any) -> None:
        self.say(type(value).__name__)
        self.add(value.__func__)

    def add_property(self, value: property) -> None:
        self.say("property")
        self.add_all(value.fget, value.fset, value.fdel)

    def add_partial(self, value: functools.partial[Any]) -> None:
        self.say("partial")
        self.add_all(value.func, value.args, value.keywords)
        self.add_fields(vars(value))

    def add_passive(self, value: Any) -> None:
        self.say("passive", type(value).__name__)

    def add_descriptor(self, value: Any) -> None:
        self.say("descriptor", value.__name__)

    def add_reference_to(self, value: Any) -> None:
        self.say("reference")
        self.add(value())

    # Anything else, as it would be copied
    def add_network(self, value: Any) -> None:
        """Add a PyTorch module: its class, and its state without what only training heeds."""
        if compiled := getattr(value, "_orig_mod", None):
            self.add(compiled)
            return
        try:
            *_, state = value.__reduce_ex__(4)[:3]
            assert isinstance(state, dict)
        except Exception:  # parametrised modules cannot be pickled
            state = vars(value)
        self.add(type(value))
        kept = {name: item for name, item in state.items() if "hooks" not in name}
        self.add_fields(kept)
        for name in ("_forward_pre_hooks", "_forward_hooks"):  # their keys are running numbers
            self.add_all(name, *(state.get(name) or {}).values())

    def add_script(self, value: Any) -> None:
        """Add a TorchScript network as it would be saved, apart from where its source stood."""
        self.say("script")  # the classes of all of them are alike
        with zipfile.ZipFile(io.BytesIO(value.save_to_buffer())) as saved:
            for name in sorted(saved.namelist()):
                if not name.endswith((".debug_pkl", "serialization_id")):
                    self.say(name)
                    self.digest.update(saved.read(name))

    def add_object(self, value: Any) -> None:
        kind = type(value)
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:
            self.give_up(f"{kind.__module__}.{kind.__qualname__}")
            return
        self.add(kind)
        if isinstance(parts, str):  # the name of a global
            self.say("named", parts)
            self.add(getattr(value, "__wrapped__", None))
            return
        make, arguments, state, items, pairs = cast(Any, (*parts, None, None, None))[:5]
        self.add_all(make, *arguments)
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict) and all(isinstance(key, str) for key in part):
                self.add_fields(part)
            else:
                self.add(part)
        self.add_all(*(items or ()))
        for key, item in pairs or ():
            self.add_all(key, item)

    _METHODS: Any = (
        (enum.Enum, add_enum),
        (PASSIVE, add_passive),
        (types.FunctionType, add_function),
        ((types.MethodType, types.MethodWrapperType), add_bound),
        (types.BuiltinFunctionType, add_builtin),
        ((staticmethod, classmethod), add_wrapper),
        (property, add_property),
        (functools.partial, add_partial),
        (types.ModuleType, add_module),
        (
            (
                types.MemberDescriptorType,
                types.GetSetDescriptorType,
                types.WrapperDescriptorType,
                types.MethodDescriptorType,
                types.ClassMethodDescriptorType,
            ),
            add_descriptor,
        ),
        (type, add_class),
        (weakref.ref, add_reference_to),
        (np.ndarray, add_array),
        ((dict, types.MappingProxyType), add_mapping),
        ((list, tuple), add_sequence),
        ((set, frozenset), add_set),
    )


def _is_patch(item: Any) -> bool:
    """Tell whether a member of an installed class is a function of the user's, put there since."""
    function = getattr(item, "__func__", item)
    return isinstance(function, types.FunctionType) and not (
        is_foreign(function.__module__) or function.__code__.co_filename.startswith("<")
    )


# Files ------------------------------------------------------------------------------------------
_KNOWN: dict[str, tuple[list[tuple[str, int, int]], str]] = {}  # files with their stamps, digest


def files_behind(source: str, module: types.ModuleType | None) -> str:
    """Return a digest of a Python file, or an importable module, and of all that it imports.

    That is the text of what is the user's own, wherever it lies, also where only a function
    imports it; the name and version of what is installed.
    """
    stamps, digest = _KNOWN.get(source, ([], ""))
    if stamps and stamps == _stamp(name for name, *_ in stamps):
        return digest
    file = source if os.path.isfile(source) else getattr(module, "__file__", None)
    if not file:
        return ""
    name = source if file != source else ""
    places = list(dict.fromkeys([os.path.dirname(os.path.abspath(file)), *sys.path]))
    files, packages = _follow([(name, file)], places, name.partition(".")[0])
    digest = _digest_files(files, packages)
    _KNOWN[source] = _stamp(files.values()), digest
    return digest


def _digest_files(files: Mapping[str, str], packages: Iterable[str]) -> str:
    versions = [(name, version) for name in sorted(packages) if (version := version_of(name))]
    text = repr([[(name, digest_file(files[name])) for name in sorted(files)], versions])
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _follow(
    found: Iterable[tuple[str, str]], places: list[str], own: str = ""
) -> tuple[dict[str, str], set[str]]:
    """Return name → file of some modules and all that they import, and the installed packages.

    Of these, the files of `own` are followed, too.
    """
    files: dict[str, str] = {}
    packages: set[str] = set()
    todo = list(found)
    while todo:
        name, file = todo.pop()
        if name not in files:
            files[name] = file
            for target in _imports(name, file, *_stamp([file])):
                todo += _locate(target, places, own, packages)
    return files, packages


def _locate(name: str, places: Any, own: str, packages: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the user's files that importing `name` runs; add what is installed to `packages`."""
    parts = name.split(".")
    if parts[0] in sys.builtin_module_names or parts[0] in sys.stdlib_module_names:
        return
    for k in range(len(parts)):
        full = ".".join(parts[: k + 1])
        spec = importlib.machinery.PathFinder.find_spec(full, places)
        if (
            k == 0
            and full != own
            and (spec is None or full in LIBRARIES or is_installed(_home(spec)))
        ):
            packages.add(full)
            return
        if spec is None:
            return
        if spec.origin and spec.has_location:
            yield full, spec.origin
        if (places := spec.submodule_search_locations) is None:
            return


def _home(spec: importlib.machinery.ModuleSpec) -> str | None:
    """Return the file of a module, or the folder of a package without `__init__.py`."""
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


@functools.lru_cache(4096)
def _imports(name: str, file: str, *stamp: Any) -> list[str]:
    """Return what a file imports, at its top or inside a function; none if it is no source."""
    if not file.endswith(".py"):
        return []
    package = name if os.path.basename(file) == "__init__.py" else name.rpartition(".")[0]
    found = []
    with contextlib.suppress(SyntaxError, ValueError, ImportError):
        for node in ast.walk(ast.parse(read_text(file))):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                origin = importlib.util.resolve_name(origin, package) if node.level else origin
                found += [f"{origin}.{alias.name}" for alias in node.names]
    return found


def _stamp(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    found = ((path, os.stat(path)) for path in paths if os.path.exists(path))
    return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in found]
