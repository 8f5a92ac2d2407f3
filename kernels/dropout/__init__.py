"""Dropout in one pass with its neighbors, whose mask is computed again instead of stored; see README.md."""

from .hash import draw_seeds
from .op import dropout_add, relu_dropout

__all__ = ["draw_seeds", "dropout_add", "relu_dropout"]
