"""Rank and fine-tune for several labels per image: the four bits of each of `digits`."""

import argparse
import tempfile
from pathlib import Path

import sfda_tune
from sfda_tune.selection.labels import judge_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="use 200 images only")
    samples = 200 if parser.parse_args().smoke else None

    ranking = sfda_tune.rank("digits", "demo:*", task="multilabel", samples=samples, cache=False)
    print(ranking)

    # Each label is one against the rest, every image judged by the fit without it.
    print("\nlabel   images  by chance  average precision  best of all")
    for row in judge_labels(ranking):
        print(
            f"{row['name']:<7} {row['positives']:6}  {row['share']:9.3f}  "
            f"{row['average_precision']:17.3f}  "
            f"{row['best_average_precision']:.3f} ({row['best']})"
        )

    # Two quick trials; each label is named from the threshold on that has the best F1 there.
    with tempfile.TemporaryDirectory() as folder:
        found = sfda_tune.search(
            "digits", ranking.shortlist(1), task="multilabel", samples=200, trials=2, epochs=2,
            cache=False, out=Path(folder) / "run",
        )  # fmt: skip
        print(f"\n{found!r}\n\nlabel   images  average precision     F1  threshold")
        for row in found.best["labels"]:
            print(
                f"{row['label']:<7} {row['images']:6}  {row['average_precision']:17.3f}  "
                f"{row['f1']:5.3f}  {row['threshold']:9.3f}"
            )


if __name__ == "__main__":
    main()
