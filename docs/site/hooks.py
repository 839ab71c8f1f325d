"""Extends the Markdown pages in docs/: MkDocs calls the functions named on_*.

The result of the directive NAME replaces a line of a page that ends in `<!-- site: NAME ARGUMENT -->`. What precedes
it, such as a link, is for readers of the repository.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Callable
from typing import Any

import math_core
import results
from drawings import DRAWINGS
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from results import RESULTS, ROOT

DIRECTIVE = re.compile(r"^.*<!-- site: (\S+)(?: (\S+))? -->$", re.MULTILINE)
EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_latex = math_core.LatexToMathML(fancy_error=False)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages in the root of the repository, and a page of all measurements."""
    for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):
        text = (ROOT / f"{name}.md").read_text().replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    for path in sorted(RESULTS.rglob("*.*")):
        files.append(File.generated(config, f"results/{path.relative_to(RESULTS)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Runs the directives, and converts links to other files of the repository to links of the site."""
    for elsewhere, here in (("benchmarks/results/", "results/"), ("CONTRIBUTING.md", "contributing.md")):
        markdown = markdown.replace(f"](../{elsewhere}", f"]({here}")
    return DIRECTIVE.sub(lambda match: _DIRECTIVES[match[1]](match[2]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Converts equations to MathML."""
    return EQUATION.sub(_equation, content)


def _equation(match: re.Match[str]) -> str:
    block = match[1] == "div"
    latex = html.unescape(match[2]).strip()[2:-2]  # without \( \) or \[ \]
    mathml = _latex.convert_with_local_state(latex, displaystyle=block)
    return f'<div class="math">{mathml}</div>' if block else mathml


def _difference(folder: str) -> str:
    """Returns the difference between before.py and after.py."""
    before, after = ((ROOT / folder / name).read_text().splitlines() for name in ("before.py", "after.py"))
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    return "\n".join(["```diff", *lines, "```"])


def _demo() -> str:
    """Returns the table of the README."""
    return re.search(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)[0]


_DIRECTIVES: dict[str, Callable[[str], str]] = {
    "draw": lambda name: DRAWINGS[name](),
    "difference": _difference,
    "headline": lambda _: results.headline(),
    "published": lambda _: results.published(),
    "results": lambda _: results.all_results(),
    "evidence": lambda _: results.evidence(),
    "reports": lambda _: results.reports(),
    "demo": lambda _: _demo(),
}
