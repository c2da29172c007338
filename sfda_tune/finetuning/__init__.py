"""Fine-tuning one network, epoch by epoch, so that any tuner can stop it; and what it leaves.

Here: the configuration, images, heads, optimizers, checkpoints, and models that predict. Not here:
which network, and with which parameters (`selection`, `pipelines`).
"""
