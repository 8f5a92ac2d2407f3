"""Which samples a run trains on, whatever kills it and however many ranks go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import FORKED, TWO_FORKED, command, kill_at, run

from sam2fast.config_file import load_config
from sam2fast.data.formats import open_dataset
from sam2fast.data.sampling import ClipDataset

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "recording_train.py")
SETTINGS = [
    "stages.0.data=[{dataset: images, max_objects: 2}]",
    "stages.0.steps=9",
    "data.datasets.images.format=sa1b",
    "data.datasets.images.root=${data.root}/images",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",  # that of step 2 is there when step 3 ends
]


@pytest.mark.slow
def test_no_sample_is_lost_or_repeated(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    """kill -9 of one rank, then of two, then one with another batch size: only steps that were not saved come again."""
    output = tmp_path / "run"
    parts = [
        (FORKED, "workers=0", "batch_size=1", 3),
        (TWO_FORKED, "workers=2", "batch_size=1", 6),
        (FORKED, "workers=0", "batch_size=3", None),
    ]
    for number, (launcher, workers, batch_size, killed) in enumerate(parts):
        arguments = command(launcher, exact_config, synthetic, output, *SETTINGS, f"data.{workers}")
        arguments = [SCRIPT if text.endswith("train.py") else text for text in arguments]
        arguments += [f"stages.0.data.0.{batch_size}"]
        record = {"RECORD": str(tmp_path / f"ids{number}")}
        if killed:
            kill_at(arguments, output, killed, **record)
        else:
            done = run(arguments, cwd=tmp_path, **record)
            assert done.returncode == 0, done.stderr[-3000:]

    used: dict[int, list[str]] = {}
    for number in range(len(parts)):
        lines = [
            json.loads(line)
            for path in sorted(tmp_path.glob(f"ids{number}.*"))  # by rank
            for line in path.read_text().splitlines()
        ]
        first = min(line["step"] for line in lines)
        assert number == 0 or first > 0, "went on from a checkpoint"
        used = {step: ids for step, ids in used.items() if step < first}
        for line in lines:
            used.setdefault(line["step"], []).extend(line["ids"])
    assert sorted(used) == list(range(9))
    seen = [name for step in sorted(used) for name in used[step]]
    assert seen == order(exact_config, synthetic, len(seen))
    names = [name.split("@")[0] for name in seen]
    assert len(names) > 16 and all(len(set(names[first : first + 8])) == 8 for first in (0, 8))


def order(path: Path, data: Path, count: int) -> list[str]:
    """Ids of the first samples, straight from the dataset."""
    config = load_config(str(path), [f"data.root={data}", "output_dir=unused", *SETTINGS])
    item = config.stages[0].data[0]
    dataset = open_dataset(config.data.datasets["images"], "images", config.seed)
    clips = ClipDataset(dataset, item, config.stages[0].augment, config.model.image_size, [config.seed, 0, 0])
    return [clips[number].sample_id for number in range(count)]
