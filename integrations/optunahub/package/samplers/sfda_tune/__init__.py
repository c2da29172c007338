from sfda_tune_optuna import SFDASampler


__all__ = ["SFDASampler"]
