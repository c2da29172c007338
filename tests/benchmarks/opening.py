"""What does it take to open a network, and what do two short cuts save?

    python tests/benchmarks/opening.py [--rounds 3]

Checkpoint folders of twenty networks with random weights. Each is opened as timm does; without
drawing random weights that are about to be replaced (what the package does); and only built
on the device "meta", which is less than anybody can do who then loads weights. Seconds of the
processor, the least of some rounds, with one thread; then the package's way with one thread and
with all, in seconds of the wall: they differ where others compute, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from sfda_tune.backbones.devices import use_threads
from sfda_tune.backbones.loading import _build

NAMES = """resnet18 resnet50 convnext_tiny vit_small_patch16_224 swin_tiny_patch4_window7_224
efficientnet_b0 mobilenetv3_large_100 regnety_016 densenet121 deit3_small_patch16_224 mixer_s32_224
maxvit_nano_rw_256 edgenext_small poolformer_s12 levit_128 ghostnet_100 xcit_tiny_12_p16_224
fastvit_t8 tiny_vit_5m_224 beit_base_patch16_224""".split()  # noqa: SIM905
KEPT = ("input_size", "first_conv", "classifier", "num_classes")


def write(folder: Path, name: str) -> str:
    """Write a checkpoint; return what timm calls it."""
    folder.mkdir()
    model = timm.create_model(name)
    tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"architecture": name, "num_classes": model.num_classes}
    config["pretrained_cfg"] = {key: model.pretrained_cfg[key] for key in KEPT}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def clock(call: Callable[[], object], rounds: int, now: Callable[[], float]) -> float:
    """Return the least seconds of a call."""
    found = []
    for _ in range(rounds):
        began = now()
        call()
        found.append(now() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    most = torch.get_num_threads()
    torch.set_num_threads(1)
    total = dict.fromkeys(("timm", "ours", "meta", "1 thread", f"{most} threads"), 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        for name in NAMES:
            spec = write(Path(temporary) / name, name)

            def ours(spec: str = spec) -> None:
                _build(spec, {})

            def all_threads(ours: Callable[[], None] = ours) -> None:
                with use_threads(most):
                    ours()

            def meta(name: str = name) -> None:
                with torch.device("meta"):
                    timm.create_model(name)

            def usual(spec: str = spec) -> None:
                timm.create_model(spec, pretrained=True)

            busy, wall = time.process_time, time.perf_counter
            ours()
            row = [clock(way, args.rounds, busy) for way in (usual, ours, meta)]
            row += [clock(way, args.rounds, wall) for way in (ours, all_threads)]
            total = {k: t + one for (k, t), one in zip(total.items(), row, strict=True)}
            print(f"{name:32}", *(f"{1000 * one:8.0f}" for one in row), flush=True)
    print(f"{'seconds of all':32}", *(f"{key} {one:.2f}" for key, one in total.items()))


if __name__ == "__main__":
    main()
