"""Hugging Face: the backbone in `Trainer.hyperparameter_search`, next to the learning rate.

Only the best backbones of the ranking are searched. The pixels are RGB in 0 … 1, of any size: each
model resizes and normalises them as its backbone wants. Needs transformers, accelerate and Optuna.
"""

import argparse
import importlib.util
import tempfile
from typing import Any

import numpy as np
import torch

import sfda_tune


def make_rows(data: sfda_tune.ImageDataset, rows: range) -> Any:
    pixels = (torch.from_numpy(np.array(data.load(row))) for row in rows)
    return [
        {"pixel_values": x.permute(2, 0, 1) / 255, "labels": int(data.labels[row])}
        for x, row in zip(pixels, rows, strict=True)
    ]


def measure(result: Any) -> dict[str, float]:
    return {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="2 trials of 4 steps")
    smoke = parser.parse_args().smoke
    missing = [m for m in ("transformers", "accelerate") if not importlib.util.find_spec(m)]
    if missing:
        print(f"skipped: pip install {' '.join(missing)}")
        return
    from optuna.distributions import FloatDistribution
    from sfda_tune_optuna import hp_space
    from transformers import Trainer, TrainingArguments

    digits = sfda_tune.open_dataset("digits")
    ranking = sfda_tune.rank(digits.subset(np.arange(300)), "demo:*")
    print(ranking)

    train, val = make_rows(digits, range(300)), make_rows(digits, range(300, 500))
    rate = FloatDistribution(1e-4, 1e-2, log=True)
    space = hp_space(ranking, k=3, learning_rate=rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model_init=space.model_init(digits.classes),
            args=TrainingArguments(
                folder, max_steps=4 if smoke else 100, per_device_train_batch_size=16,
                eval_strategy="steps", eval_steps=2 if smoke else 25, save_strategy="no",
                report_to=[], disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train,
            eval_dataset=val,
            compute_metrics=measure,
        )  # fmt: skip
        best: Any = trainer.hyperparameter_search(
            space, backend="optuna", n_trials=2 if smoke else 12, direction="maximize",
            compute_objective=lambda metrics: metrics["eval_accuracy"],
        )  # fmt: skip
    print(f"best: {best.objective:.3f} with {best.hyperparameters}")


if __name__ == "__main__":
    main()
