"""Nested state with tensors in one safetensors file: whole or not there, and without pickle.

A digest of tensors and header stands in the file, so that a changed bit is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfda_tune.values.files import check, open_regular, parse_json, replacing

__all__ = ["DamagedError", "read_state", "read_tensors", "write_state", "write_tensors"]


class DamagedError(ValueError):
    """A file does not hold what was written: as good as none."""


class _ForeignError(Exception):
    pass


def write_state(path: Path, state: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write mappings, lists, tuples, plain values and tensors, and notes that are plain JSON."""
    tensors: dict[str, Any] = {}
    tree = _flatten(state, "", tensors)
    try:
        header = json.dumps({"tree": tree, "notes": notes})
    except TypeError as error:
        raise ValueError(f"the state holds what a checkpoint cannot keep: {error}") from error
    write_tensors(path, tensors, {"sfda_tune": header, "digest": _digest(header, tensors)})


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the notes that `write_state` wrote.

    Raises
    ------
    DamagedError
        If the file is damaged.
    ValueError
        If it is sound, but none of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path, 1 << 60), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if not metadata.keys() & {"sfda_tune", "digest"}:
                raise _ForeignError
            header = parse_json(metadata["sfda_tune"], {"tree": dict, "notes": {str: object}})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Files of earlier versions have no digest; a damaged name of it is none, either.
        if metadata.keys() != {"sfda_tune"} and metadata["digest"] != _digest(
            metadata["sfda_tune"], tensors
        ):
            raise ValueError("its content is not what was written")
        state = _unflatten(header["tree"], tensors)
        check(state, {})
    except FileNotFoundError:
        raise
    except _ForeignError:
        raise ValueError(
            f"{str(path)!r} must be a checkpoint of this package but is another file; take "
            "another folder, or pass resume=False to start over."
        ) from None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(
            f"{str(path)!r} must be a checkpoint of this package but cannot be read ({error}); "
            "delete it, or pass resume=False to start over."
        ) from error
    return state, header["notes"]


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file; a `ValueError` if it is none, or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open_regular(path, 1 << 60):
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no sound safetensors file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Any], header: Mapping[str, str]) -> None:
    """Write tensors so that a reader sees the old file or the whole new one."""
    import torch
    from safetensors.torch import save_file

    # Copies: safetensors takes neither tensors that share memory nor the channels-last layout.
    rows = torch.contiguous_format
    plain = {name: t.detach().cpu().clone(memory_format=rows) for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, dict(header))


def _digest(header: str, tensors: Mapping[str, Any]) -> str:
    import torch

    result = hashlib.blake2b(header.encode("utf-8", "surrogatepass"), digest_size=20)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def _flatten(tree: Any, path: str, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(tree, torch.Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, Mapping):  # pairs, because an optimizer's keys are integers
        return {"map": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_flatten(v, f"{path}/{k}", tensors) for k, v in enumerate(tree)]}
    return {"value": tree}


def _unflatten(tree: Any, tensors: Mapping[str, Any]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {k: _unflatten(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        items = [_unflatten(v, tensors) for v in value]
        return items if kind == "list" else tuple(items)
    return value
