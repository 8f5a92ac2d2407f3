"""Which checkpoints and finished stages are taken for whole."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from sam2fast import checkpoint_files
from sam2fast.checkpoint_files import list_files
from sam2fast.checkpoint_header import FORMAT, find_fault, load_stage, read_header, save_state, write_header
from sam2fast.run_state import ResumeError, RunState


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"all of them")
    files = list_files(tmp_path, [tmp_path / "weights"])
    write_header(tmp_path, {"format": FORMAT, "files": files, "state": {"taken": 8, "best": 0.1}})
    return tmp_path


def test_files_as_they_are_listed_are_whole(checkpoint: Path) -> None:
    assert find_fault(checkpoint) == ""
    (checkpoint / "weights").write_bytes(b"all of thex")
    assert "another checksum" in find_fault(checkpoint)


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("weights", b"all", "weights has 3 bytes and not 11"),
        ("weights", None, "weights is missing"),
        ("state.json", b'{"format"', "state.json cannot be read"),
        ("state.json", None, "state.json is missing"),
    ],
)
def test_a_file_that_is_cut_or_missing_is_damage(
    checkpoint: Path, name: str, content: bytes | None, fault: str
) -> None:
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    assert fault in find_fault(checkpoint)


def test_one_other_digit_in_the_state_is_damage(checkpoint: Path) -> None:
    assert read_header(checkpoint)["state"] == {"taken": 8, "best": 0.1}
    path = checkpoint / "state.json"
    written = path.read_text()
    path.write_text(written.replace('"taken": 8', '"taken": 9'))
    assert "state.json cannot be read: its text is not that which was written" in find_fault(checkpoint)
    path.write_text(json.dumps({name: value for name, value in json.loads(written).items() if name != "crc32"}))
    assert find_fault(checkpoint) == ""  # of an earlier version


def test_a_checkpoint_that_lists_nothing_is_damaged(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text(json.dumps({"format": FORMAT}))
    assert "does not list its files" in find_fault(checkpoint)


def test_a_file_system_that_fails_says_nothing_about_the_files(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be read for a moment must not be passed over, and so deleted by the next save."""

    def failing(path: Path) -> int:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint_files, "_checksum", failing)
    with pytest.raises(ResumeError, match="cannot be read at present.*Input/output error.*may be whole"):
        find_fault(checkpoint)


def test_damaged_weights_of_a_finished_stage_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    save_state(tmp_path, RunState(stage=1, global_step=8))
    assert load_stage(tmp_path).global_step == 8
    written = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(written.replace('"global_step": 8', '"global_step": 9'))
    with pytest.raises(ResumeError, match="finished stage.*its text is not that which was written"):
        load_stage(tmp_path)
    (tmp_path / "state.json").write_text(written)
    (tmp_path / "model.pt").write_bytes(b"weight5")
    with pytest.raises(ResumeError, match="finished stage.*model.pt has another checksum"):
        load_stage(tmp_path)
