"""A hub of networks of timm with random weights, which are made when they are asked for.

    python tests/benchmarks/random_zoo.py [--rate 20] [--size 64]     # prints its address

The bytes of all weights come from one pool of some megabytes, so that thousands of networks take
neither disk nor memory. Every matrix is scaled to its inputs, norms are those of a fresh network,
and what is added to a channel is scaled to little: else 40 layers of a fastvit overflow.
The etag is none of the checksum's length (a checksum would have to be made of all bytes first).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hub_lab import Content, Hub

POOL, SMALL = 1 << 20, -5  # numbers; the logarithm of a small one
NAMES = {
    "torch.float32": "F32",
    "torch.int64": "I64",
    "torch.bool": "BOOL",
    "torch.float16": "F16",
}
KEPT = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "first_conv", "classifier",
        "pool_size", "test_input_size", "fixed_input_size", "min_input_size")  # fmt: skip


@functools.cache
def pool(kind: int | str) -> bytes:
    """Return ones, zeros, or normal numbers with a standard deviation of 2^kind."""
    if isinstance(kind, str):
        return np.full(POOL, kind == "ones", np.float32).tobytes()
    rng = np.random.default_rng(0)
    return (rng.standard_normal(POOL).astype(np.float32) * np.float32(2.0**kind)).tobytes()


def make_weights(tensors: Mapping[str, Any], seed: int) -> Content:
    """Return a file of safetensors with the shapes of `tensors`."""
    header, starts, kinds, end = {}, [], [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[str(tensor.dtype)], "shape": list(tensor.shape),
                        "data_offsets": [end, end + size]}  # fmt: skip
        kind: Any = "zeros"
        if str(tensor.dtype) == "torch.float32":
            if tensor.ndim > 1 and tensor[0].numel() > 1:
                kind = round(-0.5 * math.log2(tensor[0].numel()))
            elif tensor.ndim > 1:  # how much of a layer is added, for each channel
                kind = SMALL
            elif not name.endswith(("bias", "running_mean", "mean")):
                kind = "ones"
        if size:
            starts.append(end)
            kinds.append(kind)
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    shift = 4 * (seed % POOL)

    def read(start: int, stop: int) -> bytes:
        parts = [head[start:stop]]
        start, stop = max(0, start - len(head)), max(0, stop - len(head))
        while start < stop:
            i = bisect_right(starts, start) - 1
            until = min(stop, starts[i + 1] if i + 1 < len(starts) else end)
            source = pool(kinds[i])
            at = (start - starts[i] + shift) % len(source)
            part = source[at : at + until - start]
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    etag = hashlib.sha1(head + bytes([seed % 251])).hexdigest()
    return Content(len(head) + end, read, etag)


class Zoo(Hub):
    """Has every network of timm, as ``zoo/NAME``, and ``zoo/ARCHITECTURE-K`` for any K.

    Without a `size` inputs are those of timm; else, where the architecture allows it, that small.
    """

    def __init__(self, rate: float | None = None, size: int | None = None) -> None:
        super().__init__(rate)
        self.size, self._making = size, threading.Lock()
        self.make = functools.cache(self._make)

    def find(self, repo: str) -> dict[str, dict[str, Content]] | None:
        try:
            with self._making:
                return self.make(repo)
        except Exception as error:
            print(f"{repo}: {error!r}", file=sys.stderr, flush=True)
            return None

    def _make(self, repo: str) -> dict[str, dict[str, Content]] | None:
        import timm
        import torch

        if not repo.startswith("zoo/"):
            return None
        name, _, seed = repo.partition("/")[2].partition("-")
        with torch.device("meta"):
            model = timm.create_model(name)
        cfg, model_args = model.pretrained_cfg, {}
        size = list(cfg["input_size"])
        if self.size is not None and not cfg.get("fixed_input_size"):
            least = (
                max((cfg.get("min_input_size") or size)[1:]) if cfg.get("min_input_size") else 0
            )
            smaller = [size[0], *[max(self.size, least)] * 2]
            with contextlib.suppress(Exception), torch.no_grad():  # else it must be larger
                model.eval()(torch.zeros(1, *smaller, device="meta"))
                size = smaller
        elif self.size is not None and type(model).__name__ in ("VisionTransformer", "Eva"):
            patch = model.patch_embed.patch_size[0]
            model_args["img_size"] = patch * -(-self.size // patch)
            size = [size[0], *[model_args["img_size"]] * 2]
            with torch.device("meta"):
                model = timm.create_model(name, **model_args)
        kept = {"input_size": size} | {k: cfg[k] for k in KEPT if cfg.get(k) is not None}
        kept.pop("test_input_size", None)
        config = {"architecture": name.partition(".")[0], "num_classes": cfg["num_classes"],
                  "pretrained_cfg": kept | {"num_classes": cfg["num_classes"]},
                  "model_args": model_args}  # fmt: skip
        weights = make_weights(model.state_dict(), int(seed or 0))
        files = {"config.json": Content.of(json.dumps(config).encode())}
        return {hashlib.sha1(repo.encode()).hexdigest(): files | {"model.safetensors": weights}}


@contextmanager
def serve(rate: float | None = None, size: int | None = None) -> Iterator[str]:
    """Serve a zoo in a process of its own, and hand out its address."""
    command = [sys.executable, __file__]
    command += ["--rate", str(rate)] * (rate is not None) + ["--size", str(size)] * (
        size is not None
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rate", type=float, help="MB per second, of all downloads together")
    parser.add_argument("--size", type=int, help="pixels of the inputs, where they may be chosen")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with Zoo(args.rate and args.rate * 1e6, args.size) as zoo:
        print(zoo.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
