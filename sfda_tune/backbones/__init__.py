"""Candidates: from a name to a network on a device.

Here: specs, plug-ins, loading, what the features depend on (fingerprints), preprocessing, devices,
and the embedded `demo` networks. Not here: running a network over a data set (`extraction`).
"""
