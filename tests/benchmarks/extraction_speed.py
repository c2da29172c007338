"""Time `extract` against a plain loop: one DataLoader pass of timm per backbone.

    python tests/benchmarks/extraction_speed.py [--device cuda] [--samples 256] [--repeats 3]

Both do the same work on the same images with the same batch size, number of workers and
precision, in turn in one run; the ratio is what counts. Without ``../shared/zoo`` (or with
``--synthetic``) it draws photos and takes timm architectures with random weights.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader

from sfda_tune import open_dataset, resolve_backbones
from sfda_tune.backbones.loading import timm_name
from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.loader import count_cores
from sfda_tune.extraction import run as extraction
from sfda_tune.extraction.settings import PRECISIONS, Settings

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
ARCHITECTURES = [
    "resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224", "vit_base_patch16_224",
    "efficientnet_b0", "regnety_032", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224",
    "densenet121",
]  # fmt: skip


class Photos:
    """What a user of timm would hand to a DataLoader."""

    def __init__(self, dataset: ImageDataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        return self.transform(self.dataset.load(row))


def plain_loop(dataset, backbones, device, batch_size, workers, precision):
    """One pass over the images per backbone; return features, seconds in the network, in all."""
    features, forward = {}, 0.0
    for backbone in backbones:
        if backbone.load is None:
            model = timm.create_model(timm_name(backbone.spec), pretrained=True, num_classes=0)
            transform = create_transform(**resolve_model_data_config(model))
        else:
            model, transform = backbone.load()
        model = model.eval().to(device)
        loader = DataLoader(
            Photos(dataset, transform),  # type: ignore[arg-type]
            batch_size,
            num_workers=workers,
            pin_memory=device == "cuda",
        )
        parts = []
        enabled = precision != "float32"
        dtype = getattr(torch, precision) if enabled else None
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=enabled):
            for batch in loader:
                started = time.perf_counter()
                parts.append(model(batch.to(device, non_blocking=True)).float())
                forward += time.perf_counter() - started
        features[backbone.name] = torch.cat(parts).cpu().numpy()
    return features, forward


def synthetic(folder: Path, n: int) -> tuple[ImageDataset, list]:
    """Draw photos of usual size, and take architectures with random weights."""
    rng = np.random.default_rng(0)
    for k in range(n):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        (folder / str(k % 4)).mkdir(parents=True, exist_ok=True)
        photo = small.resize((640, 480), Image.Resampling.BICUBIC)
        photo.save(folder / str(k % 4) / f"{k}.jpg", quality=90)
    models = {}
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=0)
        models[name] = (model, create_transform(**resolve_model_data_config(model)))
    return open_dataset(folder), models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=count_cores())
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--backbones", default="*", help="glob within the zoo")
    parser.add_argument("--dataset", default="clothing", help="of the zoo")
    parser.add_argument("--synthetic", action="store_true")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if o.synthetic or not ZOO.is_dir():
            dataset, models = synthetic(Path(folder), o.samples)
            # As timm models they share their pixels; with a transform they would not.
            backbones = resolve_backbones({name: model for name, (model, _) in models.items()})
            plain = resolve_backbones(models)
        else:
            load_plugin(ZOO / "zoo_models.py")
            plugins = [str(ZOO / "zoo_models.py")]
            backbones = resolve_backbones(str(ZOO / "models" / o.backbones), plugins=plugins)
            dataset = open_dataset(ZOO / "datasets" / o.dataset).sample(o.samples)
            plain = backbones
        settings = Settings(o.device, o.precision, o.batch_size, o.workers)
        out = sys.stdout
        out.write(f"{len(backbones)} backbones × {len(dataset)} images on {o.device}\n")
        best = {"plain": np.inf, "ours": np.inf}
        for _ in range(o.repeats):
            started = time.perf_counter()
            expected, forward = plain_loop(
                dataset, plain, o.device, o.batch_size, o.workers, o.precision
            )
            seconds = time.perf_counter() - started
            best["plain"] = min(best["plain"], seconds)
            out.write(f"plain loop {seconds:7.2f} s (in the networks {forward:.2f})\n")
            started = time.perf_counter()
            found = list(extraction.extract(dataset, backbones, settings))
            seconds = time.perf_counter() - started
            best["ours"] = min(best["ours"], seconds)
            parts = ("load", "decode", "decode_work", "forward")
            split = {p: sum(e.seconds.get(p, 0) for e in found) for p in parts}
            text = ", ".join(f"{p} {s:.2f}" for p, s in split.items())
            out.write(f"extract    {seconds:7.2f} s ({text})\n")
        images = len(backbones) * len(dataset)
        for name, seconds in best.items():
            out.write(f"{name}: {images / seconds:.0f} images × backbones per second\n")
        out.write(f"ratio plain / ours: {best['plain'] / best['ours']:.2f}\n")
        worst = max(
            np.abs(e.features.x - expected[e.backbone.name]).max()
            / np.abs(expected[e.backbone.name]).max()
            for e in found
            if e.features is not None
        )
        out.write(f"largest relative difference of the features: {worst:.1e}\n")
        failed = {e.backbone.name: e.error for e in found if e.error}
        if failed:
            out.write(f"failed: {failed}\n")


if __name__ == "__main__":
    main()
