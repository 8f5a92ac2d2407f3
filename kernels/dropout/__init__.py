"""Dropout without stored masks."""
