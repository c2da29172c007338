"""From scores to decisions, as pure functions: the hosts call them, so that all choose alike.

Here: how sure a ranking is, what to try next (the policy and its model), races, ensembles, and how
well rankings predict. Not here: torch, images, and whoever carries a decision out (`pipelines`).
"""
