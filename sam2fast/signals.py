"""The signals that ask a run to stop: it notes them (stopping.py), and its loader processes leave them to it
(data/workers.py)."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
