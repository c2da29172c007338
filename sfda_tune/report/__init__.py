"""What is shown of a run: one page of HTML, and figures.

Here: reading a run, axes, the page, plots. Not here: computing anything that a run did not.
"""
