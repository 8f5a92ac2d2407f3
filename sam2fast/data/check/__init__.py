"""`sam2fast check-data`: what a dataset holds and everything that is wrong with it, before training finds out."""

from .command import check_data, dataset_config

__all__ = ["check_data", "dataset_config"]
