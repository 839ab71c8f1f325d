"""The commands of the documentation: bash runs each block unchanged, this process the scripts, at tiny sizes."""

import json
import os
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import image_files
import pytest
import torch
from documents import PAGES, ROOT, commands, installs, page_id

BLOCKS = {page_id(page): [block for block in commands(page) if not installs(block)] for page in PAGES}

# Arguments appended to those of the page, which they override.
FLOW = "--levels 1 --flow-steps 1 --hidden-channels 4 --minutes 1e-9 --validate-every 1 --warm-up 2 --batch-size 4"
TINY = {
    "examples/graph_sampling.py": "--calls 1",
    "examples/inverse_direction.py": "--steps 2",
    "examples/sample_checkpoint.py": "--count 4",
    "examples/train_digits.py": "--steps 2",
    "examples/train_image_flow.py": f"{FLOW} --accelerator cpu --devices 1",  # tests/test_train_image_flow.py has two
}
# Modules that other tests run: test_benchmarks.py, test_hostile_input.py, and all of them.
ELSEWHERE = ("benchmarks.", "fuzz", "pytest")
# What starts in the place of Python, which would import for seconds.
PYTHON = """#!{python}
import json, os, sys
with open({calls!r}, "a") as calls:
    print(json.dumps([os.environ.get("PYTHONPATH", ""), *sys.argv[1:]]), file=calls)
"""
# Without the folder that pytest adds, and the modules in it: a script finds them as in a process of its own.
FOLDERS = [folder for folder in sys.path if Path(folder) != ROOT / "examples"]
MODULES = [path.stem for path in (ROOT / "examples").glob("*.py")]


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes torchvision fetch a CIFAR-10 of a few images from here."""
    folder = tmp_path / "published"
    image_files.write_cifar10(folder, monkeypatch)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(image_files.datasets.CIFAR10, "url", address)
        monkeypatch.setattr(image_files.datasets.CIFAR10, "tgz_md5", None)
        yield
        server.shutdown()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar10: None) -> Path:
    """Returns a checkout after `make test`, with images in PATH, as a page supposes; its Python notes its calls."""
    checkout = tmp_path / "checkout"
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "csrc", "examples", "pyproject.toml", "setup.py"):
        (checkout / name).symlink_to(ROOT / name)
    image_files.write_directory(checkout / "PATH", monkeypatch)
    python.write_text(PYTHON.format(python=sys.executable, calls=str(checkout / "calls")))
    python.chmod(0o755)
    (checkout / ".venv" / "installed").touch()
    return checkout


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_commands_run(page: str, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(checkout)
    environment = os.environ | {"PATH": os.pathsep.join([str(checkout / ".venv" / "bin"), os.environ["PATH"]])}
    environment.pop("PYTHONPATH", None)
    for block in BLOCKS[page]:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for call in (checkout / "calls").read_text().splitlines():
        python_path, script, *arguments = json.loads(call)
        if script == "-m" and arguments[0].startswith(ELSEWHERE):
            continue
        monkeypatch.setattr(sys, "argv", [script, *arguments, *TINY.get(script, "").split()])
        own = [str(Path(script).parent), *filter(None, python_path.split(os.pathsep))]
        monkeypatch.setattr(sys, "path", own + FOLDERS)
        for name in MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        with torch.random.fork_rng():
            if script == "-c":
                exec(arguments[0], {})
            else:
                runpy.run_path(script, run_name="__main__")
