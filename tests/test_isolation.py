"""The package uses no network, starts no program, writes only to its cache; its modules import downward."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import nflows_kconv

ROOT = Path(__file__).parent.parent

# An audit hook sees Python's operations; files that exist afterwards show those of libraries.
CHILD = """
import os, sys

SPAWNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile"}
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
seen = []


def files():
    return {os.path.join(directory, name) for directory, _, names in os.walk(os.environ["HOME"]) for name in names}


def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")) or event in SPAWNS:
        seen.append((event, str(arguments)))
    elif event in CHANGES or event == "open" and (arguments[2] or 0) & WRITING:
        path = str(arguments[0])  # or the number of a file that was seen when it was opened
        if not path.isdigit() and not path.startswith((os.environ["NFLOWS_KCONV_CACHE"], "/dev/")):
            seen.append((event, path))


sys.addaudithook(watch)

import importlib, importlib.util, pkgutil

# What the libraries do by themselves is theirs: matplotlib, which nflows imports, makes a list of fonts.
libraries = ("FrEIA", "hypothesis", "nflows.transforms", "normflows", "onnxscript")
libraries += ("pyro.distributions", "torchflows", "zuko")
for library in ("torch", "matplotlib.pyplot", *libraries):
    if importlib.util.find_spec(library.partition(".")[0]):
        importlib.import_module(library)
before_the_package, files_before, modules_before = len(seen), files(), set(sys.modules)
import nflows_kconv, torch
assert not [name for name in set(sys.modules) - modules_before if name.partition(".")[0] == "cuda"]

for module in pkgutil.walk_packages(nflows_kconv.__path__, "nflows_kconv."):
    if not module.name.endswith(("__main__", "_native")):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError:
            continue  # of an extra that is not installed
        except ImportError as error:
            assert "nflows-kconv[" in str(error), error

layer = nflows_kconv.InvertibleConv2d(8, diagonal="learned", bias=True)
images = torch.randn(2, 8, 6, 5)
output, log_det = layer(images)
restored, _ = layer.inverse(output)
(restored.sum() + log_det.sum()).backward()
print(*nflows_kconv.available_backends().values())

import nflows_kconv.normflows
flow = nflows_kconv.normflows.finc_flow((1, 8, 8), levels=1, steps=1, hidden_channels=4)
flow.log_prob(torch.zeros(2, 1, 8, 8)).sum().backward()
flow.sample(2)

from nflows_kconv.backends.cuda import cache
cache.store("0" * 64, b"code")
assert cache.load("0" * 64) == b"code"

assert not seen[before_the_package:], seen[before_the_package:]
assert files() == files_before | {os.path.join(cache.directory(), "0" * 64)}
"""


def test_no_network_no_program_no_file(tmp_path: Path):
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "NFLOWS_KCONV_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    # -B: Python's bytecode files do not count.
    command = [sys.executable, "-B", "-c", CHILD]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_is_what_its_name_gives():
    """`import nflows_kconv.X as x` reads the attribute X of the package, which a function of that name would hide."""
    for _, name, _ in pkgutil.walk_packages(nflows_kconv.__path__, "nflows_kconv."):
        if name != "nflows_kconv._native":  # loaded by torch
            package, _, attribute = name.rpartition(".")
            assert importlib.import_module(name) is getattr(sys.modules[package], attribute), name


def test_modules_import_from_their_own_line_of_the_tree_or_below():
    """Checks the tree in CONTRIBUTING.md, which lists every module."""
    tree = re.search(r"^nflows_kconv/\n((?:  .+\n)+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[1]
    lines = [line.split("   ")[0].split() for line in re.findall(r"^  (\w.*)", tree, re.MULTILINE)]
    levels = {name.rstrip("/"): level for level, names in enumerate(lines) for name in names}
    imported: dict[str, set[str]] = {}
    for path in (ROOT / "nflows_kconv").rglob("*.py"):
        module = path.relative_to(ROOT / "nflows_kconv").parts[0].removesuffix(".py")
        if not module.startswith("__"):  # not the package itself or its command
            imported.setdefault(module, set()).update(_imported(path))
    assert imported.keys() == levels.keys()
    wrong = {(module, name) for module, names in imported.items() for name in names if levels[name] < levels[module]}
    assert not wrong


def _imported(path: Path) -> set[str]:
    """Returns the modules of the package that a file imports; modules of a subpackage count as the subpackage."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("nflows_kconv.")}
