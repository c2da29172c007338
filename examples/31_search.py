"""From images to the fine-tuned winner: rank, tune, train, test and predict, in one call.

The same as ``sfda-tune search digits --trials 12 --out RUN``. Stop it and run it again: it goes on
where it was. Run it twice at the same time: both share the work.
"""

import argparse
import json

import sfda_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="run")
    parser.add_argument("--smoke", action="store_true", help="2 backbones, 3 trials, 150 images")
    options = parser.parse_args()
    size = {"backbones": "demo:*", "trials": 12}
    if options.smoke:
        size = {"backbones": "demo:re*s", "trials": 3, "epochs": 2, "samples": 150}

    found = sfda_tune.search("digits", **size, out=options.out, progress=True)
    print(found.ranking)
    for trial in found.trials:
        value = "–" if trial["value"] is None else f"{trial['value']:.4f}"
        print(f"{trial['number']:>3}  {trial['state']:<9} {value:>7}  {trial['backbone']}")
    print(found)

    images = [sfda_tune.open_dataset("digits").load(row) for row in range(3)]
    for p in found.predict(images):
        print("a", found.classes[p.argmax()], f"with probability {p.max():.3f}")
    print("parameters:", json.dumps(found.best["params"]))


if __name__ == "__main__":
    main()
