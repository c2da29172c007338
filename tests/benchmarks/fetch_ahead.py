"""Does a ranking wait for its downloads?

    python tests/benchmarks/fetch_ahead.py [--networks 20] [--rate 20] [--images 16]

A hub on this machine serves networks with random weights at a rate (MB per second, of all
downloads together). ``download`` is fetching alone, one after the other; ``compute`` is the
ranking with all weights here; ``both`` the ranking that fetches; ``one by one`` the ranking
without the threads that fetch ahead. ``both / max`` is what counts: 1 is ideal, and the first
network has to come before anything can be computed, which is 1 / networks more. With --disk MB the
weights are removed again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_zoo import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", default="efficientnet_b0")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--disk", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serve(args.rate) as url:
        os.environ |= {"HF_ENDPOINT": url, "HF_HOME": temporary, "HF_HUB_OFFLINE": "0"}
        measure(args, Path(temporary) / "hub")


def measure(args: argparse.Namespace, hub: Path) -> None:
    import torch

    from sfda_tune import rank, resolve_backbones
    from sfda_tune.backbones.loading import fetch
    from sfda_tune.extraction.fetching import Fetcher

    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    labels = np.arange(args.images) % 2
    images = rng.integers(0, 256, (args.images, 224, 224, 3), np.uint8)
    specs = [f"hf-hub:zoo/{args.architecture}-{k}" for k in range(args.networks)]
    backbones = resolve_backbones(specs)

    def clock(what: str, **how: Any) -> float:
        began = time.perf_counter()
        how |= {"metric": "sfda", "device": "cpu", "cache": False, "workers": 0}
        ranking = rank((images, labels), specs, **how)
        assert not ranking.failed, ranking.failed
        spent = time.perf_counter() - began
        print(f"{what:<12}{spent:7.1f} s", flush=True)
        return spent

    fetch(resolve_backbones(f"hf-hub:zoo/{args.architecture}")[0])  # imports, connects
    began = time.perf_counter()
    for backbone in backbones:
        fetch(backbone)
    download = time.perf_counter() - began
    size = sum(p.stat().st_size for p in hub.rglob("blobs/*")) / 1e6
    print(f"{args.networks} networks, {size:.0f} MB, {args.images} images, {args.threads} threads")
    print(f"{'download':<12}{download:7.1f} s", flush=True)
    compute = clock("compute")
    shutil.rmtree(hub)
    both = clock("both", **({"weights_disk": args.disk * 10**6} if args.disk else {}))
    shutil.rmtree(hub)
    Fetcher.want = lambda *a: None  # type: ignore[method-assign]
    clock("one by one")
    print(f"both / max(download, compute) = {both / max(download, compute):.3f}")


if __name__ == "__main__":
    main()
