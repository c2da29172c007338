"""How much a race saves, and how often its top differs from that of the full run.

    python tests/benchmarks/racing.py [--seeds 20] [--cache DIR]

On the demo (8 backbones, 1,797 images) and, where ``../shared/zoo`` is there, on 16 real backbones
and four data sets of 500 images. The features are extracted once (kept under ``--cache``); the
races run on them.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from sfda_tune import extract, open_dataset, resolve_backbones
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.metrics.sfda import sfda
from sfda_tune.selection.racing import RaceConfig, make_rungs, run

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"


def hubs(cache: str):
    """Yield name, data set and features by backbone."""
    settings, store = Settings(device="cpu"), FeatureStore(cache)
    sources = [("digits", open_dataset("digits"), resolve_backbones("demo:*"))]
    if ZOO.is_dir():
        real = resolve_backbones(str(ZOO / "models"), plugins=[str(ZOO / "zoo_models.py")])
        for name in ("trashnet", "clothing", "signdigits", "omniglot8"):
            images = open_dataset(ZOO / "datasets" / name).sample(500, seed=0)
            sources.append((name, images, real))
    for name, images, backbones in sources:
        found = extract(images, backbones, settings, store=store)
        yield name, images, {e.backbone.name: e.features.x for e in found}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cache", default=None)
    options = parser.parse_args()
    cache = options.cache or tempfile.mkdtemp()
    print("| data set | top | same top | forward passes |\n|---|---|---|---|")
    same, used = [], []
    for name, images, features in hubs(cache):
        known: dict = {}

        def terms(backbone, rows, features=features, images=images, known=known):
            key = backbone, rows.tobytes()
            if key not in known:
                x = features[backbone][rows]
                known[key] = sfda(x, images.labels[rows], variant="loo").per_sample
            return known[key]

        everything = np.arange(len(images))
        full = {b: terms(b, everything).mean() for b in features}
        for top in (1, 3, 5):
            best = set(sorted(full, key=lambda b: -full[b])[:top])
            agree, share = [], []
            for seed in range(options.seeds):

                def measure(names, rows):
                    return rows, {b: terms(b, rows) for b in names}

                rungs = make_rungs(images, seed)
                result = run(list(full), rungs, images.labels, measure, RaceConfig(top, seed=seed))
                agree.append(not best & set(result.dropped))
                share.append(result.n_forward / result.n_full)
            print(f"| {name} | {top} | {np.mean(agree):.2f} | {np.mean(share):.2f} |", flush=True)
            same += agree
            used += share
    print(f"| all | | {np.mean(same):.3f} | {np.mean(used):.2f} |")


if __name__ == "__main__":
    main()
