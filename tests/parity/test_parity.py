"""Our values equal those of the official trainer, and the check that says so notices when they do not."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # where check.py has it when it is run as a script

import check  # noqa: E402
from sections import Floor, OracleError, Report, step, wrap  # noqa: E402

INPUTS = {"T", "S", "B", "vid", "seed", "obj_bias", "over", "masks", "image_rule", "use_pt_input", "adamw_where"}
INPUTS |= {"init_cond_frames", "frames_to_add_correction_pt", "points"}


@pytest.fixture(scope="module")
def oracle():
    return check.load(HERE / "oracle.pt")


@pytest.fixture(scope="module")
def simulated(oracle):
    return {name: step.simulate(case) for name, case in oracle["step"].items()}


def compared(case, ours) -> Report:
    report = Report("step")
    step.compare(case, ours, report)
    return report


@pytest.mark.parametrize("section", ["groups", "parts", "loss"])
def test_section_equals_the_reference(oracle, section):
    report = check.check(wrap({section: oracle[section]}))
    assert report.rows and not report.failures, "\n".join(map(str, report.failures))


def test_training_steps_equal_the_reference(oracle, simulated):
    for name, case in oracle["step"].items():
        report = compared(case, simulated[name])
        assert len(report.rows) > 15 and not report.failures, f"{name}:\n" + "\n".join(map(str, report.failures))


def leaves(value, path=()):
    """Paths of all values of a case that are compared."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in INPUTS]
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return [] if str(path[-1]).endswith("k_proj.bias") else [path]
    return [leaf for key, item in items for leaf in leaves(item, (*path, key))]


def disturb(value):
    """The value, a little off."""
    if isinstance(value, torch.Tensor):
        value = value.clone()
        element = value.view(-1)[random.randrange(value.numel()) :][:1]
        element.copy_(disturb(element.item()))
        return value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 1.01 * value + 1e-3


@pytest.mark.parametrize("case", ["mask2", "boxes", "absent"])
def test_check_notices_every_value_that_is_off(oracle, simulated, case):
    random.seed(0)
    paths = leaves(oracle["step"][case])
    names = sorted({path[0] for path in paths})
    chosen = [random.choice([path for path in paths if path[0] == name]) for name in names]
    for *parents, last in chosen + random.sample(paths, 10) + [path for path in paths if path[0] == "losses"]:
        changed = copy.deepcopy(oracle["step"][case])
        holder = changed
        for key in parents:
            holder = holder[key]
        holder[last] = disturb(holder[last])
        assert compared(changed, simulated[case]).failures, (*parents, last)


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("loss", ("default", "loss_dice")),
        ("loss", ("gamma1", "grad_obj", 1, 0)),
        ("loss", ("inputs", "logits", 0, 0)),
        ("loss", ("per_mask", "focal")),
        ("parts", ("rope", "q_out")),
        ("parts", ("cxblock", "out")),
        ("parts", ("center_point", "points")),
        ("parts", ("mask_to_box",)),
        ("parts", ("cosine", 3, 1)),
        ("parts", ("mixed_loader", "order", 3)),
        ("parts", ("repeat_factor", 1, 2)),
        ("groups", ("t", "lr_wd", "image_encoder.trunk.pos_embed", 0)),
        ("groups", ("t", "keys", 5)),
        ("groups", ("t", "n_params")),
    ],
)
def test_check_notices_values_of_other_sections(oracle, section, path):
    random.seed(0)
    changed = copy.deepcopy(oracle[section])
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = disturb(holder[path[-1]])
    if section == "groups":
        changed = {"t": changed["t"]}
    assert check.check(wrap({section: changed})).failures


@pytest.mark.parametrize("key", ["seed", "obj_bias", "masks", "points", "adamw_where", "S"])
def test_check_notices_other_inputs(oracle, key):
    case = copy.deepcopy(oracle["step"]["image"])
    if key == "masks":
        case[key][:, 0] ^= True
    elif key == "points":
        case["frames"][0][key][1]["coords"] += 9
    elif key == "S":
        case[key], case["masks"] = 96, case["masks"][..., :96, :96]
    else:
        case[key] = 1 - 2 * case[key]
        case["seed"] = abs(case["seed"])
    assert compared(case, step.simulate(case)).failures


def test_missing_and_unknown_entries_are_named(oracle, simulated):
    for key in ("losses", "grad_norms", "memory_log", "frames"):
        case = copy.deepcopy(oracle["step"]["image"])
        del case[key]
        with pytest.raises(OracleError, match=f"step/image: key '{key}' is missing"):
            compared(case, simulated["image"])
    case = copy.deepcopy(oracle["step"]["image"])
    case["over"]["num_maskmem"] = 3
    with pytest.raises(OracleError, match="step/image/over: expected"):
        step.simulate(case)
    with pytest.raises(OracleError, match="unknown entry 'other'"):
        check.check(wrap({"parts": {"other": 1}}))


def test_report_judges_by_the_noise_floor():
    report = Report("section", "case")
    floor = Floor(absolute=1e-3, relative=1e-2)
    report.compare("within", [1.0, {"a": torch.tensor([2.0, 3.0])}], [1.05, {"a": torch.tensor([2.0, 3.1])}], floor)
    report.compare("beyond", [1.0, 2.0], [1.0, 2.5], floor)
    report.compare("infinite", float("inf"), float("inf"), floor)
    report.compare("nan", [float("nan"), 1.0], [1.0, 1.0], floor)
    report.compare("shape", torch.zeros(2), torch.zeros(3), floor)
    report.compare("names", {"a": 1}, {"b": 1}, floor)
    report.compare("order", {"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}, floor)
    report.equal("sets", {"a", "b"}, {"b", "c"})
    report.equal("lists", [1, 2], [1, 2])
    assert [row.quantity for row in report.failures] == ["beyond", "nan", "shape", "names", "sets"]
    beyond = report.failures[0]
    assert (beyond.absolute, beyond.relative, beyond.note) == (0.5, pytest.approx(0.2), "1")
    assert beyond.floors == pytest.approx(0.5 / (1e-3 + 2.5e-2))
    assert "missing c, unexpected a" in report.failures[-1].note


def test_exit_status(oracle, tmp_path, capsys):
    part = dict(oracle["parts"]["layernorm2d"])
    torch.save({"parts": {"layernorm2d": part}}, tmp_path / "good.pt")
    part["out"] = part["out"] + 1e-3
    torch.save({"parts": {"layernorm2d": part}}, tmp_path / "off.pt")
    assert check.main([str(tmp_path / "good.pt")]) == 0
    assert "1 of 1 comparisons within" in capsys.readouterr().out
    script = subprocess.run(
        [sys.executable, HERE / "check.py", tmp_path / "off.pt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert script.returncode == 1 and "FAIL" in script.stdout and "0 of 1" in script.stdout, script


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not a torch file",
        [1, 2],
        {"other": {}},
        {"step": {}, "other": {}},
        {"step": {}},
        {"step": {"a": 3}},
    ],
)
def test_files_of_another_structure(tmp_path, capsys, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert check.main([str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(str(path)) and message.count("\n") == 1
