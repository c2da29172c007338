"""Choose the backbones of `preset:NAME`; writes ``sfda_tune/backbones/presets.json``.

    python tests/benchmarks/presets.py [--write]

Of timm's pretrained networks with weights under a permissive licence, whose ImageNet accuracy
and size are in timm's tables, those within the limits that the forecast expects most of before
it has seen an image (``sfda_tune/selection/forecast.json``, "full"), at most two of a family (a
module of timm's). `medical` is for images unlike photos, where ImageNet accuracy says little
(mean τ_w .38 on three medical sets): one of each family, so that they differ as much as possible.
"""

import argparse
import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import timm
from timm.models._registry import _model_to_module

ROOT = Path(__file__).parents[2] / "sfda_tune"
OUT = ROOT / "backbones" / "presets.json"
FREE = ("apache-2.0", "mit", "bsd-3-clause")
N = 12
LIMITS = {  # parameters (M), GMACs, of a family
    "fast": (math.inf, 1.0, 2),
    "small": (10.0, 5.0, 2),
    "medium": (30.0, 8.0, 2),
    "large": (100.0, 25.0, 2),
    "medical": (30.0, 8.0, 1),
}
WHAT = {
    "fast": "below 1 GMAC an image",
    "small": "below 10 M parameters",
    "medium": "below 30 M parameters, about a ResNet-50",
    "large": "below 100 M parameters, about a ViT-B",
    "medical": "below 30 M, each of another family: for images unlike photos",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    of = json.loads((ROOT / "selection" / "forecast.json").read_text())
    usable, rows = set(timm.list_pretrained()), {}
    with (ROOT / "metrics" / "imagenet.csv").open() as file:
        for r in csv.DictReader(file):
            name, arch = r["model"], r["model"].partition(".")[0]
            config = timm.models.get_pretrained_cfg(name) if name in usable else None
            if config is None or not r["gmacs"] or config.input_size[1] != int(r["img_size"]):
                continue
            facts = [float(r[key]) for key in ("top1", "gmacs", "macts", "param_count")]
            rows[name] = (*facts, config.license, _model_to_module[arch])
    names = list(rows)
    top1, gmacs, macts = np.array([rows[n][:3] for n in names]).T
    prior = np.zeros(len(names))
    facts = {"error": -np.log1p(-top1 / 100), "gmacs": np.log(gmacs), "macts": np.log(macts)}
    for key, x in facts.items():
        prior += of["full"][key] * (x - x.mean()) / math.hypot(x.std(), of["scales"][key])
    expected = dict(zip(names, prior.tolist(), strict=True))
    presets = {}
    for preset, (most, macs, each) in LIMITS.items():
        families, chosen = Counter(), []
        for name in sorted(names, key=lambda name: -expected[name]):
            _, g, _, size, licence, family = rows[name]
            if size < most and g < macs and licence in FREE and families[family] < each:
                families[family] += 1
                chosen.append(name)
        presets[preset] = {"what": WHAT[preset], "names": chosen[:N]}
        print(f"{preset}: {WHAT[preset]}")
        for name in chosen[:N]:
            t, g, _, size, licence, _ = rows[name]
            print(f"  {name:58} {t:.1f} % {g:5.1f} GMACs {size:5.1f} M  {licence}")
    if parser.parse_args().write:
        by = {"by": "tests/benchmarks/presets.py --write", "timm": timm.__version__}
        OUT.write_text(json.dumps({**by, "presets": presets}, indent=1) + "\n")


if __name__ == "__main__":
    main()
