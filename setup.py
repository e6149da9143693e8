"""Glue only: runs CMake once and hands its outputs to setuptools. CMakeLists.txt describes the build.

Options come from the environment: PYOPS_CUDA (ON, OFF, default: ON when nvcc is found), PYOPS_CUDA_ARCHS,
PYOPS_EMULATION (ON, OFF, default OFF: the CUDA kernels for the CPU emulator, for tests), PYOPS_SANITIZE, PYOPS_WERROR,
PYOPS_BUILD_DIR.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ADVICE = (
    "pyops builds against the torch that is installed. Install the build tools first and turn build isolation "
    "off:\n    pip install 'torch>=2.11' pybind11 ninja cmake 'setuptools>=77' && "
    "pip install --no-build-isolation .\n(or run `make setup`)"
)


def find_tools() -> tuple[Path, str]:
    """The torch package folder and the cmake program, or one readable instruction."""
    torch = importlib.util.find_spec("torch")
    pybind11 = importlib.util.find_spec("pybind11")
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    missing = [name for name, found in (("torch", torch), ("pybind11", pybind11), ("cmake", cmake)) if not found]
    if missing:
        raise SystemExit(f"pyops: cannot build, missing {', '.join(missing)}. {ADVICE}")
    return Path(torch.origin).parent, cmake


def wants(option: str, default: bool) -> bool:
    choice = os.environ.get(option, "").upper()
    if choice in ("ON", "1", "OFF", "0"):
        return choice in ("ON", "1")
    if choice:
        raise SystemExit(f"pyops: {option} must be ON or OFF, got {choice!r}")
    return default


def wants_cuda() -> bool:
    return wants("PYOPS_CUDA", shutil.which("nvcc") is not None)


def wants_emulation() -> bool:
    return wants("PYOPS_EMULATION", False)


class CMakeBuild(build_ext):
    """One CMake run makes every native output."""

    def get_ext_filename(self, fullname):
        # The op libraries depend on no Python version: plain names.
        name = fullname.split(".")[-1]
        if name == "_native":
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self):
        torch, cmake = find_tools()
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = Path(os.environ.get("PYOPS_BUILD_DIR", ROOT / "build" / tag)).resolve()
        output = build / "lib"
        import pybind11

        definitions = {
            "PYOPS_TORCH_DIR": torch,
            "PYOPS_OUTPUT_DIR": output,
            "PYOPS_NATIVE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PYOPS_CUDA": "ON" if wants_cuda() else "OFF",
            "PYOPS_EMULATION": "ON" if wants_emulation() else "OFF",
            "PYOPS_SANITIZE": os.environ.get("PYOPS_SANITIZE", ""),
            "PYOPS_WERROR": os.environ.get("PYOPS_WERROR", "OFF"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if os.environ.get("PYOPS_CUDA_ARCHS"):
            definitions["PYOPS_CUDA_ARCHS"] = os.environ["PYOPS_CUDA_ARCHS"]
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in definitions.items()]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path}
        subprocess.run([str(part) for part in configure], check=True, env=environment)
        jobs = os.environ.get("PYOPS_BUILD_JOBS", str(os.cpu_count() or 2))
        subprocess.run([cmake, "--build", build, "-j", jobs], check=True, env=environment)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(output / target.name, target)


def extensions() -> list[Extension]:
    names = ["pyops._ops", "pyops._native"] + (["pyops._cuda"] if wants_cuda() else [])
    names += ["pyops._emulated", "pyops._emulated_check"] if wants_emulation() else []
    return [Extension(name, sources=[]) for name in names]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
