"""Does a ranking of all pretrained networks of timm come to its end, in how much memory and disk?

    python tests/benchmarks/all_timm.py [--every 1] [--first 0] [--images 64] [--size 64] [--ray 2]

All of ``timm.list_models(pretrained=True)`` of at most --params million parameters (and more than
--above), with random weights from a hub on this machine (`random_zoo`), over images of noise;
inputs are --size pixels where the architecture takes any size, else timm's own. ``--every 15``
takes each fifteenth name. Weights may take --disk on the disk at a time. Printed are seconds, the
peak of the memory of the process that ranks, the most disk that weights took, and the failures by
kind. With --ray actors compute; the memory is then that of the process that waits for them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import resource
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from random_zoo import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--params", type=float, default=700, help="millions")
    parser.add_argument("--above", type=float, default=0, help="millions")
    parser.add_argument("--batch", type=int, help="images; fewer are filled up to that")
    parser.add_argument("--disk", default="5GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ray", type=int, metavar="ACTORS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serve(size=args.size) as url:
        os.environ |= {"HF_ENDPOINT": url, "HF_HOME": temporary, "HF_HUB_OFFLINE": "0"}
        measure(args, Path(temporary))


def ask(repo: str) -> int:
    """Return the bytes of the weights; the zoo makes them known now, which takes long."""
    with urlopen(f"{os.environ['HF_ENDPOINT']}/api/models/{repo}?blobs=true", timeout=300) as told:
        files = {file["rfilename"]: file["size"] for file in json.load(told)["siblings"]}
    return files["model.safetensors"]


def measure(args: argparse.Namespace, folder: Path) -> None:
    import timm
    import torch

    from sfda_tune import rank
    from sfda_tune.pipelines.progress import NullProgress

    torch.set_num_threads(args.threads)
    names = timm.list_models(pretrained=True)[args.first :: args.every]
    specs = [f"hf-hub:zoo/{name}" for name in names]
    sizes = {spec: ask(spec.partition(":")[2]) for spec in specs}
    low, high = 4e6 * args.above, 4e6 * args.params
    taken = [spec for spec, size in sizes.items() if low < size <= high]
    print(f"{len(taken)} of {len(names)} networks (the others are larger, or smaller), "
          f"{args.images} images", flush=True)  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, args.size, args.size, 3), np.uint8)
    labels = np.arange(args.images) % 2
    images[labels == 1] //= 2
    began, used = time.perf_counter(), time.process_time()
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            files = (folder / "hub").rglob("blobs/*")
            sizes = [f.stat().st_size for f in files if f.exists()]
            most[0] = max(most[0], sum(sizes))

    class Told(NullProgress):
        def finish(self, score: object) -> None:
            nonlocal n
            n += 1
            spent, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            told = getattr(score, "error", None) or f"{getattr(score, 'value', 0):.4f}"
            name = str(getattr(score, "backbone", "")).removeprefix("hf-hub:zoo/")
            print(f"{n:5} {spent:8.1f} s {peak.ru_maxrss / 1e6:6.2f} GB {name}: {told[:150]}",
                  flush=True)  # fmt: skip

    n = 0
    threading.Thread(target=watch, daemon=True).start()
    executor = None
    if args.ray:
        from sfda_tune_ray import RayExecutor

        executor = RayExecutor("local", actors=args.ray, num_gpus=0)
    ranking = rank((images, labels), taken, metric="sfda",
                   device="cpu", cache=folder / "cache", workers=0, weights_disk=args.disk,
                   batch_size=args.batch, executor=executor,
                   progress=Told())  # fmt: skip
    spent = time.perf_counter() - began
    stop.set()
    kinds = collections.Counter(re.sub(r"\d[\d.]*", "N", e)[:100] for e in ranking.failed.values())
    left = sum(f.stat().st_size for f in (folder / "hub").rglob("blobs/*"))
    kept = sum(f.stat().st_size for f in (folder / "cache").rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    busy = time.process_time() - used
    print(f"{spent:.0f} s, {busy:.0f} s of the processor, {busy / len(taken):.2f} per network; "
          f"{peak / 1e6:.2f} GB at most")  # fmt: skip
    print(f"disk: {most[0] / 1e9:.2f} GB of weights at most, {left / 1e6:.1f} MB in the end, "
          f"{kept / 1e6:.1f} MB of features")  # fmt: skip
    parts = {name: round(spent) for name, spent in ranking.info["seconds"].items()}
    print(f"seconds: {parts}")
    if args.ray:
        told = ranking.info["executor"]
        print(f"{len(told['actors'])} actors, {told['units']} units, utilisation "
              f"{told['utilisation']:.2f}, {told['restarts']} restarts")  # fmt: skip
    print(f"{len(ranking.failed)} failed")
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")


if __name__ == "__main__":
    main()
