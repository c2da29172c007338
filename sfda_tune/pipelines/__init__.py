"""What users call: `rank` and `search`, and what carries them out.

Here: the stages of a search, its folder, its budget, its trials; engines, spaces, progress. Not
here: a decision (`selection`) or a computation that could be tested without a run.
"""
