"""Counts FLOPs, traffic, launches and live memory of a training step from the shapes of its tensors, without a GPU."""
