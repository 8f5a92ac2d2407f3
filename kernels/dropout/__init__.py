"""Dropout in one pass with its neighbors, whose mask is computed again instead of stored; see README.md."""

from .op import dropout_add, relu_dropout

__all__ = ["dropout_add", "relu_dropout"]
