"""Keeps pytest from importing the packages: only optunahub gives them names that do not clash.

``package/samplers/sfda_tune`` would pass for `sfda_tune`. `tests/optuna_host/test_hub_shims.py`
tests them.
"""

collect_ignore_glob = ["package/*"]
