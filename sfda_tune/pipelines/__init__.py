"""What users call: `rank` and `search`, and what carries them out.

Here: the arguments of a search (`config`), what they stand for (`inputs`), its folder, budget,
trials, stages, training and workers; engines, spaces, progress. Not here: a decision (`selection`)
or a computation that could be tested without a run.
"""
