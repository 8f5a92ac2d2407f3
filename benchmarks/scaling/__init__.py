"""Scaling over ranks: measured on those there are, predicted for more."""
