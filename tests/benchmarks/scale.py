"""What does a backbone more cost, and an image more, in time and memory?

    python tests/benchmarks/scale.py [--backbones 10 100 1000] [--images 100 1000 10000 100000]

Checkpoint folders of one small network of the demo (their normalisations differ, and so all
features), images of 64 × 64 as JPEG files of noise. Backbones vary at the fewest images, images at
the fewest backbones. Each line is a fresh process with one thread that has imported all and opened
a network: ``cold`` ranks with an empty cache, ``warm`` once more, ``plain`` is a loop over timm
models (open, decode and transform each image, batches, score), and ``passes`` does as
transformer-ranker does: a DataLoader per model, batches of 32, LogME. Seconds are of the
processor: other work on a machine counts less. The slopes are of lines with the least relative
errors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("cold", "warm", "plain", "passes")
LIMIT = 20_000  # forward passes up to which the peers run


def make(folder: Path, n_backbones: int, n_images: int) -> None:
    """Write checkpoints and images."""
    from PIL import Image

    from sfda_tune.backbones import demo

    source = Path(demo.folder("resnet_glyphs"))
    config = json.loads((source / "config.json").read_text())
    for k in range(n_backbones):
        place = folder / "zoo" / f"net-{k:04}"
        place.mkdir(parents=True)
        mean = [0.4 + 0.2 * k / n_backbones] * len(config["pretrained_cfg"]["mean"])
        changed = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "mean": mean}}
        (place / "config.json").write_text(json.dumps(changed))
        (place / "model.safetensors").symlink_to((source / "model.safetensors").resolve())
    rng = np.random.default_rng(0)
    for row in range(n_images):
        place = folder / "photos" / f"{row % 10}"
        if row < 10:
            place.mkdir(parents=True)
        pixels = rng.integers(0, 200, (8, 8, 3), np.uint8) + np.uint8(5 * (row % 10))
        Image.fromarray(pixels).resize((64, 64)).save(place / f"{row:06}.jpg")


def measure(folder: Path, way: str, n_backbones: int, n_images: int) -> dict[str, float]:
    """Run one way in this process."""
    import timm
    import torch

    from sfda_tune import open_dataset, rank, score
    from sfda_tune.values.features import Features

    torch.set_num_threads(1)
    zoo = sorted((folder / "zoo").iterdir())[:n_backbones]
    whole = open_dataset(folder / "photos")
    images = whole.subset(np.arange(len(whole)).reshape(10, -1)[:, : n_images // 10].ravel())
    rank(images.subset(np.arange(0, n_images, n_images // 20)), zoo[:1], cache=False, workers=0,
         device="cpu", metric="sfda")  # fmt: skip
    wall, began = time.perf_counter(), time.process_time()
    if way in ("cold", "warm"):
        ranking = rank(images, zoo, metric="sfda", device="cpu", workers=0, cache=folder / "cache")
        assert not ranking.failed, ranking.failed
    else:
        for place in zoo:
            model = timm.create_model(f"local-dir:{place}", pretrained=True, num_classes=0).eval()
            transform: Any = timm.data.create_transform(
                **timm.data.resolve_model_data_config(model)
            )
            x = np.concatenate(list(pass_over(model, transform, images, way)))
            features = Features(x, images.labels, images.classes)
            score(features, "sfda" if way == "plain" else "logme")
    return {
        "busy": time.process_time() - began,
        "wall": time.perf_counter() - wall,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def pass_over(model: Any, transform: Any, images: Any, way: str) -> Any:
    """Yield the features of one model, batch by batch."""
    import torch

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int) -> Any:
            return transform(images.load(row).convert("RGB"))

    loader: Any = torch.utils.data.DataLoader(Images(), 32)
    if way == "plain":
        loader = (
            torch.stack([Images()[row] for row in range(i, min(i + 64, len(images)))])
            for i in range(0, len(images), 64)
        )
    with torch.inference_mode():
        for batch in loader:
            yield model(batch[:, : model.pretrained_cfg["input_size"][0]]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backbones", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, way, *sizes = args.measure
        print(json.dumps(measure(Path(folder), way, *map(int, sizes))))
        return
    cases = [(k, args.images[0]) for k in args.backbones]
    cases += [(args.backbones[0], n) for n in args.images[1:]]
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    print("way     backbones  images  seconds     wall   GB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"SFDA_TUNE_CACHE": f"{temporary}/home", "HF_HUB_OFFLINE": "1"}
        make(folder, max(args.backbones), max(args.images))
        for k, n in cases:
            subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)
            for way in WAYS:
                if way in ("plain", "passes") and k * n > LIMIT:
                    continue
                command = [sys.executable, __file__, "--measure", temporary, way, str(k), str(n)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                one = found[way, k, n] = json.loads(out.splitlines()[-1])
                print(f"{way:8}{k:9}{n:8}{one['busy']:9.2f}{one['wall']:9.2f}{one['memory']:6.2f}",
                      flush=True)  # fmt: skip
    for way in WAYS:
        of = {key[1:]: one["busy"] for key, one in found.items() if key[0] == way}
        per_backbone = slope(
            {k: of[k, n] for k, n in cases if n == args.images[0] and (k, n) in of}
        )
        per_image = slope(
            {n: of[k, n] for k, n in cases if k == args.backbones[0] and (k, n) in of}
        )
        print(f"{way:8}{1000 * per_backbone:8.2f} ms per backbone of {args.images[0]} images, "
              f"{1000 * per_image / args.backbones[0]:7.3f} ms per image and each")  # fmt: skip


def slope(seconds: dict[int, float]) -> float:
    """Fit a line to seconds, by the least relative errors; NaN for one point."""
    if len(seconds) < 2:
        return float("nan")
    x, y = np.array(list(seconds)), np.array(list(seconds.values()))
    return float(np.polyfit(x, y, 1, w=1 / y)[0])


if __name__ == "__main__":
    main()
