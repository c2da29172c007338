"""Numbers to predict: `digits` as numbers 0 … 9, not as ten classes; ranked on, then learnt."""

import argparse
import tempfile

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

    # Fine-tune the first two, and test the better one on images that it has not seen.
    with tempfile.TemporaryDirectory() as folder:
        found = sfda_tune.search(
            "digits", ranking.shortlist(2), task="regression", samples=samples, cache=False,
            trials=2 if samples else 6, epochs=1 if samples else 4, out=f"{folder}/run",
        )  # fmt: skip
        print(f"\n{found}")
        images, labels = sfda_tune.open_dataset("digits", task="regression"), "0 1 2 3 4"
        print(f"{labels} are predicted as {found.predict(images.subset(range(5))).round(1)}")


if __name__ == "__main__":
    main()
