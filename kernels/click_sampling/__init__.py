"""Clicks of a simulated user on the errors of low-resolution mask logits; README.md has derivation and cost."""

from .op import center_click, uniform_click

__all__ = ["center_click", "uniform_click"]
