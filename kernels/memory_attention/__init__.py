"""Attention to memories whose scores are never stored: rotary embedding, dropout and narrow values; see README.md."""

from .op import memory_attention

__all__ = ["memory_attention"]
