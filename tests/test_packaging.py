"""The build backend: its requirements, compiler flags, and behaviour if it cannot build."""

import importlib.metadata
import json
import re
import site
import stat
import sys
import sysconfig
from pathlib import Path

import pytest

import build_backend
from build_backend import environment, native_library
from build_backend.environment import Torch, build_requirements, find_compiler, find_torch, search_path, why_not

ROOT = Path(build_backend.__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def install_torch(directory, version):
    """Installs the parts of torch that the build finds without importing it."""
    (directory / "torch" / "include").mkdir(parents=True)
    metadata = directory / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return directory


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Returns a fake compiler that reports a version and writes the requested file."""
    script = 'if [ "$1" = --version ]; then echo "cc 1.0"; echo more; else echo "$@" >> "$0.log"; fi'
    path = executable(tmp_path / "bin" / "mycc", script)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.fixture
def buildable(monkeypatch, compiler, tmp_path):
    """Fakes a machine that can build, with only the torch that a test installs in the directory."""
    monkeypatch.delenv("NFLOWS_KCONV_BUILD", raising=False)
    monkeypatch.setattr(environment.sysconfig, "get_config_var", lambda name: None)
    directory = tmp_path / "site"
    directory.mkdir()
    for module in (environment, native_library):
        monkeypatch.setattr(module, "search_path", lambda: [str(directory)])
    return directory


class TestFindTorch:
    def test_none(self, tmp_path):
        assert find_torch([str(tmp_path)]) is None

    def test_first_on_the_path(self, tmp_path):
        for version in ("2.13.0+cpu", "2.11.1"):
            install_torch(tmp_path / version, version)
        path = [str(tmp_path / "missing"), str(tmp_path / "2.13.0+cpu"), str(tmp_path / "2.11.1")]
        assert find_torch(path) == Torch("2.13.0+cpu", tmp_path / "2.13.0+cpu" / "torch")

    def test_is_not_misled_by_torchs_relatives(self, tmp_path):
        metadata = tmp_path / "torchvision-0.30.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.30.0\n")
        assert find_torch([str(tmp_path)]) is None

    def test_finds_the_installed_one(self):
        import torch

        # Not torch.__version__, which in builds for CUDA has another suffix.
        assert find_torch(search_path()) == Torch(importlib.metadata.version("torch"), Path(torch.__file__).parent)

    @pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.0+cpu", "3.0"])
    def test_recent_enough(self, version):
        assert Torch(version, Path()).recent_enough

    @pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13", "2.1.0"])
    def test_too_old(self, version):
        assert not Torch(version, Path()).recent_enough


class TestSearchPath:
    def test_build_isolation_does_not_hide_the_target(self, monkeypatch):
        target = sysconfig.get_path("purelib")
        monkeypatch.setattr(sys, "path", ["overlay"])
        assert search_path()[0] == "overlay"
        assert target in search_path()

    @pytest.mark.parametrize("system_packages", [False, True])
    def test_virtual_environment(self, monkeypatch, system_packages):
        """Covers `site` in virtual environments with and without the system's packages."""
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "base_prefix", "/system")
        monkeypatch.setattr(site, "PREFIXES", ["/venv", "/system"] if system_packages else ["/venv"])
        monkeypatch.setattr(site, "getusersitepackages", lambda: "/home/user/site-packages")
        path = search_path()
        assert any(directory.startswith("/venv/") for directory in path)
        assert any(directory.startswith("/system/") for directory in path) == system_packages
        assert ("/home/user/site-packages" in path) == system_packages


class TestRequirements:
    def test_of_a_target_with_torch(self, buildable):
        install_torch(buildable, "2.13.0")
        assert build_requirements() == []

    @pytest.mark.parametrize("version", [None, "2.9.1"])
    def test_of_a_target_without_a_usable_torch(self, buildable, version):
        if version is not None:
            install_torch(buildable, version)
        assert build_requirements() == ["torch>=2.10"]

    def test_the_hooks_give_them(self, buildable):
        assert build_backend.get_requires_for_build_wheel() == ["torch>=2.10"]
        assert build_backend.get_requires_for_build_editable({"option": "x"}) == ["torch>=2.10"]
        assert build_backend.get_requires_for_build_sdist() == []

    def test_without_a_compiler(self, buildable, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert build_requirements() == []
        assert why_not() == "no C++ compiler was found, looked for no-such-compiler"

    def test_opted_out(self, buildable, monkeypatch):
        monkeypatch.setenv("NFLOWS_KCONV_BUILD", "0")
        assert build_requirements() == []
        assert why_not() == "NFLOWS_KCONV_BUILD=0 was set"

    def test_free_threaded(self, buildable, monkeypatch):
        monkeypatch.setattr(environment.sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"))
        assert build_requirements() == []
        assert "free-threaded" in why_not()

    def test_floor_is_that_of_the_package(self):
        floor = ".".join(map(str, environment.MINIMUM_TORCH))
        assert f'dependencies = ["torch>={floor}"]' in PROJECT


def test_oldest_versions_are_the_lowest_admitted():
    oldest = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT):
        assert f"{oldest.get(name, floor)}.".startswith(f"{floor}."), name
    assert {*re.findall(r"install_torch python ([\d.]+)", PROJECT)} == {oldest["torch"]}


class TestFindCompiler:
    def test_cxx_may_have_arguments(self, monkeypatch, compiler):
        monkeypatch.setenv("CXX", f"{compiler} -m64")
        assert find_compiler() == [str(compiler), "-m64"]

    def test_by_name(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_compiler() == []
        executable(tmp_path / "clang++", "")
        assert find_compiler() == ["clang++"]
        executable(tmp_path / "g++", "")
        assert find_compiler() == ["g++"]


class TestFlags:
    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("solve.cpp", set()),
            ("solve_avx2.cpp", {"-mavx2", "-mfma"}),
            ("solve_avx512.cpp", {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"}),
            ("avx2_or_not.cpp", set()),
        ],
    )
    def test_instruction_set_in_the_name(self, name, flags):
        assert set(native_library.source_flags(Path(name), "x86_64")) == flags
        assert native_library.source_flags(Path(name), "aarch64") == ()

    def test_what_is_shipped_is_for_every_machine_and_exact(self):
        assert not {"-march=native", "-ffast-math"} & set(native_library.FLAGS)
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in native_library.FLAGS


class TestBuild:
    @pytest.fixture
    def library(self, tmp_path):
        return tmp_path / "lib" / "nflows_kconv" / "_native.abi3.so"

    def record(self, library):
        return json.loads((library.parent / "_native_build.json").read_text())

    def test_built(self, buildable, compiler, library):
        install_torch(buildable, "2.13.0")
        assert native_library.build(library).built
        assert self.record(library) == {"built": True, "reason": "", "compiler": "cc 1.0", "torch": "2.13.0"}
        *compilations, link = Path(f"{compiler}.log").read_text().splitlines()
        assert all(f"-isystem {buildable / 'torch' / 'include'}" in line for line in compilations)
        assert sum("csrc/cpu_caller.cpp" in line for line in compilations) == 1
        assert f"-L{buildable / 'torch' / 'lib'} " in link
        assert link.endswith(" -ltorch_cpu")
        assert "rpath" not in link

    @pytest.mark.parametrize("version", [None, "2.9.1"])
    def test_without_a_usable_torch(self, buildable, library, version):
        if version is not None:
            install_torch(buildable, version)
        assert not native_library.build(library).built
        found = version or "none"
        assert self.record(library)["reason"] == f"torch >= 2.10 must be there at build time, found {found}"

    def test_failing_compiler(self, buildable, compiler, library, capsys):
        install_torch(buildable, "2.13.0")
        executable(compiler, "echo 'In file included from a.h' >&2; echo 'a.h:1: error: no' >&2; exit 1")
        assert not native_library.build(library).built
        assert self.record(library)["reason"] == "the compiler failed: a.h:1: error: no"
        shown = capsys.readouterr().err
        assert "In file included from a.h" in shown
        assert "the native library was not built: the compiler failed: a.h:1: error: no." in shown

    def test_compiler_failing_in_silence(self, buildable, compiler, library):
        install_torch(buildable, "2.13.0")
        executable(compiler, "exit 3")
        native_library.build(library)
        assert self.record(library)["reason"] == f"the compiler failed: {compiler} ended with status 3"

    def test_nothing_stale_is_left(self, buildable, library, monkeypatch):
        library.parent.mkdir(parents=True)
        library.write_text("an earlier build")
        monkeypatch.setenv("NFLOWS_KCONV_BUILD", "0")
        native_library.build(library)
        assert not library.exists()
        assert self.record(library)["reason"] == "NFLOWS_KCONV_BUILD=0 was set"


def test_constraints_pin_exact_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)
