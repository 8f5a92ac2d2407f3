"""What is installed: the right packages under the right names, with and without a compiler."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "sam2fast",
    "kernels",
    "configs",
    "tests",
    "requirements",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
)

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="cmake or a C++ compiler is missing"
)


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a clean copy of the checkout; returns it and what pip printed."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "_native*.so", "*.pt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, checkout]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    (wheel,) = folder.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory) -> tuple[Path, str]:
    """A wheel built where neither cmake nor a compiler is on PATH."""
    empty = tmp_path_factory.mktemp("path")
    return build_wheel(tmp_path_factory.mktemp("plain"), PATH=str(empty), CXX="")


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory) -> tuple[Path, str]:
    return build_wheel(tmp_path_factory.mktemp("compiled"))


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def install(wheel: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)


def run_installed(target: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program that sees the packages in `target` before those of the test environment, and no checkout."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_it_installs_and_says_what_is_slower(plain_wheel, tmp_path):
    wheel, printed = plain_wheel
    assert wheel.name.endswith("-py3-none-any.whl")
    assert printed.count("compiled operators skipped: cmake is not installed") >= 1
    install(wheel, tmp_path)
    program = (
        "from sam2fast_kernels import rle, library; assert not library.load_native(); "
        "print(rle.__file__, *[rle.decode([[1, 3]], (2, 2)).sum().item() for _ in range(2)])"
    )
    done = run_installed(tmp_path, program)
    assert done.stdout.split() == [str(tmp_path / "sam2fast_kernels" / "rle" / "__init__.py"), "3", "3"], done.stderr
    assert len(re.findall("about ten times slower", done.stderr)) == 1


def test_wheel_holds_both_packages_and_no_other(plain_wheel):
    names = contents(plain_wheel[0])
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sam2fast", "sam2fast_kernels"}
    for package, folder in (("sam2fast", "sam2fast"), ("sam2fast_kernels", "kernels")):
        modules = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert modules == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith("rle/README.md") for name in names)


def test_lives_beside_the_package_named_kernels(plain_wheel, tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("def get_kernel():\n    return 'the other package'\n")
    install(plain_wheel[0], tmp_path)
    program = (
        "import kernels, sam2fast, sam2fast_kernels; print(kernels.get_kernel()); "
        "print(kernels.__file__, sam2fast.__file__, sam2fast_kernels.__file__)"
    )
    done = run_installed(tmp_path, program)
    first, second = done.stdout.splitlines()
    assert first == "the other package"
    packages = ("kernels", "sam2fast", "sam2fast_kernels")
    assert second.split() == [str(tmp_path / name / "__init__.py") for name in packages]


def test_console_script_is_declared(plain_wheel):
    with zipfile.ZipFile(plain_wheel[0]) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "sam2fast = sam2fast.cli:main" in archive.read(entry).decode()


@needs_compiler
def test_compiled_library_is_built_and_found(compiled_wheel, tmp_path):
    wheel, _ = compiled_wheel
    assert "sam2fast_kernels/_native.so" in contents(wheel)
    install(wheel, tmp_path / "site")
    program = (
        "from sam2fast_kernels import rle, library; assert library.load_native(); "
        "print(library.NATIVE_LIBRARY, rle.decode([[1, 3]], (2, 2), backend='cpp').sum().item())"
    )
    done = run_installed(tmp_path / "site", program)
    assert done.stdout.split() == [str(tmp_path / "site" / "sam2fast_kernels" / "_native.so"), "3"], done.stderr


@needs_compiler
def test_failing_compilation_does_not_fail_the_installation(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal: no licence for this compiler'\nexit 1\n")
    broken.chmod(0o755)
    wheel, printed = build_wheel(tmp_path / "build", CXX=str(broken))
    assert "sam2fast_kernels/_native.so" not in contents(wheel)
    assert re.search("compiled operators skipped: `cmake -S` failed", printed)


def test_pins_lie_within_the_declared_ranges():
    pinned = {}
    for name in ("torch-cpu.txt", "runtime.txt", "test.txt"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                (pin,) = requirement.specifier
                assert pin.operator == "==", f"{name}: {text} is not pinned"
                pinned[requirement.name.lower()] = pin.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert pinned[requirement.name.lower()] in requirement.specifier, text
        assert not any(part.operator == "==" for part in requirement.specifier), f"{text}: pins belong in requirements/"


def test_extra_for_tests_brings_what_make_env_installs():
    lines = (ROOT / "requirements" / "test.txt").read_text().splitlines()
    pinned = {Requirement(text).name for line in lines if (text := line.partition("#")[0].strip())}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {Requirement(text).name for text in extras["test"]} == pinned
    assert set(extras["dali"]) <= set(extras["test"])


def test_cpu_and_cuda_builds_are_the_same_version_of_torch():
    files = [ROOT / "requirements" / name for name in ("torch-cpu.txt", "torch-cuda.txt", "constraints.txt")]
    pins = [re.findall(r"^torch={2,3}([\d.]+)$", file.read_text(), re.MULTILINE) for file in files]
    assert len(pins[0]) == 1 and pins[0] == pins[1] == pins[2]


def link_torch_only(target: Path) -> None:
    """Fill `target` with links to torch and what torch itself requires, and to no other package."""
    wanted, done = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files if not Path(file).parts[0].startswith("..")}:
            if not (target / top).exists():
                (target / top).symlink_to(distribution.locate_file(top))
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # CUDA parts of a CPU torch
                    importlib.metadata.distribution(requirement.name)
                    wanted.append(requirement.name)


@pytest.mark.parametrize("wheel", ["plain_wheel", pytest.param("compiled_wheel", marks=needs_compiler)])
def test_snippet_of_the_docs_needs_torch_and_the_wheel_only(wheel, tmp_path, request):
    """The code of docs/kernels.md as it stands there, in an interpreter that has no other package."""
    (snippet,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    link_torch_only(tmp_path)
    install(request.getfixturevalue(wheel)[0], tmp_path)
    absent = "[name for name in ('timm', 'deepspeed', 'pydantic') if importlib.util.find_spec(name) is None]"
    program = f"import importlib.util, sys\nsys.path.insert(0, {str(tmp_path)!r})\n{snippet}\nprint({absent})"
    # -I -S: no site-packages, no environment variables.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss, packages = done.stdout.splitlines()
    assert loss.startswith("loss ") and float(loss.split()[1]) < 3
    assert ("runs as plain PyTorch" in done.stderr) == (wheel == "plain_wheel")
    assert packages == "['timm', 'deepspeed', 'pydantic']"
