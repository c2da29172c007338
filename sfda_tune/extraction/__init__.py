"""Features: every backbone once over every image, each image decoded once.

Here: the plan of what is missing, the worker that does it, here or elsewhere, the images that end
processes, and the store of what is done. Not here: what features are worth (`metrics`).
"""
