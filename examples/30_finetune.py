"""Fine-tune the best-ranked backbone, interrupt it, go on, save it and use it."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import sfda_tune
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.run import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny networks gain nothing from more
    digits = sfda_tune.open_dataset("digits")
    rows = digits.sample_rows(250)
    train, unseen = digits.subset(rows), digits.subset(np.setdiff1d(digits.sample_rows(750), rows))

    ranking = sfda_tune.rank(train, "demo:*glyphs" if options.smoke else "demo:*")
    (backbone,) = sfda_tune.resolve_backbones(ranking.shortlist(1))
    config = FinetuneConfig(epochs=2 if options.smoke else 15)
    work = Path(tempfile.mkdtemp())

    with finetune(backbone, train, config, checkpoint_dir=work / "state") as run:
        print(f"{backbone.name}: the linear probe reaches {next(run).accuracy:.3f}")
        next(run)  # one epoch, then somebody turns the machine off

    run = finetune(backbone, train, config, checkpoint_dir=work / "state")
    for epoch in run:
        speed = f"{epoch.images_per_second:.0f} images/s"
        print(f"epoch {epoch.number}: {epoch.accuracy:.3f}, loss {epoch.train_loss:.3f}, {speed}")

    folder = run.save_model(work / "model")
    p = predict(folder, unseen)
    print(f"on {len(unseen)} unseen images: {(p.argmax(1) == unseen.labels).mean():.3f}")
    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    print(f"timm opens it: {type(network).__name__} for {network.pretrained_cfg['label_names']}")


if __name__ == "__main__":
    main()
