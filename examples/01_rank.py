"""Rank the demo backbones on `digits`, and compare the ranking with the truth.

The truth, the accuracy of each backbone after full fine-tuning, was measured once by
``python -m sfda_tune.backbones.demo.measure`` and ships with the package.
"""

import argparse

from scipy.stats import weightedtau

import sfda_tune
from sfda_tune.backbones import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="use 200 images only")
    samples = 200 if parser.parse_args().smoke else None

    ranking = sfda_tune.rank("digits", "demo:*", samples=samples, progress=True)
    print(ranking)

    truth = demo.accuracies()
    print("\nbackbone                 score  accuracy after fine-tuning")
    for name, value in ranking.items():
        print(f"{name:<24} {value:.4f}  {truth[name.removeprefix('demo:')]:.4f}")
    fitted = [truth[name.removeprefix("demo:")] for name in ranking]
    tau, _ = weightedtau(fitted, list(ranking.values()))
    print(f"\nweighted Kendall tau between score and accuracy: {tau:.2f}")


if __name__ == "__main__":
    main()
