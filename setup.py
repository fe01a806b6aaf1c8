# SPDX-License-Identifier: BSD-3-Clause
"""Builds the C core. Everything else is in pyproject.toml.

TMEMD_SANITIZE=address,undefined (or thread) makes an instrumented build below build/SANITIZERS/lib instead, to be used
with PYTHONPATH; TMEMD_WERROR=1 turns warnings in our own C into errors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CORE = Path("tmemd/core")
VHOST = Path("tmemd/vhost")
BINDING = Path("tmemd/binding/_core.pyx")
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("TMEMD_WERROR") == "1" else [])]
SANITIZE = os.environ.get("TMEMD_SANITIZE", "")
BUILD = Path("build") / (SANITIZE.replace(",", "-") or "plain")


class BuildExt(build_ext):  # type: ignore[misc]  # setuptools ships no types
    """Compile our own C with warnings; what Cython generates is not ours to judge."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def with_warnings(obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], *rest: Any) -> None:
            own = Path(src).name != BINDING.with_suffix(".c").name
            compile_one(obj, src, ext, cc_args, [*postargs, *WARNINGS] if own else [*postargs, "-w"], *rest)

        self.compiler._compile = with_warnings
        super().build_extensions()


def extension() -> Extension:
    """The binding and all of the core in one shared object."""
    os.chdir(ROOT)
    own = sorted(str(path) for folder in (CORE, VHOST, BINDING.parent) for path in folder.glob("*.c"))
    instrument = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
    return Extension(
        "tmemd.binding._core",
        sources=[str(BINDING), *own],
        depends=[str(path) for folder in (CORE, VHOST, BINDING.parent) for path in folder.glob("*.h")],
        include_dirs=[str(CORE), str(VHOST), str(BINDING.parent)],
        libraries=["lz4", "isal", "nbd"],
        extra_compile_args=["-std=c11", "-O2", "-pthread", *instrument],
        extra_link_args=["-pthread", *instrument],
    )


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize([extension()], build_dir=str(BUILD / "cython"), language_level="3"),
    options={"build": {"build_base": str(BUILD), **({"build_lib": str(BUILD / "lib")} if SANITIZE else {})}},
)
