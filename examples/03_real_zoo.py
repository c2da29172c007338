"""Rank a folder of real checkpoints on a folder of real photos, through the command line.

Needs the folder ``../shared/zoo`` beside the repository, or ``--zoo``: checkpoints in ``models/``,
photos in ``datasets/<name>/``, and ``zoo_models.py``, which registers architectures timm lacks.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo")
    parser.add_argument("--dataset", default="trashnet")
    parser.add_argument("--smoke", action="store_true", help="4 backbones, 48 images")
    options = parser.parse_args()
    if not options.zoo.is_dir():
        print(f"skipped: there is no {options.zoo}")
        return
    models = options.zoo / "models"
    command = [sys.executable, "-m", "sfda_tune", "rank"]
    command += [str(options.zoo / "datasets" / options.dataset)]
    command += ["--backbones", str(models / "cifar_*" if options.smoke else models)]
    command += ["--import", str(options.zoo / "zoo_models.py")]
    command += ["--samples", "48"] if options.smoke else []
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
