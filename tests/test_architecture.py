"""The rules of the house: who may import whom, which names are free, what may not be written down."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"sam2fast": ROOT / "sam2fast", "sam2fast_kernels": ROOT / "kernels"}

# What each part of sam2fast may import of sam2fast: itself and these. A new part needs a place here.
ALLOWED = {
    "config_section": set(),
    "performance": {"config_section"},
    "config_data": {"config_section"},
    "config": {"config_section", "config_data", "performance"},
    "compat": set(),
    "signals": set(),
    "versions": set(),
    "config_file": {"config"},
    "data": {"config", "signals"},
    "parallel": {"config", "performance"},
    "telemetry": {"config"},
    "models": {"config", "performance", "compat", "data.sample"},
    "losses": {"config"},
    "optim": {"config", "models"},
    "evaluation": {"config", "data", "models", "parallel"},
    "stopping": {"parallel", "signals"},
    "checkpoint_files": {"config", "parallel"},
    "checkpoint_tensors": set(),
    "run_state": {"config"},
    "checkpoint_header": {"checkpoint_files", "run_state"},
    "checkpoint": {"config", "parallel", "checkpoint_files", "checkpoint_tensors", "checkpoint_header", "run_state"},
    "export": {"config", "models", "checkpoint", "checkpoint_files"},
    "run_folder": {"config", "config_file", "checkpoint", "checkpoint_header", "run_state"},
    "memory_plan": {"config", "performance", "data.sample", "models", "losses", "optim", "parallel"},
    "step_plan": {"config", "data", "models"},
    "out_of_memory": {"config", "performance", "data.sample", "models", "parallel", "run_state", "memory_plan"},
    "trainer": {"config", "data", "models", "losses", "optim", "parallel", "telemetry", "checkpoint", "stopping"},
}
ALLOWED["out_of_memory"] |= {"step_plan"}
ALLOWED["checkpoint"] |= {"versions"}
ALLOWED["trainer"] |= {"step_plan", "out_of_memory", "run_state"}
ALLOWED["recipe"] = {*ALLOWED, "trainer"}
ALLOWED["cli"] = {*ALLOWED, "recipe"}
ALLOWED["train"] = {"cli"}

DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pynvml": "nvidia-ml-py",
    "nvidia": "nvidia-dali-cuda130",
}
"""Import names that differ from the name of the package to install."""

TAKEN = {"accelerate", "datasets", "evaluate", "kernels", "lightning", "training"}
"""Third-party modules that are often installed beside sam2fast, wherever this test runs."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name and file of every module of a package."""
    found = {}
    for path in sorted(PACKAGES[package].rglob("*.py")):
        parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere; `from x import y` gives x.y where that is a module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            target = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                yield inner if inner in known else target


SAM2FAST = modules("sam2fast")
KERNELS = modules("sam2fast_kernels")


@pytest.mark.parametrize("name", SAM2FAST)
def test_imports_point_down(name):
    part = name.split(".")[1] if "." in name else None
    for target in imports(name, SAM2FAST[name], SAM2FAST):
        if target == "sam2fast" or not target.startswith("sam2fast."):
            continue
        assert part, f"sam2fast/__init__.py must stay empty of imports, it has {target}"
        assert part in ALLOWED, f"{part} is a new part of sam2fast: give it a place in ALLOWED"
        inner = target.removeprefix("sam2fast.")
        allowed = any(f"{inner}.".startswith(f"{prefix}.") for prefix in (part, *ALLOWED[part]))
        assert allowed, f"{name} imports {target}; {part} may import {sorted(ALLOWED[part]) or 'nothing of ours'}"


def test_allowed_imports_have_no_cycle():
    seen: list[str] = []
    for part, below in ALLOWED.items():
        assert {name.partition(".")[0] for name in below} <= set(seen), f"{part} may import what comes after it"
        seen.append(part)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stand_alone(name):
    """Own modules by relative imports only; of others torch, and triton where it is present."""
    for node in ast.walk(ast.parse(KERNELS[name].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for target in names:
            top = target.partition(".")[0]
            assert top in {"torch", "triton"} | set(sys.stdlib_module_names), f"{name} imports {target}"


def test_nobody_imports_tests_or_benchmarks():
    for name, path in {**SAM2FAST, **KERNELS}.items():
        tops = {target.partition(".")[0] for target in imports(name, path, {})}
        assert not tops & {"tests", "benchmarks", "kernels", "configs"}, name


def test_third_party_imports_are_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = declared["dependencies"] + sum(declared["optional-dependencies"].values(), [])
    known = {re.match(r"[\w-]+", text)[0].lower() for text in texts} | {"sam2fast", "sam2fast_kernels", ""}
    for name, path in SAM2FAST.items():
        tops = {target.partition(".")[0] for target in imports(name, path, SAM2FAST)} - set(sys.stdlib_module_names)
        undeclared = {top for top in tops if DISTRIBUTIONS.get(top, top).lower() not in known}
        assert not undeclared, f"{name} imports {undeclared}, which pyproject.toml does not name"


def test_every_folder_of_modules_is_a_package():
    for path in {**SAM2FAST, **KERNELS}.values():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} would be left out of the installed package"


def test_no_name_shadows_another_module():
    """`python sam2fast/train.py` puts sam2fast/ on sys.path, where its files would hide modules of the same name."""
    ours = {path.stem for path in PACKAGES["sam2fast"].iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    others = {name for name, owners in importlib.metadata.packages_distributions().items() if owners != ["sam2fast"]}
    hidden = ours & (others | TAKEN | set(sys.stdlib_module_names))
    assert not hidden, f"sam2fast/ has {sorted(hidden)}, names of other modules"


def test_model_and_engine_import_without_optional_libraries():
    """A cluster's torch image has no deepspeed, video or plotting libraries; models, losses and engines need none."""
    absent = ["deepspeed", "av", "pycocotools", "matplotlib", "transformers", "tensorboard", "pynvml", "triton"]
    wanted = [
        "sam2fast_kernels",
        "sam2fast.models.sam2",
        "sam2fast.models.rollout",
        "sam2fast.losses",
        "sam2fast.optim",
        "sam2fast.parallel",
    ]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(wanted)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_machine_paths():
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(rb"(?<![\w.$}])/(?:work|tmp|root|home|mnt)/")
    for path in filter(None, listing.stdout.split("\0")):
        content = (ROOT / path).read_bytes() if (ROOT / path).is_file() else b""
        if b"\0" in content[:8000]:
            continue
        lines = [number for number, line in enumerate(content.splitlines(), 1) if pattern.search(line)]
        assert not lines, f"{path} names a path of one machine in line {lines}"
