"""`sam2fast export` of checkpoints of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import FORKED, run, train
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sam2fast.models.official import from_official


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, exact_config: Path, synthetic: Path) -> Path:
    """Of a run with averages, with other settings of the model than the official ones."""
    output = tmp_path_factory.mktemp("export") / "run"
    settings = ["stages.0.steps=3", "stages.0.optim.ema=0.5", "model.multimask_tracking=false", "checkpoint.every=2"]
    train(FORKED, exact_config, synthetic, output, *settings)
    return output / "checkpoints" / "step_00000002"


def export(checkpoint: Path, out: Path, *options: str) -> CompletedProcess:
    arguments = ["export", "--checkpoint", str(checkpoint), "--out", str(out), *options]
    return run([*FORKED, "-m", "sam2fast.cli", *arguments], cwd=out.parent)


def test_averages_or_weights_are_written(checkpoint: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(checkpoint, tmp_path / "all.pt")
    stored = torch.load(tmp_path / "all.pt", weights_only=True)
    for name, kind, options in (("mean", "averages", []), ("raw", "weights", ["--raw"])):
        done = export(checkpoint, tmp_path / name, *options)
        assert done.returncode == 0 and kind in done.stdout, done.stderr
        found = from_official(torch.load(tmp_path / name / "model.pt", weights_only=True)["model"])
        wanted = {key.partition("/")[2]: value for key, value in stored.items() if key.startswith(f"{kind}/")}
        assert wanted and all(torch.equal(found[key], value) for key, value in wanted.items())
        assert {"encoder.pt", "decoder.pt", "memory.pt"} < {path.name for path in (tmp_path / name).iterdir()}
    assert any(not torch.equal(stored[f"weights/{key[9:]}"], stored[key]) for key in stored if key[:9] == "averages/")


def test_a_hugging_face_configuration_is_that_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name, options, side, multimask in (
        ("run", [], 64, False),
        ("other", ["--image-size", "128", "--multimask-tracking"], 128, True),
    ):
        done = export(checkpoint, tmp_path / name, "--layout", "huggingface", *options)
        assert done.returncode == 0, done.stderr
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["image_size"], config["multimask_output_for_tracking"]) == (side, multimask)


@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_a_part_of_a_model_is_no_model(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    part = checkpoint.parents[1] / "export" / "encoder.pt"
    done = export(part, tmp_path / "out", "--layout", layout)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert "encoder.pt does not fit SAM 2.0 micro" in done.stderr and "a part of a model" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_image_size_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "out", "--layout", "huggingface", "--image-size", "50")
    assert done.returncode == 2 and done.stderr == "error: --image-size must be a positive multiple of 32, not 50\n"


@pytest.mark.parametrize("damage", ["run", "empty", "metadata", "half"])
def test_what_is_no_whole_checkpoint_is_one_error(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    source = tmp_path / "step_00000002"
    if damage == "run":
        source = checkpoint.parents[1]
    elif damage == "empty":
        source.mkdir()
    else:
        shutil.copytree(checkpoint, source)
        (source / {"metadata": ".metadata", "half": "__0_0.distcp"}[damage]).write_bytes(b"half")
    done = export(source, tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert str(source) in done.stderr and "no whole checkpoint" in done.stderr
    assert not (tmp_path / "out").exists()
