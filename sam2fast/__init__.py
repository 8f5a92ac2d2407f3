"""sam2fast: a fast, lean trainer for SAM 2 (Segment Anything in Images and Videos)."""

__version__ = "0.1.0"
