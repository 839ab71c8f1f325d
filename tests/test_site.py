"""The documentation site: builds without warnings, no dead links, nothing cut off, no other host."""

import html
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import drawings
import pytest
import results

import nflows_kconv

pytest.importorskip("mkdocs", reason="the site needs mkdocs, which needs Python 3.11")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent
# Attributes that a browser loads by itself, unlike the href of a link.
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


class Page(HTMLParser):
    """The resources, links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.tags.add(tag)
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif LOADED.get(tag) in values and values.get("rel") != "canonical":
            self.loaded.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Returns the pages of the built site by path."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def folder_of(site: dict[Path, Page]) -> Path:
    return next(path.parent for path in site if path.name == "index.html" and path.parent.name != "api")


def target(page: Path, address: str) -> tuple[Path, str]:
    """Returns the file and the anchor of an address on a page."""
    parts = urlsplit(address)
    return ((page.parent / unquote(parts.path)).resolve() if parts.path else page), unquote(parts.fragment)


def is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def test_links_lead_somewhere(site: dict[Path, Page]):
    wrong = []
    for path, page in site.items():
        for address in page.links + page.loaded:
            if is_elsewhere(address) or address.startswith("data:"):
                continue
            file, anchor = target(path, address)
            if not file.exists() or (anchor and file in site and anchor not in site[file].ids):
                wrong.append(f"{path.name}: {address}")
    assert not wrong


def test_nothing_comes_from_another_host(site: dict[Path, Page]):
    assert not [address for page in site.values() for address in page.loaded if is_elsewhere(address)]
    for style in folder_of(site).rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text()), style


def test_the_search_needs_no_server(site: dict[Path, Page]):
    folder = folder_of(site)
    assert (folder / "search" / "search_index.js").exists()
    assert all(any("iframe-worker" in address for address in page.loaded) for page in site.values())


def test_equations_are_rendered(site: dict[Path, Page]):
    explained = next(page for path, page in site.items() if path.name == "how_it_works.html")
    assert "math" in explained.tags
    assert "merror" not in {tag for page in site.values() for tag in page.tags}
    text = "".join(path.read_text() for path in site)
    assert 'class="arithmatex"' not in text


WIDTHS = (1280, 390)  # of a small screen and a phone, in pixels
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=100000 --dump-dom"
)
# Shows every page and lists elements wider than their container.
MEASURE = """<!doctype html><body><script>
async function measure(address, width) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-same-origin";
  frame.width = width;
  frame.src = address;
  await new Promise(loaded => { frame.onload = loaded; document.body.append(frame); });
  const page = frame.contentDocument;
  const cut = [...page.querySelectorAll(".md-content, .md-content :is(code, pre, table, .math, h1, h2, h3)")]
    .filter(element => element.clientWidth && element.scrollWidth > element.clientWidth + 1)
    .map(element => `${address}, ${width}: ${element.tagName} ${element.textContent.trim().slice(0, 60)}`);
  const size = page.documentElement.clientWidth;
  frame.remove();
  return {size, cut};
}
(async () => {
  const found = [];
  for (const [address, width] of CASES) found.push(await measure(address, width));
  document.body.textContent = "FOUND" + JSON.stringify(found);
})();
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_nothing_is_cut(site: dict[Path, Page], tmp_path: Path):
    folder = folder_of(site)
    cases = [(str(path.relative_to(folder)), width) for path in site for width in WIDTHS]
    (folder / "measure.html").write_text(MEASURE.replace("CASES", json.dumps(cases)))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}/measure.html"
        command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        server.shutdown()
    found = json.loads(html.unescape(re.search(r"FOUND(.*?)</body>", done.stdout, re.DOTALL)[1]))
    assert [each["size"] for each in found] == [width for _, width in cases]
    assert not [line for each in found for line in each["cut"]]


def public_names() -> Iterator[set[str]]:
    """Returns the dotted names of each class and function in an __all__: the public one, and where it is defined."""
    names = [module.name for module in pkgutil.walk_packages(nflows_kconv.__path__, "nflows_kconv.")]
    public_modules = [name for name in names if not re.search(r"\._|internals", name)]
    for module in map(importlib.import_module, ["nflows_kconv", *public_modules]):
        for name in getattr(module, "__all__", ()):
            public = getattr(module, name)
            if callable(public):
                yield {f"{module.__name__}.{name}", f"{public.__module__}.{public.__qualname__}"}


def test_the_reference_is_complete(site: dict[Path, Page]):
    described = set().union(*(page.ids for path, page in site.items() if path.parent.name == "api"))
    assert not [names for names in public_names() if not names & described]


def test_the_picture_of_the_layer_is_what_is_drawn():
    assert drawings.layer() == (ROOT / "docs" / "images" / "layer.svg").read_text()


def test_results_of_a_gpu_are_shown_with_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    times = dict.fromkeys(["conv2d", "inverse", "forward", *(f"{name}_backward" for name in results.RATIOS)], 20.0)
    times["conv2d_backward"] = 40.0
    floors = {name: {"bytes": 1.0, "operations": 5.0} for name in results.RATIOS}
    row = {"batch": 1, "shape": [12, 8, 8], "corners": ["TL"]}
    row |= {"microseconds": {"eager": times, "graph": times | {"inverse": 10.0}}, "floors": floors, "targets": []}
    machine = {"device": "made up", "cpu": "made up", "threads": 8, "torch": "0", "date": "0000-00-00"}
    measured = {"machine": machine, "one group": [row], "host": [{**row, "microseconds": {"host": {"add": 1.0}}}]}
    measured |= {
        "image side": [row, {**row, "shape": [12, 16, 16]}],
        "sampling": [{"images": 1, "microseconds": times}],
    }
    (tmp_path / "cuda-made-up.json").write_text(json.dumps(measured))

    shown = results.all_results()
    assert "threads" not in shown
    assert "| 1, 12, 8 × 8 | 0.02 ms | 1.00 × | 1.00 × | 0.50 × | 0.50 × |" in shown
    assert "In mode graph:" in shown
    assert "| 1 | 0.02 |" in shown
    bars = results._bars([row], "graph").axes[0]
    assert [bar.get_width() for bar in bars.patches] == [0.5, 1.0]
    assert [line.get_xdata()[0] for line in bars.lines[:2]] == [0.25, 0.25]  # before the line at 1


def test_ratios_to_the_libraries_are_ranges_over_shapes():
    row = {"operation": "inverse", "threads": 2, "batch": 1}
    times = [{"nflows": 8, "normflows": 2, "3x3": 1}, {"nflows": 4, "normflows": 2, "3x3": 2}]
    shown = "\n".join(results._measurements("1x1", [{**row, "microseconds": each} for each in times]))
    to_nflows, to_normflows = shown.split("convolution of normflows")
    assert "| operation | threads | batch | 3x3 |" in to_nflows
    assert "| inverse | 2 | 1 | 0.12 to 0.50 × |" in to_nflows
    assert "| inverse | 2 | 1 | 0.50 to 1.00 × |" in to_normflows


def test_published_times_are_shown_with_what_was_skipped():
    measured = {"convolution": "MaCow", "images": 100, "parameters": 44268876, "model": "CIFAR-10"}
    measured |= {"seconds": {"forward": 0.1234}, "skipped": {"sampling": "more than 5 s"}}
    published = ("1.49 s (A)", "3.23 s (A)", "3.16")
    unmeasured = {"convolution": "MintNet", "model": "CIFAR-10", "seconds": {}, "skipped": {}}
    rows = [{**row, "published": published} for row in (measured, unmeasured)]
    shown = "\n".join(results._measurements("models", rows))
    assert "### CIFAR-10" in shown
    assert "| MaCow, 44.3 M | 100 | 0.123 s | skipped | 1.49 s (A); 3.23 s (A) | 3.16 |" in shown
    assert "| MintNet |  |  |  | 1.49 s (A); 3.23 s (A) | 3.16 |" in shown
    assert "Skipped: more than 5 s." in shown
