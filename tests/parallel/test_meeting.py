"""Ranks of several torchruns meet again after a restart that only one of them counts."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
from forked import environment

from sam2fast.parallel.mesh import free_port

WORKER = Path(__file__).with_name("meeting_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]


@pytest.mark.exhaustive
def test_ranks_of_two_torchruns_meet_again_after_a_restart(tmp_path: Path) -> None:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    env = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    messages = [tmp_path / f"messages.{node}" for node in range(2)]
    started = []
    for path in messages:
        with path.open("w") as file:
            started.append(
                Popen([*TORCHRUN, *meeting, str(WORKER), str(tmp_path)], env=env, stdout=DEVNULL, stderr=file)
            )
    try:
        codes = [each.wait(240) for each in started]
    finally:
        for each in started:
            each.terminate()  # it ends its ranks
            each.wait(60)
    assert codes == [0, 0], [path.read_text()[-2000:] for path in messages]
    assert (tmp_path / "first").read_text() == "0 0"
    assert (tmp_path / "second").read_text() == "0 1"  # by these counts they would not meet
