"""What all benchmarks share: cases, timing, memory, comparison and report.

Importing it makes `sam2fast` and `sam2fast_kernels` of this checkout importable, installed or not.
"""

import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent

runpy.run_path(str(FOLDER.parent / "sam2fast" / "train.py"))
