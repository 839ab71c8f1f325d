"""Adds the native library and the kernels' sources to pyproject.toml's package."""

import os
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from build_backend import native_library

NATIVE = "nflows_kconv._native"


class Build(build):
    """Builds in a separate directory, so nothing of an earlier build gets into a wheel."""

    def initialize_options(self) -> None:
        """Sets the defaults of the command's options."""
        super().initialize_options()
        self._scratch = TemporaryDirectory()
        self.build_base = self._scratch.name


class BuildNative(build_ext):
    """Compiles the native library, or omits it: an install never fails without it."""

    def run(self) -> None:
        """Runs the command."""
        if not native_library.build(Path(self.get_ext_fullpath(NATIVE))).built:
            self.extensions = self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """Makes a reproducible wheel for this platform, or for any platform without the native library."""

    def run(self) -> None:
        """Runs the command."""
        os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, the first year of zip files
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


# setuptools refuses the limited API on free-threaded Python even if there is nothing to compile.
limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    packages=[*find_packages(include=["nflows_kconv", "nflows_kconv.*"]), "nflows_kconv.csrc"],
    # CUDA kernels are compiled when first needed, from the sources in the package.
    package_dir={"nflows_kconv.csrc": "csrc"},
    # native_library lists and compiles the sources.
    ext_modules=[Extension(NATIVE, sources=[], py_limited_api=limited_api)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited_api else {},
    cmdclass={"build": Build, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
