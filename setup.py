"""Builds the C++ operators against the torch that is installed; everything else stands in pyproject.toml.

The CUDA kernels are built where nvcc and a torch with CUDA are found: FORCE_CUDA=1 builds them with any torch,
FORCE_CPU=1 leaves them out. Without a C++ compiler, or with FORCE_PYTHON=1, no kernels are built at all. Whatever is
compiled has to compile. TORCH_CUDA_ARCH_LIST names the GPUs to compile for, else those of this machine, or without one
"8.0;9.0;10.0+PTX".
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        raise ImportError(f"torch: got {torch.__version__}, expected 2.12 or later")
except ImportError as error:
    sys.exit(
        f"ncmi_kernels is compiled against the torch of your environment, and that cannot be used ({error}).\n"
        "Install torch >= 2.12 first, then run in a checkout: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
MINIMUM_TORCH = 0x020C000000000000  # 2.12, the oldest torch that the binary runs with


# Neither changes a result: errno and floating-point traps are never read here.
COMPILER_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
ARCHITECTURES = ("8.0", "9.0", "10.0")


def sources(*patterns: str) -> list[str]:
    """The files of csrc that match, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def enabled(name: str) -> bool:
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(name, "0") not in ("", "0")


FORCE_CUDA, FORCE_CPU, FORCE_PYTHON = map(enabled, ("FORCE_CUDA", "FORCE_CPU", "FORCE_PYTHON"))
if FORCE_CUDA and (FORCE_CPU or FORCE_PYTHON):
    sys.exit("ncmi_kernels: FORCE_CUDA and FORCE_CPU or FORCE_PYTHON exclude each other")


def cuda_home() -> str | None:
    """Where nvcc is installed. cpp_extension knows only with a torch that has CUDA."""
    home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    candidates = [home, Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    needed = "bin/nvcc", "include/cuda_runtime.h"  # an nvcc on PATH may be a script that only calls the real one
    return next((str(c) for c in candidates if c and all((Path(c) / name).exists() for name in needed)), None)


def default_architectures(home: str) -> str:
    """ARCHITECTURES as far as this nvcc knows them, the last one also as PTX for newer GPUs."""
    listed = subprocess.check_output([str(Path(home) / "bin" / "nvcc"), "--list-gpu-arch"], text=True).split()
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    return ";".join(known) + "+PTX"


def cpu_extension() -> Extension:
    """The operators' declarations and their CPU kernels."""
    return CppExtension(
        name="ncmi_kernels._C",
        sources=sources("cpu/*.cpp"),
        depends=sources("*.h", "cpu/*.h"),
        define_macros=[("TORCH_TARGET_VERSION", hex(MINIMUM_TORCH))],
        # Loops marked `omp simd` vectorise; no OpenMP run time is linked.
        extra_compile_args=[*COMPILER_FLAGS, "-fopenmp-simd", "-ffp-contract=fast"],
        py_limited_api=True,
    )


def cuda_extension() -> Extension | None:
    """The CUDA kernels, a library of their own: where it does not load, the other one is left alone."""
    if FORCE_CPU or not (FORCE_CUDA or torch.version.cuda):
        return None
    home = cuda_home()
    if home is None:
        if FORCE_CUDA:
            sys.exit("ncmi_kernels: FORCE_CUDA=1, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
        print("ncmi_kernels: no nvcc found, building without the CUDA kernels", file=sys.stderr)
        return None
    cpp_extension.CUDA_HOME = home
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(home)
    # Not CUDAExtension: it links against a torch with CUDA, and one without is enough to compile. The symbols of torch
    # are found when the library is loaded, in the libraries that torch has loaded by then.
    return Extension(
        name="ncmi_kernels._cuda",
        sources=sources("cuda/*.cu"),
        depends=sources("*.h", "cuda/*.h", "cuda/*.cuh"),
        define_macros=[("TORCH_TARGET_VERSION", hex(MINIMUM_TORCH)), ("USE_CUDA", None)],
        include_dirs=[*cpp_extension.include_paths(), str(Path(home) / "include")],
        library_dirs=[*cpp_extension.library_paths(), str(Path(home) / "lib64")],
        libraries=["c10", "torch", "torch_cpu", "cudart", *(["torch_cuda"] if torch.version.cuda else [])],
        extra_compile_args={
            "cxx": COMPILER_FLAGS,
            "nvcc": ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"],
        },
        language="c++",
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """Everything that can be compiled here. Without any the wheel is pure Python, and named so."""
    if FORCE_PYTHON:
        return []
    if not (FORCE_CUDA or "CXX" in os.environ or any(map(shutil.which, ("c++", "g++", "clang++")))):
        print("ncmi_kernels: no C++ compiler found, building without the kernels", file=sys.stderr)
        return []
    return [extension for extension in (cpu_extension(), cuda_extension()) if extension is not None]


class BuildKernels(BuildExtension):
    """Says after the compiler's output, and in the place of a traceback, how to install without what fails."""

    def run(self) -> None:
        """Compile all extensions, or exit."""
        try:
            super().run()
        except Exception as error:
            sys.exit(
                f"ncmi_kernels: the kernels could not be compiled: {error}. "
                "FORCE_CPU=1 leaves out the CUDA kernels, FORCE_PYTHON=1 all of them."
            )


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
