"""Lets `pytest benchmarks/` import what `python benchmarks/run.py` finds beside itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
