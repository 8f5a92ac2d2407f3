"""The job scripts for Slurm: their commands are ones that launchers and trainer accept, and they requeue when they
should. Slurm's own commands are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from sam2fast.config_file import load_config

SCRIPTS = sorted((REPOSITORY / "configs" / "cluster").glob("*.sbatch"))
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$CALLS/scontrol"; fi',
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
}
LAUNCHER = """printf '%s\\n' "$@" > "$CALLS/launcher"
[ -n "$STOP" ] && [ -n "$SAM2FAST_REQUEUE_FILE" ] && touch "$SAM2FAST_REQUEUE_FILE" && exit 0
[ -n "$STOP" ] && exit 75
exit 0"""


def submit(script: Path, folder: Path, stop: bool) -> tuple[int, list[str], str]:
    """Run a script: its exit code, the arguments of the launcher (or of python), and what scontrol was asked."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in (STAND_INS | dict.fromkeys(("torchrun", "deepspeed", "python"), LAUNCHER)).items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16"}
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder), "STOP": "1" if stop else "", **job}
    arguments = ["configs/finetune.yaml", "model.checkpoint=x.pt", "data.root=/data"]
    done = subprocess.run(["bash", str(script), *arguments], cwd=folder, env=env, capture_output=True, text=True)
    asked = folder / "scontrol"
    leftover = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not leftover and not done.stderr, (leftover, done.stderr)
    return done.returncode, (folder / "launcher").read_text().splitlines(), asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_stopped_run_is_requeued_and_a_finished_one_is_not(script: Path, tmp_path: Path) -> None:
    for stop in (True, False):
        folder = tmp_path / str(stop)
        folder.mkdir()
        code, _, asked = submit(script, folder, stop)
        assert asked == ("requeue 42\n" if stop else "")
        assert code == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_its_command_is_accepted(script: Path, tmp_path: Path) -> None:
    _, arguments, _ = submit(script, tmp_path, stop=False)
    if script.stem == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(arguments)
        assert parsed.no_ssh and parsed.node_rank == 1 and parsed.master_addr == "node1"
        program, rest = parsed.user_script, parsed.user_args
    elif script.stem == "srun":
        program, *rest = arguments
    else:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        assert parsed.rdzv_endpoint.startswith("node1:") and parsed.max_restarts == 3
        program, rest = parsed.training_script, parsed.training_script_args
    assert (REPOSITORY / program).is_file() and rest[0] == "--config"
    config = load_config(REPOSITORY / rest[1], rest[2:])
    assert config.model.checkpoint == "x.pt"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_written_as_shell_wants_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(script)], check=True)
