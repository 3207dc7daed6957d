"""Builds the C++ operators against the torch that is installed; everything else stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"ncmi_kernels is compiled against the torch of your environment, and torch could not be imported ({error}).\n"
        "Install torch >= 2.11 first, then run: pip install --no-build-isolation ncmi_kernels (or . in a checkout)"
    )

ROOT = Path(__file__).parent
MINIMUM_TORCH = 0x020B000000000000  # 2.11, the oldest torch that the binary runs with


class OptionalBuildExtension(BuildExtension):
    """Installs without the operators where they cannot be compiled; the package then says so when it is used."""

    def run(self) -> None:
        """Compile, or report why not and go on."""
        try:
            super().run()
        except (Exception, SystemExit) as error:
            print(
                f"\nncmi_kernels: the C++ kernels could not be built: {error}\n"
                "ncmi_kernels: installing without them; the (slow) PyTorch reference path will be used.\n",
                file=sys.stderr,
            )
            self.extensions = []


setup(
    ext_modules=[
        CppExtension(
            name="ncmi_kernels._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", hex(MINIMUM_TORCH))],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                # Loops marked `omp simd` vectorise; no OpenMP run time is linked.
                "-fopenmp-simd",
                # Neither changes a result: errno and floating-point traps are never read here.
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
