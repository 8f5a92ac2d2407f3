"""Configuration: what loads, what is refused and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam2fast.config import ConfigError
from sam2fast.config_file import load_config, save_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MINIMAL = """
name: minimal
data: {root: /d, datasets: {davis: {root: "${data.root}/davis"}}}
stages:
  - {name: video, steps: 3, data: [{dataset: davis, frames: 4}]}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    checkpoint = ["model.checkpoint=sam2.pt"] if "checkpoint: ???" in path.read_text().replace('"', "") else []
    config = load_config(path, ["data.root=/data", *checkpoint])
    assert config.stages


def test_overrides_interpolation_and_round_trip(minimal: Path, tmp_path: Path) -> None:
    config = load_config(
        minimal,
        ["stages.0.steps=10", "model.size=micro", "data.root=/e", "stages.0.prompts.video={mask: 1, click: 0, box: 0}"],
    )
    assert config.stages[0].steps == 10 and config.model.size == "micro"
    assert config.data.datasets["davis"].root == "/e/davis" and config.output_dir == "runs/minimal"
    assert config.stages[0].prompts.video.mask == 1
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.sise=tiny", "unknown key 'model.sise'; did you mean 'size'?"),
        ("stages.0.data.0.frame=3", "unknown key 'stages.0.data.0.frame'; did you mean 'frames'?"),
        ("data.datasets.davis.forma=sav", "did you mean 'format'?"),
        ("model.image_size=100", "model.image_size: must be a multiple of 32; nearest: 96 (got 100)"),
        ("model.size=giant", "model.size"),
        ("model={local_memory_init: true, checkpoint: a.pt}", "local_memory_init is for random weights"),
        ("stages.0.data.0.frames=2", "a clip whose every frame is given as a mask teaches nothing"),
        ("stages.0.optim.lr=-1", "stages.0.optim.lr: Input should be greater than 0 (got -1)"),
        ("stages.0.optim.lr=nan", "stages.0.optim.lr"),
        ("stages.0.steps=many", "stages.0.steps"),
        ("stages.0.prompts.video.mask=0.9", "mask + click + box must be 1, not 1.4"),
        (
            "stages.0.data.0.dataset=davos",
            "names dataset 'davos', which data.datasets does not define; did you mean 'davis'?",
        ),
        ("stages.0.data.0.stride=[3, 1]", "stride"),
        ("stages.1.steps=2", "'1' is not an index of a list of 1"),
        ("stages=[]", "stages"),
        ("stages.0.data=[]", "stages.0.data: Tuple should have at least 1 item"),
        ("--verbose", "write key=value"),
    ],
)
def test_mistakes_are_one_clear_error(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_values_left_to_the_user_are_named() -> None:
    with pytest.raises(ConfigError, match=r"leaves data.root for you to set; add data.root=VALUE"):
        load_config(CONFIGS / "quickstart_davis.yaml")


def test_mistakes_are_blamed_on_who_made_them(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["stages.0.steps=-1", "stages.0.steps=many", "model.sise=tiny"])
    text = str(caught.value)
    assert text.startswith("the command line: ") and str(minimal) not in text
    assert "'stages.0.steps=many'" in text and "=-1" not in text and "set by 'model.sise=tiny'" in text
    minimal.write_text(minimal.read_text() + "colour: red\n")
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["model.sise=tiny", "seed=1"])
    text = str(caught.value)
    assert text.startswith(f"{minimal} and the command line: ") and "set by 'model.sise=tiny'" in text
    assert "unknown key 'colour'" in text and "seed=1" not in text


@pytest.mark.parametrize("text", ["", "- a list", "name: [unclosed", "name: ${nowhere}", "just text", "5"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path)


def test_a_missing_name_is_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "nameless.yaml"
    path.write_text(MINIMAL.replace("name: minimal", ""))
    with pytest.raises(ConfigError, match="name is required and not set"):
        load_config(path)
    assert load_config(path, ["name=given"]).output_dir == "runs/given"


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="no config file at"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    "override", ["name={a", "name=[a", "name='a", "name=${a", "name=${nope}", "stages.0.steps=a: b: c"]
)
def test_broken_override_is_named(minimal: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["data.root=/e", override])
    assert f"override {override!r}" in str(caught.value) and "/e" not in str(caught.value)
