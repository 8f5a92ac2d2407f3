"""Scaling: the network's formulas against published times, the timeline against closed forms, traced collectives
against the volumes that a sharding has to move, and the commands on a micro model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MB = 2**20


@pytest.fixture(scope="module")
def scaling():
    """Modules of benchmarks/scaling by name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = "network timeline collectives tables predict compute plot dry_run measure command".split()
        yield {name: importlib.import_module(f"scaling.{name}") for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "size, gb_per_s", [(MB, 19.8), (25 * MB, 151), (64 * MB, 202.5), (256 * MB, 217), (1024 * MB, 229)]
)
def test_all_reduce_of_eight_a100_takes_the_published_time(scaling, size, gb_per_s):
    seconds = scaling["network"].A100.seconds("all_reduce", size, range(8))
    assert 2 * 7 / 8 * size / seconds / 1e9 == pytest.approx(gb_per_s, rel=0.1)


def test_small_all_reduce_over_32_nodes_takes_the_published_time(scaling):
    assert 62e-6 <= scaling["network"].A100.seconds("all_reduce", 256, range(256)) <= 70e-6


def test_nodes_are_as_fast_as_their_adapters(scaling):
    a100, size = scaling["network"].A100, 2**33
    between = 2 * 255 / 256 * size / a100.seconds("all_reduce", size, range(256))
    assert between == pytest.approx(192e9, rel=0.02)
    # One GPU of each of 32 nodes has one adapter: the others serve groups of other GPUs at the same time.
    own = 2 * 31 / 32 * size / a100.seconds("all_reduce", size, range(0, 256, 8))
    assert own == pytest.approx(24e9, rel=0.02)


def test_a_fitted_line_gives_back_the_times_it_was_made_from(scaling):
    network = scaling["network"]
    line = network.Line(50e-6, 2e9)
    times = {size: line.latency + network.sent("all_reduce", size, 2) / line.bandwidth for size in (4096, MB, 16 * MB)}
    found = network.fit("all_reduce", 2, times)
    assert (found.latency, found.bandwidth) == pytest.approx((line.latency, line.bandwidth))


@pytest.mark.parametrize("ranks, published", [(8, 0.93), (64, 0.90), (256, 0.88)])
def test_the_slowest_of_independent_ranks(scaling, ranks, published):
    assert 1 / scaling["timeline"].Stragglers(jitter=0.05).slowest(ranks) == pytest.approx(published, abs=0.006)


def test_the_slowest_of_unequal_work(scaling):
    half = scaling["timeline"].Stragglers(((0.5, 0.8), (0.5, 1.2)), jitter=0.0)
    assert half.slowest(1) == pytest.approx(1.0)
    assert half.slowest(2) == pytest.approx(0.25 * 0.8 + 0.75 * 1.2)
    blurred = scaling["timeline"].Stragglers(half.objects, jitter=1e-3)
    assert blurred.slowest(2) == pytest.approx(half.slowest(2), rel=2e-3)


class OneSecond:
    """A network on which every collective takes a second."""

    def seconds(self, kind, size, ranks):
        return 1.0


@pytest.mark.parametrize(
    "phase, kind, place, overlapped, exposed",
    [
        ("backward", "all_reduce", 1.0, False, 1.0),  # waited for
        ("backward", "all_reduce", 0.9, True, 1.0),  # nothing is left of the backward pass to hide the last one
        ("forward", "all_gather", 0.0, True, 1.0),  # the first gathering has nothing before it
        ("forward", "all_reduce", 0.3, False, 1.0),
    ],
)
def test_what_compute_hides(scaling, phase, kind, place, overlapped, exposed):
    one = scaling["collectives"].Collective(kind, "float32", 8, 1, 8, phase, place, overlapped)
    timed = scaling["timeline"].step_time([one], OneSecond(), 10.0, scaling["timeline"].Stragglers(jitter=0.0))
    assert timed.communication == pytest.approx(exposed)
    assert timed.total == pytest.approx(10.0 + exposed)


@pytest.mark.parametrize("first, exposed", [(0.5, 1.0), (0.85, 1.5), (0.9, 2.0)])
def test_compute_hides_all_reductions_but_the_last(scaling, first, exposed):
    ask = scaling["collectives"].Collective
    both = [ask("all_reduce", "float32", 8, 1, 8, "backward", place, True) for place in (first, 0.9)]
    timed = scaling["timeline"].step_time(both, OneSecond(), 10.0, scaling["timeline"].Stragglers(jitter=0.0))
    assert timed.communication == pytest.approx(exposed)


def test_a_gathering_is_asked_for_one_ahead(scaling):
    ask = scaling["collectives"].Collective
    both = [ask("all_gather", "float32", 8, 1, 8, "forward", place, True) for place in (0.0, 0.5)]
    timed = scaling["timeline"].step_time(both, OneSecond(), 10.0, scaling["timeline"].Stragglers(jitter=0.0))
    assert timed.communication == pytest.approx(1.0)  # the second runs beside the first half of the work


def test_a_step_on_fewer_ranks_than_were_traced(scaling):
    predict, ask = scaling["predict"], scaling["collectives"].Collective
    whole = ask("all_reduce", "float32", 800, 1, 256, "backward", 1.0, False)
    node = ask("all_gather", "float32", 800, 1, 8, "forward", 0.0, True)
    copies = ask("all_reduce", "float32", 100, 8, 32, "backward", 0.5, True)
    assert [predict.rescaled(one, 256, 16).group() for one in (whole, node, copies)] == [
        range(16),
        range(8),
        range(0, 16, 8),
    ]
    assert predict.rescaled(copies, 256, 8) is None
    assert predict.rescaled(whole, 256, 1) is None


@pytest.mark.parametrize(
    "engine, gpus, traced",
    [("fsdp", 1, 2), ("fsdp", 2, 2), ("fsdp", 8, 16), ("fsdp", 16, 16), ("fsdp", 64, 256), ("fsdp", 512, 256)]
    # In a node hybrid sharding has one group: it does not show which collectives cross nodes.
    + [("hybrid", 1, 16), ("hybrid", 2, 2), ("hybrid", 8, 16), ("hybrid", 32, 256)],
)
def test_the_trace_of_the_nearest_number_of_ranks_from_above_is_used(scaling, engine, gpus, traced):
    traces = [{"engine": name, "world_size": ranks} for ranks in (256, 2, 16) for name in ("fsdp", "hybrid")]
    found = scaling["predict"].nearest(traces, engine, gpus)
    assert (found["engine"], found["world_size"]) == (engine, traced)


@pytest.mark.parametrize("share, ranks", [(1.0, 256), (2 / 3, 16), (0.0, 8)])
def test_states_shrink_as_they_are_sharded(scaling, share, ranks):
    whole, predict = 1200.0, scaling["predict"]

    def kept(n: int) -> float:
        return whole * (1 - share) + whole * share / n

    assert predict.kept_bytes(kept(256), whole, 256, ranks) == pytest.approx(kept(ranks))
    assert predict.kept_bytes(kept(256), whole, 256, 1) == pytest.approx(whole)


# --- the commands


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        ("predict", "--gpus 0", "--gpus: must be 1 to 8 or a multiple of 8, not '0'"),
        ("predict", "--gpus 8 12", "not '12'"),
        ("predict", "--gpus 100", "not '100'"),
        ("predict", "--gpus -8", "not '-8'"),
        ("predict", "--factor 0", "--factor: must be a finite number above 0, not '0'"),
        ("predict", "--factor -1", "not '-1'"),
        ("predict", "--factor nan", "not 'nan'"),
        ("predict", "--factor inf", "not 'inf'"),
        ("predict", "--jitter -1", "--jitter: must be 0 or more and below 1, for example 0.015, not '-1'"),
        ("predict", "--jitter nan", "not 'nan'"),
        ("predict", "--jitter 1", "not '1'"),
        ("predict", "--size small", "dry_run.py --size small"),
        ("dry_run", "--frames 0", "--frames: must be a positive number, not '0'"),
        ("dry_run", "--frames -1", "not '-1'"),
        ("dry_run", "--frames 1", "--frames must be 2 or more, not 1"),
        ("dry_run", "--ranks 12", "not '12'"),
        ("dry_run", "--ranks 1", "--ranks must be 2 or more"),
        ("measure", "--frames 0", "--frames: must be a positive number, not '0'"),
        ("measure", "--folder /dev/null", "--folder /dev/null cannot be made"),
        ("plot", "--out curves.svg", "must end in .png, not 'curves.svg'"),
        ("plot", "--out /dev/null/curves.png", "--out /dev/null/curves.png cannot be written"),
    ],
)
def test_what_cannot_be_is_one_error(scaling, monkeypatch, capsys, module, arguments, message):
    monkeypatch.setattr(scaling["tables"], "read_traces", list)
    save = [] if module == "plot" else ["--no-save"]
    with pytest.raises(SystemExit) as stopped:
        scaling[module].main([*arguments.split(), *save])
    written = capsys.readouterr().err
    assert stopped.value.code == 2
    assert written.startswith("error: ") and written.count("\n") == 1 and message in written


@pytest.mark.parametrize(
    "launcher, message", [("true", "1 of 1 ranks wrote no times"), ("no-such-launcher", "cannot be started")]
)
def test_a_launcher_that_starts_no_ranks_is_one_error(scaling, capsys, launcher, message):
    options = "--ranks 1 --engine torch --side 32 --frames 1 --videos 1 --no-save".split()
    assert scaling["measure"].main([*options, "--launcher", launcher]) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ") and written.count("\n") == 1 and message in written


TORCHRUN = f"""\
Traceback (most recent call last):
  File "torch/distributed/elastic/multiprocessing/errors/__init__.py", line 367, in wrapper
    return f(*args, **kwargs)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:{" "}
============================================================
[0]:
  exitcode  : -9 (pid: 26542)
  traceback : Signal 9 (SIGKILL) received by PID 26542
============================================================
"""


@pytest.mark.parametrize(
    "written, reason",
    [
        ("NOTE\n[rank 1] error: model.size: Input should be 'micro'\n  stages is required\n", "model.size: Input"),
        ("error: device is 'cuda'\n", "device is 'cuda'"),
        ("[rank0]: Traceback (most recent call last):\n[rank0]: a.b.ConfigError: no such key\n", "a.b.ConfigError: no"),
        ("MemoryError\n", "MemoryError"),
        ("", "traceback : Signal 9 (SIGKILL)"),
    ],
)
def test_the_reason_of_a_failed_launch_is_what_a_rank_wrote(scaling, written, reason):
    assert scaling["command"].failure(written + TORCHRUN).startswith(reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param("--size foo", "model.size: Input should be", marks=pytest.mark.exhaustive),
        ("--side 50", "model.image_size: must be a multiple of 32"),
        pytest.param("model.sizee=3", "unknown key 'model.sizee'", marks=pytest.mark.exhaustive),
    ],
)
def test_a_refusal_of_the_trainer_is_shown(scaling, capsys, arguments, message):
    options = "--ranks 1 --engine torch --steps 2 --warm-up 1 --side 64 --frames 3 --videos 4 --no-save".split()
    assert scaling["measure"].main([*options, *arguments.split()]) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: --engine torch --ranks 1: ") and written.count("\n") == 1 and message in written


def test_help_of_the_plot_draws_nothing(scaling, monkeypatch, capsys):
    monkeypatch.setattr(scaling["plot"], "draw", lambda *_: pytest.fail("it drew"))
    with pytest.raises(SystemExit) as stopped:
        scaling["plot"].main(["--help"])
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


def run(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / "scaling" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_dry_run_counts_the_bytes_of_data_parallelism():
    rows = run("dry_run.py", "--size", "micro", "--engine", "torch", "--ranks", "16", "--no-save")["rows"]
    gradients = [row for row in rows if row["phase"] == "backward"]
    parameters = 12_165_410
    assert {(row["kind"], row["dtype"], row["ranks"]) for row in gradients} == {("all_reduce", "float32", 16)}
    # Buckets are padded a little, and what this step does not reach (clicks, boxes) is not sent.
    assert sum(row["bytes"] for row in gradients) == pytest.approx(4 * parameters, rel=0.01)
    assert sum(row["sent"] for row in gradients) == pytest.approx(2 * 15 / 16 * 4 * parameters, rel=0.01)
    assert all(row["overlapped"] for row in gradients)


def test_curves_are_predicted_and_drawn(scaling, tmp_path):
    rows = run("predict.py", "--size", "base_plus", "--gpus", "1", "8", "256", "--no-save")["rows"]
    torch = {row["gpus"]: row for row in rows if (row["engine"], row["objects"]) == ("torch", "equal")}
    assert torch[1]["efficiency"] == pytest.approx(1.0)
    assert 1.0 > torch[8]["efficiency"] > torch[256]["efficiency"] > 0.5
    assert torch[256]["videos_per_s"] > 20 * torch[8]["videos_per_s"]
    vary = next(row for row in rows if (row["engine"], row["gpus"], row["objects"]) == ("torch", 256, "vary"))
    assert vary["efficiency"] < torch[256]["efficiency"]
    assert all(row["traced_ranks"] >= row["gpus"] for row in rows)
    scaling["plot"].draw(
        [{name: str(value) for name, value in row.items()} for row in rows], [], tmp_path / "curves.png"
    )
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ranks_are_measured_with_the_trainer():
    options = "--ranks 1 2 --engine torch --steps 2 --warm-up 1 --side 64 --frames 3 --videos 4 --no-save".split()
    rows = run("measure.py", *options)["rows"]
    assert [(row["ranks"], row["mode"], row["steps"]) for row in rows] == [(1, "weak", 2), (2, "weak", 2)]
    assert all(row["ms_p95"] >= row["ms"] > 0 and row["variation"] >= 0 for row in rows)
    assert rows[0]["efficiency"] == 1.0
    assert rows[1]["efficiency"] == pytest.approx(rows[1]["videos_per_s"] / 2 / rows[0]["videos_per_s"])


def test_a_share_that_cannot_be_is_one_error():
    command = [sys.executable, str(BENCHMARKS / "scaling" / "measure.py"), "--mode", "strong", "--ranks", "2", "3"]
    done = subprocess.run(command + ["--videos", "2", "--side", "64", "--no-save"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: strong scaling shares 3 videos, which 2 ranks do not divide; change --ranks"
