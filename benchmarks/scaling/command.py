"""What the commands here accept, and how they tell that a program they started has failed."""

from __future__ import annotations

import argparse
import math
import re

from .network import A100

RANK = r"(?:\[[^\]]*\]:? ?|\w+: )*"
"""What a launcher puts before the lines of a rank."""
OWN = re.compile(RANK + r"error: (.+)")
RAISED = re.compile(RANK + r"((?:\w+\.)*\w*(?:Error|Exception)(?:: .+|$))")
WORDS = re.compile(r"\W*(\w.*)")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return int(text)


def gpus(text: str) -> int:
    """A number of GPUs that fills one node in part, or nodes as a whole."""
    count = int(text) if text.isdecimal() else 0
    if count < 1 or (count > A100.gpus and count % A100.gpus):
        raise argparse.ArgumentTypeError(f"must be 1 to {A100.gpus} or a multiple of {A100.gpus}, not {text!r}")
    return count


def factor(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 1, for example 0.015, not {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def failure(stderr: str) -> str:
    """Why a program failed: its own error line, else the exception of its traceback, else its last words.

    torchrun adds a traceback of its own and a report to what the ranks wrote; they are not the reason.
    """
    lines = stderr.splitlines()
    tried = [OWN.match(line) for line in lines] + [RAISED.match(line) for line in lines]
    tried += [WORDS.match(line) for line in reversed(lines)]
    return next((match[1].rstrip() for match in tried if match), "it wrote no error")
