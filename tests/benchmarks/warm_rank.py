"""What does `rank` take when all features are kept already?

    python tests/benchmarks/warm_rank.py [--backbones 100] [--images 1000] [--profile]

Checkpoint folders of ten architectures of timm, with weight files of their real size (sparse, for
nobody loads them), images as JPEG files, and random features of the networks' widths in the
store. Each measurement is a fresh process that has imported torch, timm and the package and has
ranked one backbone on eight other images; then it ranks all. ``first`` is the first such run,
which digests the weights, builds and scores; ``warm`` the median of three later ones; ``bare`` is
what reading the segments and scoring alone take, in the same process. All are seconds of the
processor: other work on a machine counts less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ARCHITECTURES = {  # MB of weights
    "resnet18": 45, "resnet50": 98, "mobilenetv3_small_100": 10, "efficientnet_b0": 21,
    "convnext_tiny": 109, "vit_tiny_patch16_224": 22, "vit_small_patch16_224": 84,
    "swin_tiny_patch4_window7_224": 109, "regnety_008": 24, "densenet121": 31,
}  # fmt: skip


def make(folder: Path, n_backbones: int, n_images: int) -> None:
    """Write images, checkpoints and features."""
    import timm
    from PIL import Image

    from sfda_tune import open_dataset
    from sfda_tune.backbones import fingerprints, loading
    from sfda_tune.backbones.specs import resolve_backbones
    from sfda_tune.extraction.store import Entry, FeatureStore, make_key
    from sfda_tune.extraction.worker import fingerprint_pixels

    rng = np.random.default_rng(0)
    for part, n in ("photos", n_images), ("few", 8):
        for row in range(n):
            target = folder / part / f"{row % 10 if n > 8 else row % 2}" / f"{row}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).resize((160, 120)).save(target)
    for k in range(n_backbones):
        architecture, megabytes = list(ARCHITECTURES.items())[k % len(ARCHITECTURES)]
        place = folder / "zoo" / f"{architecture}-{k}"
        place.mkdir(parents=True)
        cfg = timm.create_model(architecture, num_classes=3).pretrained_cfg
        names = ("input_size", "interpolation", "crop_pct", "mean", "std", "first_conv",
                 "classifier", "pool_size")  # fmt: skip
        kept = {name: cfg[name] for name in names if name in cfg}
        config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": kept}
        (place / "config.json").write_text(json.dumps(config))
        with (place / "model.safetensors").open("wb") as file:
            file.write(k.to_bytes(8, "little"))
            file.truncate(megabytes << 20)
    store = FeatureStore(folder / "cache")
    dataset, few = open_dataset(folder / "photos"), open_dataset(folder / "few")
    for backbone in resolve_backbones(folder / "zoo"):
        description = loading.describe(backbone)
        weights = fingerprints.fingerprint(backbone) or ""
        key = make_key(weights, fingerprint_pixels(description.preprocessing), "float32")
        for images in dataset, few:
            centres = rng.normal(size=(10, description.n_dims))
            x = centres[images.labels] + 3 * rng.normal(size=(len(images), centres.shape[1]))
            info = {"backbone": backbone.name, "dataset": images.name, "forward_seconds": 1.0}
            entry = Entry(x.astype(np.float32), np.arange(len(images)), {}, info)
            store.put(key, images.digests(), entry)


def measure(folder: Path, *, profile: bool) -> dict[str, float]:
    """Rank in this process."""
    import cProfile

    import timm  # noqa: F401
    import torch

    import sfda_tune
    from sfda_tune.extraction.store import FeatureStore
    from sfda_tune.metrics.scoring import Scorer
    from sfda_tune.values.features import Features

    torch.set_num_threads(1)
    how = {"device": "cpu", "cache": folder / "cache", "workers": 0}
    first = sorted((folder / "zoo").iterdir())[0]
    sfda_tune.rank(folder / "few", first, **how)
    recorder = cProfile.Profile()
    started = time.process_time()
    if profile:
        recorder.enable()
    ranking = sfda_tune.rank(folder / "photos", folder / "zoo", **how)
    recorder.disable()
    seconds = time.process_time() - started
    assert all(score.details["cached"] for score in ranking.scores), ranking.failed
    if profile:
        import pstats

        pstats.Stats(recorder, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
    store, dataset = FeatureStore(folder / "cache"), sfda_tune.open_dataset(folder / "photos")
    images, scorer, started = dataset.digests(), Scorer("sfda"), time.process_time()
    for key in {path.parent.name for path, _ in store.entries()}:
        found = store.get(key, images)
        scorer.score(Features(found.x, dataset.labels, dataset.classes))
    return {"rank": seconds, "bare": time.process_time() - started, **ranking.info["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backbones", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure), profile=args.profile)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["SFDA_TUNE_CACHE"] = str(folder / "home")
        make(folder, args.backbones, args.images)
        command = [sys.executable, __file__, "--measure", str(folder)]
        command += ["--profile"] * args.profile
        for memo in (folder / "home").rglob("*.json"):
            memo.unlink()
        found = []
        for _ in range(4):
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
        warm, bare = (statistics.median(f[name] for f in found[1:]) for name in ("rank", "bare"))
        print(f"{args.backbones} backbones × {args.images} images, one thread")
        print(f"first {found[0]['rank']:.2f} s, warm {warm:.2f} s, bare {bare:.2f} s")
        print(f"warm / bare {warm / bare:.2f}; {1000 * warm / args.backbones:.1f} ms per backbone")


if __name__ == "__main__":
    main()
