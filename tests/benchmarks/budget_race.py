"""Does a race pay where the time does not suffice for all images and backbones?

    python tests/benchmarks/budget_race.py [--datasets trashnet] [--samples 1500] [--budgets 20 40]

Ranks the backbones of the zoo that ``real_zoo.json`` knows within a budget, from an empty cache,
with a race and without; what the first, and the best of the first three, lose of fine-tuned
accuracy, the mean of three seeds. Times are those of this machine: compare rows of one run.
"""

import argparse
import tempfile
import time
import warnings

import real_zoo
from forecast import read_seed

from sfda_tune import rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--datasets", nargs="+", default=["trashnet", "rsscn7", "clothing"])
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--budgets", type=float, nargs="+", default=[20, 40, 80])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    truths = real_zoo.average([read_seed(seed) for seed in real_zoo.SEEDS])
    for name in options.datasets:
        truth = truths[name]
        specs = [str(real_zoo.ZOO / "models" / backbone) for backbone in truth]
        for budget in options.budgets:
            for race in (False, None):
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    found = rank(
                        real_zoo.ZOO / "datasets" / name, specs, split="train", cache=folder,
                        plugins=[str(real_zoo.ZOO / "zoo_models.py")], samples=options.samples,
                        budget=budget, race=race, device="cpu", workers=0,
                    )  # fmt: skip
                    spent = time.perf_counter() - started
                first = [truth[backbone] for backbone in found.shortlist(3)]
                n = len(found) - len(found.info.get("not_looked_at", ()))
                stages = found.info.get("race", {}).get("stages", ())
                steps = " ".join(f"{s['backbones']}×{s['images']}" for s in stages)
                print(
                    f"{name:9} {budget:4.0f} s, race={race!s:5} {spent:5.1f} s, {n:2} looked at, "
                    f"loses {max(truth.values()) - first[0]:.3f}, best of three "
                    f"{max(truth.values()) - max(first):.3f}  {steps}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
