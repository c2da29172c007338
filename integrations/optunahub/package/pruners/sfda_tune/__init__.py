from sfda_tune_optuna import gate
from sfda_tune_optuna import SFDAPruner


__all__ = ["SFDAPruner", "gate"]
