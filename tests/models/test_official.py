"""Exchange with official checkpoints: names, order, shapes, real tensors, split files and refused files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sam2fast.models.architecture import architecture
from sam2fast.models.official import (
    CheckpointError,
    component_of,
    from_official,
    load_checkpoint,
    load_components,
    parameter_layers,
    save_checkpoint,
    split_checkpoint,
    to_official,
)
from sam2fast.models.sam2 import SAM2

ORACLE = Path(__file__).parents[1] / "parity" / "oracle.pt"


def meta_model(size: str, version: str = "2.1") -> SAM2:
    with torch.device("meta"):
        return SAM2(architecture(size, version))


@pytest.fixture(scope="module")
def micro() -> SAM2:
    torch.manual_seed(0)
    return SAM2(architecture("micro", image_size=64))


@pytest.mark.parametrize(("size", "case"), [("tiny", "t"), ("base_plus", "b+"), ("large", "l")])
def test_names_order_and_shapes_are_the_official_ones(size, case):
    want = torch.load(ORACLE, weights_only=True)["groups"][case]["keys"]
    state = to_official(meta_model(size).state_dict())
    assert [f"{name} {tuple(value.shape)}" for name, value in state.items()] == want


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_names_order_and_shapes_equal_those_of_the_published_files(size, shared_data):
    manifest = json.loads((shared_data / "sam2_ckpt_heads" / f"sam2.1_hiera_{size}.manifest.json").read_text())
    state = to_official(meta_model(size).state_dict())
    want = [(name, entry["shape"], f"torch.{entry['dtype']}") for name, entry in manifest["tensors"].items()]
    assert [(name, list(value.shape), str(value.dtype)) for name, value in state.items()] == want


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_published_tensors_load(size, shared_data, tmp_path):
    model = SAM2(architecture(size))
    published = np.load(shared_data / "sam2_ckpt_heads" / f"sam2.1_hiera_{size}.tensors.npz")
    assert len(published.files) >= 6
    state = to_official(model.state_dict()) | {name: torch.from_numpy(published[name]) for name in published.files}
    torch.save({"model": state}, tmp_path / "model.pt")
    load_checkpoint(model, tmp_path / "model.pt")
    loaded = to_official(model.state_dict())
    assert all(torch.equal(loaded[name], torch.from_numpy(published[name])) for name in published.files)


def test_sam_2_0_lacks_three_tensors():
    new, old = (to_official(meta_model("tiny", version).state_dict()) for version in ("2.1", "2.0"))
    assert set(new) - set(old) == {"no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"}
    assert set(old) < set(new)


def test_conversion_there_and_back(micro):
    state = micro.state_dict()
    back = from_official(to_official(state))
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] or torch.equal(back[name], state[name]) for name in state)


def test_official_order_does_not_depend_on_that_of_the_parts(micro):
    state = micro.state_dict()
    buffers_first = dict(micro.named_buffers()) | state
    shuffled = {name: state[name] for name in buffers_first}
    assert list(shuffled) != list(state)
    assert list(to_official(shuffled)) == list(to_official(state))


def test_save_and_load(micro, tmp_path):
    save_checkpoint(micro, tmp_path / "new" / "model.pt")
    content = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == list(to_official(micro.state_dict()))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pt"]
    other = SAM2(architecture("micro", image_size=128))
    load_checkpoint(other, tmp_path / "new" / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), micro.state_dict().values(), strict=True))


def test_saving_over_a_checkpoint_that_cannot_be_written_keeps_it(micro, tmp_path, monkeypatch):
    save_checkpoint(micro, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(micro, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before


def test_split_files_restore_their_parts_alone(micro, tmp_path):
    paths = split_checkpoint(micro, tmp_path)
    states = {part: torch.load(path, weights_only=True)["model"] for part, path in paths.items()}
    assert set(states) == {"encoder", "decoder", "memory"}
    assert sum(map(len, states.values())) == len(micro.state_dict())
    torch.manual_seed(1)
    other = SAM2(architecture("micro"))
    before = {name: value.clone() for name, value in to_official(other.state_dict()).items()}
    load_components(other, tmp_path, ("encoder", "memory"))
    after, source = to_official(other.state_dict()), to_official(micro.state_dict())
    for name, value in after.items():
        kept = component_of(name) in ("prompt_encoder", "mask_decoder")
        assert torch.equal(value, before[name] if kept else source[name]), name


def test_splitting_a_file_equals_splitting_the_model(micro, tmp_path):
    save_checkpoint(micro, tmp_path / "model.pt")
    a, b = split_checkpoint(micro, tmp_path / "a"), split_checkpoint(tmp_path / "model.pt", tmp_path / "b")
    for part, path in a.items():
        one, two = (torch.load(p, weights_only=True)["model"] for p in (path, b[part]))
        assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_a_part_of_another_size_changes_nothing(micro, tmp_path):
    split_checkpoint(micro, tmp_path)
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.zeros(1, 96, 7, 7)}}, tmp_path / "encoder.pt")
    torch.manual_seed(2)
    other = SAM2(architecture("micro"))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="encoder.pt"):
        load_components(other, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with pytest.raises(CheckpointError, match="'brain'.*encoder, decoder, memory"):
        load_components(other, tmp_path, ("brain",))


def test_components():
    assert component_of("image_encoder.neck.convs.0.conv.weight") == "encoder"
    assert component_of("sam_prompt_encoder.no_mask_embed.weight") == "prompt_encoder"
    assert component_of("sam_mask_decoder.conv_s0.bias") == "mask_decoder"
    for name in ("no_obj_ptr", "obj_ptr_proj.layers.0.weight", "mask_downsample.bias", "memory_encoder.out_proj.bias"):
        assert component_of(name) == "memory"


def test_parameter_layers(micro):
    layers = parameter_layers(micro)
    assert layers.keys() == to_official(dict(micro.named_parameters())).keys()
    trunk = "image_encoder.trunk."
    assert layers[f"{trunk}pos_embed"] == layers[f"{trunk}patch_embed.proj.weight"] == 0
    assert layers[f"{trunk}blocks.0.norm1.weight"] == 1
    assert layers[f"{trunk}blocks.6.mlp.layers.1.bias"] == 7
    assert layers["image_encoder.neck.convs.0.conv.weight"] == layers["no_obj_ptr"] == 8


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "old pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(micro, kind, tmp_path):
    proof, path = tmp_path / "was-run", tmp_path / "model.pt"
    content = {"model": micro.state_dict(), "extra": Payload(proof)}
    if "pickle" in kind:
        path.write_bytes(pickle.dumps({"model": Payload(proof)}, protocol=2 if kind == "old pickle" else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(CheckpointError, match="refused") as error:
        load_checkpoint(micro, path)
    assert str(path) in str(error.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # the payload works


def test_damaged_files_and_other_kinds_of_files(micro, tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(micro, path)
    save_checkpoint(micro, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(64)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a complete PyTorch checkpoint") as error:
            load_checkpoint(micro, path)
        assert str(path) in str(error.value) and str(len(content)) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"a": torch.zeros(1)}}, torch.zeros(3), {"model": {"a": "b"}}, {"model": torch.zeros(2)}, [1, 2]],
)
def test_files_without_a_state_dict(micro, content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="'model'"):
        load_checkpoint(micro, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("size", "version", "words"),
    [("small", "2.1", ["SAM 2.1 small", "SAM 2.1 micro", "model.size"]),
     ("micro", "2.0", ["SAM 2.0 micro", "SAM 2.1 micro", "3 missing", "model.version"])],
)  # fmt: skip
def test_another_size_or_version_is_named(micro, size, version, words, tmp_path):
    state = to_official(meta_model(size, version).state_dict())
    zeros = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    torch.save({"model": zeros}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(micro, tmp_path / "x.pt")
    assert all(word in str(error.value) for word in ["x.pt", *words])


def test_missing_extra_and_misshapen_tensors_are_named(micro, tmp_path):
    state = to_official(micro.state_dict())
    del state["no_mem_embed"]
    state["surprise"] = torch.zeros(1)
    state["no_obj_ptr"] = torch.zeros(2, 256)
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(micro, tmp_path / "model.pt")
    for words in ("1 missing (first: no_mem_embed)", "unexpected (first: surprise)", "shape (first: no_obj_ptr)"):
        assert words in str(error.value)
