"""Rank backbones for numbers to predict: `digits` as numbers 0 … 9, not as ten classes."""

import argparse

import sfda_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="use 200 images only")
    samples = 200 if parser.parse_args().smoke else None

    ranking = sfda_tune.rank("digits", "demo:*", task="regression", samples=samples, cache=False)
    print(ranking)

    # The score is the R² of ridge regression on the features, each image predicted without itself.
    print("\nbackbone                    R²  error  Spearman")
    for score in ranking.scores:
        d = score.details
        print(f"{score.backbone:<24} {d['evidence']:.3f}  {d['rmse']:5.2f}  {d['spearman']:.3f}")


if __name__ == "__main__":
    main()
