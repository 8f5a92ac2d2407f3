"""Datasets on disk to training batches.

`formats.open_dataset` reads a dataset as records (videos, or images as one-frame videos), `sampling.ClipDataset` cuts
and augments clips out of it, `loaders.build_loader` batches them, and `mixture.Mixture` says which dataset a step uses.
"""
