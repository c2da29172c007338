"""Levels in an order: `digits` as grades, of which only the order counts; ranked on and learnt."""

import argparse
import tempfile

import sfda_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="use 200 images only")
    smoke = parser.parse_args().smoke

    # none stands for 0 … 2, low for 3 … 5, middle for 6 and 7, high for 8 and 9
    digits = sfda_tune.open_dataset("digits", samples=200 if smoke else None)
    grades = ["none", "low", "middle", "high"]
    labels = [grades[(0, 0, 0, 1, 1, 1, 2, 2, 3, 3)[digit]] for digit in digits.labels]
    graded = sfda_tune.open_dataset((digits.items, labels), levels=grades)
    print(graded)

    # The score is the rank correlation of the grades with ridge regression on the features, each
    # image predicted without itself.
    ranking = sfda_tune.rank(graded, "demo:*", cache=False)
    print(ranking)

    # Fine-tune the first two, and test the better one on images that it has not seen.
    with tempfile.TemporaryDirectory() as folder:
        found = sfda_tune.search(
            graded, ranking.shortlist(2), cache=False, trials=2 if smoke else 6,
            epochs=1 if smoke else 4, out=f"{folder}/run",
        )  # fmt: skip
        print(f"\n{found}")
        for label, place in zip(labels, found.predict(graded.subset(range(5))), strict=False):
            print(f"{label:<6} is predicted at {place:+.2f}, with {grades[0]!r} at 0")


if __name__ == "__main__":
    main()
