"""Package map and native build; the metadata are in pyproject.toml.

The folder kernels/ installs as `sam2fast_kernels`, because `kernels` is the name of another package. The compiled back
end (CMakeLists.txt) is optional: without cmake, a compiler and an importable torch the package installs without it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder() -> str | None:
    spec = importlib.util.find_spec("torch")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def missing_tool() -> str | None:
    """What the native build lacks here, or None."""
    if not shutil.which("cmake"):
        return "cmake is not installed"
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        return "there is no C++ compiler"
    if not torch_folder():
        return "torch is not importable during the build (pass --no-build-isolation)"
    return None


def notice(reason: str) -> None:
    print(f"sam2fast: compiled operators skipped: {reason}; plain PyTorch is used instead, slower", file=sys.stderr)


class CMakeBuild(build_ext):
    """Builds the extension `sam2fast_kernels._native` with CMake; a failure costs speed, not the installation."""

    def build_extension(self, ext: Extension) -> None:
        scratch = Path(self.build_temp).resolve() / "native"
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(scratch),
            f"-DTORCH_ROOT={torch_folder()}",
            f"-DOUTPUT_FOLDER={output}",
        ]
        for command in (configure, ["cmake", "--build", str(scratch), "--parallel", "--clean-first"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print("\n".join(done.stdout.splitlines()[-15:]), file=sys.stderr)
                notice(f"`{' '.join(command[:2])}` failed, see above")
                return

    def get_ext_filename(self, fullname: str) -> str:
        # torch.ops.load_library loads it, Python never imports it: no tag of a Python version in its name.
        return os.path.join(*fullname.split(".")) + ".so"


def native_extension() -> list[Extension]:
    reason = missing_tool()
    if reason:
        notice(reason)
        return []
    return [Extension("sam2fast_kernels._native", sources=[], optional=True)]


kernel_packages = ["sam2fast_kernels"] + [f"sam2fast_kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=find_packages(include=["sam2fast", "sam2fast.*"]) + kernel_packages,
    package_dir={"sam2fast_kernels": "kernels"},
    ext_modules=native_extension(),
    cmdclass={"build_ext": CMakeBuild},
)
