"""benchmarks/run.py keeps its promises: the JSON line, one error line, no time for a kernel that is wrong."""

from __future__ import annotations

import csv
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam2fast_kernels import library

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["mask_loss", "--device", "cpu", "--shape", "1x2@16", "--repeats", "2"]

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def start(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def last_line(printed: str) -> dict:
    return json.loads(printed.splitlines()[-1])


@needs_proc
def test_last_line_is_json_against_the_baseline():
    before = sorted(BENCHMARKS.glob("results/*"))
    done = start(*SMALL, "--provider", "cpp", "triton", "--mode", "fwd", "full", "--threads", "1", "--no-save")
    assert done.returncode == 0, done.stderr
    result = last_line(done.stdout)
    assert result["case"] == "mask_loss"
    assert result["device"].endswith("1 threads")
    built = ["cpp"] if library.load_native() else []
    assert {(row["provider"], row["mode"]) for row in result["rows"]} == {
        (provider, mode) for provider in ["eager", *built] for mode in ("fwd", "full")
    }
    baseline = {row["mode"]: row for row in result["rows"] if row["provider"] == "eager"}
    for row in result["rows"]:
        base = baseline[row["mode"]]
        assert row["shape"] == "1x2@16"
        assert row["ms"] > 0 and row["peak_bytes"] > 0
        assert row["speedup"] == pytest.approx(base["ms"] / row["ms"])
        assert row["memory_ratio"] == pytest.approx(base["peak_bytes"] / row["peak_bytes"])
    skipped = {entry["provider"]: entry["reason"] for entry in result["skipped"]}
    assert "CUDA" in skipped["triton"] and "skipped: triton" in done.stdout
    assert ("cpp" in skipped) != bool(built)
    assert sorted(BENCHMARKS.glob("results/*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "unknown case 'nothing'; valid: mask_loss, "),
        (["mask_loss", "--provider", "cpp", "magic"], "unknown provider 'magic' of case mask_loss; valid: eager, "),
        (["mask_loss", "--mode", "sideways"], "unknown mode 'sideways' of case mask_loss; valid: fwd, bwd, full"),
        (["mask_loss", "--shape", "8x3", "8y3"], "unknown shape '8y3' of case mask_loss: write NxM, for instance 8x3"),
        (["mask_loss", "--shape", "0x3"], "unknown shape '0x3'"),
        (["click_sampling", "--shape", "8x3"], "unknown shape '8x3' of case click_sampling: write N, for instance 8"),
        (["mask_loss", "--repeats", "0"], "must be a whole number of at least 1, not '0'"),
        ([], "name a case: mask_loss, "),
    ],
)
def test_a_mistake_is_one_line(benchmarks, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        benchmarks("run").main(["--device", "cpu", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


def test_the_command_itself_returns_2_for_a_mistake():
    done = start("mask_loss", "--shape", "many")
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1


def off_by_a_little(eager):
    def run(inputs):
        outputs = eager(*inputs)
        return outputs | {"dice": outputs["dice"] * 1.001}

    return run


def wrong_gradient(eager):
    def run(inputs):
        doubled = 2 * inputs.logits - inputs.logits.detach()
        return eager(doubled, inputs.targets, inputs.weights)

    return run


def not_a_number(eager):
    def run(inputs):
        outputs = eager(*inputs)
        return outputs | {"iou": outputs["iou"] * torch.nan}

    return run


def broken(eager):
    def run(inputs):
        raise RuntimeError("illegal memory access")

    return run


@pytest.mark.parametrize(
    "wrong, message",
    [
        (off_by_a_little, "dice is off by "),
        (wrong_gradient, "gradient is off by "),
        (not_a_number, "iou is off by nan"),
        (broken, "RuntimeError: illegal memory access"),
    ],
)
def test_a_wrong_kernel_is_refused(benchmarks, monkeypatch, capsys, wrong, message):
    case, mask_loss = benchmarks("cases").load("mask_loss"), benchmarks("cases.mask_loss")
    provider = benchmarks("harness.case").Provider(lambda: wrong(mask_loss.eager))
    monkeypatch.setitem(case.providers, "wrong", provider)
    status = benchmarks("run").main([*SMALL, "--provider", "wrong", "--no-save"])
    printed = capsys.readouterr()
    assert status == 1
    assert f"error: wrong fails its check on {case.check_shape}: {message}" in printed.err
    result = last_line(printed.out)
    assert {row["provider"] for row in result["rows"]} == {"eager"}
    assert [entry["provider"] for entry in result["refused"]] == ["wrong"]


def test_a_kernel_that_is_wrong_only_at_the_timed_shape_is_refused(benchmarks, monkeypatch, capsys):
    case, mask_loss = benchmarks("cases").load("mask_loss"), benchmarks("cases.mask_loss")

    def run(inputs):
        wrong = off_by_a_little(mask_loss.eager)
        return wrong(inputs) if inputs.logits.shape[-1] == 16 else mask_loss.eager(*inputs)

    monkeypatch.setitem(case.providers, "wrong", benchmarks("harness.case").Provider(lambda: run))
    assert benchmarks("run").main([*SMALL, "--provider", "wrong", "--no-save"]) == 1
    assert "error: wrong fails its check on 1x2@16: dice is off by " in capsys.readouterr().err


def out_of_memory(inputs):
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")


@pytest.mark.parametrize("run, size, reason", [(out_of_memory, 0, "does not fit"), (print, 1e9, "needs about ")])
def test_what_memory_cannot_hold_is_skipped(benchmarks, monkeypatch, capsys, run, size, reason):
    case, mask_loss = benchmarks("cases").load("mask_loss"), benchmarks("cases.mask_loss")
    small = case.check_shape

    def greedy(inputs):
        return mask_loss.eager(*inputs) if inputs.logits.shape[-1] == case.shape(small).side else run(inputs)

    monkeypatch.setitem(case.providers, "greedy", benchmarks("harness.case").Provider(lambda: greedy, size))
    assert benchmarks("run").main([*SMALL, "--provider", "greedy", "--mode", "fwd", "--no-save"]) == 0
    result = last_line(capsys.readouterr().out)
    assert [row["provider"] for row in result["rows"]] == ["eager"]
    (entry,) = result["skipped"]
    assert entry["provider"] == "greedy" and entry["shape"] == "1x2@16" and reason in entry["reason"]


def test_clicks_outside_the_wrong_pixels_are_refused(benchmarks, monkeypatch, capsys):
    case, clicks = benchmarks("cases").load("click_sampling"), benchmarks("cases.click_sampling")

    def run(inputs):
        outputs = clicks.eager(inputs)
        return outputs | {"labels": 1 - outputs["labels"]}

    monkeypatch.setitem(case.providers, "wrong", benchmarks("harness.case").Provider(lambda: run))
    arguments = ["click_sampling", "--device", "cpu", "--shape", "2@16", "--repeats", "1", "--provider", "wrong"]
    assert benchmarks("run").main([*arguments, "--no-save"]) == 1
    assert "clicks lie outside the wrong pixels" in capsys.readouterr().err


def test_measurements_are_kept(benchmarks, monkeypatch, tmp_path, capsys):
    report = benchmarks("harness.report")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    for _ in range(2):
        assert benchmarks("run").main([*SMALL, "--provider", "eager", "--mode", "full"]) == 0
    (path,) = tmp_path.rglob("*.csv")
    assert path.relative_to(tmp_path) == Path("results/mask_loss.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and list(rows[0]) == report.COLUMNS
    assert {(row["provider"], row["mode"], row["shape"], row["dtype"]) for row in rows} == {
        ("eager", "full", "1x2@16", "float32")
    }
    assert all(float(row["ms"]) > 0 and float(row["copy_gbps"]) > 0 and row["torch"] for row in rows)
    assert platform.node() not in path.read_text() and os.sep + "home" not in path.read_text()


@needs_proc
def test_peak_memory_counts_tensors_and_scratch_of_c_code(benchmarks):
    """16 MiB of a tensor that stays, and 24 MiB of malloc that are gone before anybody looks."""
    program = f"""
import ctypes, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
from cases.click_sampling import CASE
from harness.memory import ProcessMeter, peak_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def run(inputs):
    kept = torch.ones(4 << 20)
    scratch = libc.malloc(24 << 20)
    libc.memset(scratch, 1, 24 << 20)
    libc.free(scratch)
    return {{"kept": kept}}
torch.set_num_threads(1)
inputs = CASE.make_inputs(CASE.shape("1@16"), torch.device("cpu"))
print(peak_bytes(CASE, run, inputs, ["fwd"], ProcessMeter())["fwd"])
"""
    environment = os.environ | benchmarks("harness.memory").CHILD_ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == pytest.approx(40 << 20, abs=2 << 20)


def test_every_case_is_listed(benchmarks, capsys):
    assert benchmarks("run").main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in benchmarks("cases").NAMES:
        assert f"{name}: " in printed
    assert "triton: not on this device: runs on CUDA only" in printed
