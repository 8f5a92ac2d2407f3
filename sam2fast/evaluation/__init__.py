"""Scores of a model on held-out data: J&F of propagated masks, mask mAP and IoU from prompts."""
