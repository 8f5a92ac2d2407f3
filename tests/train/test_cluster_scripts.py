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
    # Two tasks; the first that ends with another code than 0 has the other killed, and the largest code is srun's.
    "srun": """end_all=
while [ "${1#-}" != "$1" ]; do [ "$1" = --kill-on-bad-exit=1 ] && end_all=1; shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=$task "$@" & done
largest=0
for _ in 0 1; do
    wait -n; code=$?
    [ "$code" -gt "$largest" ] && largest=$code
    [ "$code" -ne 0 ] && [ -n "$end_all" ] && kill -9 $(jobs -p) 2>/dev/null
    touch "$CALLS/one_has_ended"
done 2>/dev/null
exit $largest""",
}
# Of two ranks, or launchers, the second takes longer to end.
LAUNCHER = """printf '%s\\n' "$@" > "$CALLS/launcher.$SLURM_PROCID"
echo "$SRUN_CPUS_PER_TASK" > "$CALLS/cpus.$SLURM_PROCID"
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE" > "$CALLS/variables.$SLURM_PROCID"
code=0
if [ -n "$STOP" ]; then
    if [ -z "$SAM2FAST_REQUEUE_FILE" ]; then code=75
    elif [ "$SLURM_PROCID" = 0 ]; then touch "$SAM2FAST_REQUEUE_FILE"; fi
fi
if [ "$SLURM_PROCID" = 1 ]; then while [ ! -e "$CALLS/one_has_ended" ]; do sleep 0.02; done; fi
touch "$CALLS/ended.$SLURM_PROCID"
exit $code"""


def submit(script: Path, folder: Path, stop: bool) -> tuple[int, list[str], str]:
    """Run a script: its exit code, the arguments of the second launcher (or python), and what scontrol was asked."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in (STAND_INS | dict.fromkeys(("torchrun", "deepspeed", "python"), LAUNCHER)).items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder), "STOP": "1" if stop else "", **job}
    arguments = ["configs/finetune.yaml", "model.checkpoint=x.pt", "data.root=/data"]
    done = subprocess.run(["bash", str(script), *arguments], cwd=folder, env=env, capture_output=True, text=True)
    asked = folder / "scontrol"
    leftover = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not leftover and not done.stderr, (leftover, done.stderr)
    assert all((folder / f"ended.{task}").exists() for task in range(2)), "killed while it ended"
    arguments = (folder / "launcher.1").read_text().splitlines()
    return done.returncode, arguments, asked.read_text() if asked.exists() else ""


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
    assert (tmp_path / "cpus.1").read_text() == "12\n"
    if script.stem == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(arguments)
        assert parsed.no_ssh and parsed.node_rank == 1 and parsed.master_addr == "node1"
        program, rest = parsed.user_script, parsed.user_args
    elif script.stem == "srun":
        program, *rest = arguments
        assert (tmp_path / "variables.1").read_text() == "1 1 16 8\n"
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
