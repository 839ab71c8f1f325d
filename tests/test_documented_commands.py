"""The commands of the documentation, each block as it stands, in a checkout where the scripts get tiny sizes."""

import json
import os
import shutil
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
from documents import PAGES, ROOT, commands, installs, page_id

BLOCKS = {page_id(page): [block for block in commands(page) if not installs(block)] for page in PAGES}

# What is put behind a script's arguments, where it outdoes those of the page.
FLOW = "--levels 1 --flow-steps 1 --hidden-channels 4 --minutes 1e-9 --validate-every 1 --warm-up 2 --batch-size 4"
TINY = {
    # tests/test_benchmarks.py runs them.
    **{f"benchmarks.{name}": "--help" for name in ("evidence", "layer", "one_by_one", "plots", "published")},
    **{f"benchmarks.{name}": "--help" for name in ("reversible", "sampling")},
    "examples/graph_sampling.py": "--calls 1",
    "examples/inverse_direction.py": "--steps 2",
    "examples/sample_checkpoint.py": "--count 4",
    "examples/train_digits.py": "--steps 2",
    "examples/train_image_flow.py": f"{FLOW} --accelerator cpu --devices 1",  # tests/test_train_image_flow.py has two
    "fuzz": "--minutes 0",  # tests/test_hostile_input.py runs it
    "pytest": "--version",
}
PYTHON = """#!{python}
import json, os, sys
tiny = json.loads({tiny!r})
arguments = sys.argv[1:]
script = arguments[arguments[0] == "-m"]
os.execv({python!r}, [{python!r}, *arguments, *tiny.get(script, [])])
"""


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns Python that lets torchvision fetch CIFAR-10, of a few images, from here."""
    folder = tmp_path / "published"
    image_files.write_cifar10(folder, monkeypatch)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        values = {name: getattr(image_files.datasets.CIFAR10, name) for name in ("train_list", "test_list", "meta")}
        values |= {"url": address, "tgz_md5": None}
        yield "".join(f"datasets.CIFAR10.{name} = {value!r}\n" for name, value in values.items())
        server.shutdown()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar10: str) -> Path:
    """Returns a checkout after `make test`, with images in PATH, as a page supposes."""
    checkout = tmp_path / "checkout"
    without = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("benchmarks", "build_backend", "csrc", "examples", "nflows_kconv", "tests"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=without)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, checkout)
    image_files.write_directory(checkout / "PATH", monkeypatch)
    with open(checkout / "examples" / "image_data.py", "a") as script:
        script.write(cifar10)

    tiny = {script: arguments.split() for script, arguments in TINY.items()}
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, tiny=json.dumps(tiny)))
    python.chmod(0o755)
    (checkout / ".venv" / "installed").touch()
    return checkout


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_commands_run(page: str, checkout: Path):
    environment = os.environ | {"PATH": os.pathsep.join([str(checkout / ".venv" / "bin"), os.environ["PATH"]])}
    for block in BLOCKS[page]:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
