from pathlib import Path

from sfda_tune_optuna import BackboneSelectionProblem


# 120 runs measured for this package: see README.md.
DIGITS = str(Path(__file__).with_name("digits.csv"))

__all__ = ["DIGITS", "BackboneSelectionProblem"]
