"""A rank that joins the other. In the first round rank 1 then fails, and rank 0 waits for its torchrun to end it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, and no other

from sam2fast.parallel import setup, teardown  # noqa: E402


def main(folder: Path) -> int:
    ranks = setup("cpu", timeout_minutes=0.5)
    counts = ranks.gather(os.environ["TORCHELASTIC_RESTART_COUNT"])
    first = not any(ranks.gather((folder / "first").exists()))
    if ranks.main:
        (folder / ("first" if first else "second")).write_text(" ".join(sorted(counts)))
    ranks.barrier()
    if first and ranks.main:
        signal.pause()
    teardown()
    return int(first)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
