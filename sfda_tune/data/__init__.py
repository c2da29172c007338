"""Labelled images: how a data set is opened, cut into parts, and decoded.

Here: one module per kind of data set, `opening` (which kind it is), parts and splits, copies of
images, decoding in processes of its own. Not here: networks, and what a network makes of an image.
"""
