"""The documentation: its Python runs unchanged, and everything that commands and texts name exists."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from documents import PAGES, ROOT, blocks, commands, page_id
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import nflows_kconv

pytestmark = [
    pytest.mark.usefixtures("torchlib_once"),
    # Warnings of the libraries.
    pytest.mark.filterwarnings("ignore:torch.(triangular_solve|lu) is deprecated"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
]

PYTHON = Sybil([PythonCodeBlockParser()])
FOLDERS = ("\\.ci", "benchmarks", "build_backend", "csrc", "docs", "examples", "nflows_kconv", "tests")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w\b(?!\*)")  # a star matches several names


def docstrings() -> list[doctest.DocTest]:
    """Returns the examples of every module, which must define everything they use, so users can copy them."""
    names = [module.name for module in pkgutil.walk_packages(nflows_kconv.__path__, "nflows_kconv.")]
    modules = [importlib.import_module(name) for name in ("nflows_kconv", *names) if "._" not in name]
    found = [each for module in modules for each in doctest.DocTestFinder().find(module, globs={}) if each.examples]
    return list({each.name: each for each in found}.values())


@pytest.mark.parametrize("test", docstrings(), ids=lambda test: test.name)
def test_examples_of_docstrings_run(test: doctest.DocTest):
    output: list[str] = []
    with torch.random.fork_rng():
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert not output, "".join(output)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_of_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_precision: None):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        for example in PYTHON.parse(page).examples():
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_say_what_they_are(page: Path):
    """Python runs here, shell in test_documented_commands.py."""
    found = blocks(page)
    assert {language for language, _ in found} <= {"python", "sh", "text"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_name_what_exists(page: Path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(commands(page)))) <= set(targets)
    for module, arguments in re.findall(r"\bpython (?:-m )?(\S+\.py|benchmarks\.\w+)([^#`\n]*)", page.read_text()):
        options = re.findall(r"--[\w-]+", arguments)
        script = module if module.endswith(".py") else f"{module.replace('.', '/')}.py"
        text = (ROOT / script).read_text()
        if "command_line.parse" in text:
            text += (ROOT / "benchmarks" / "command_line.py").read_text()
        assert not [option for option in options if f'"{option}"' not in text], script


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_extras_exist(page: Path):
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"(?:nflows-kconv|['\" ]\.)\[([\w,-]+)\]", page.read_text())
    assert not [name for names in named for name in names.split(",") if f"\n{name} = [" not in project]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_exist(page: Path):
    assert not [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
