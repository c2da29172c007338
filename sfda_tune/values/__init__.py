"""What travels between the rooms: frozen values, the files that hold them, and plain text.

Here: rankings, features, labels, the formats of files, atomic writing, text for people. Not here:
anything that needs torch, opens an image or decides something. Imports nothing above it.
"""
