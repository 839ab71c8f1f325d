"""The pages of the documentation, and the blocks of code on them."""

import re
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCES = Sybil([RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))])


def page_id(page: Path) -> str:
    """Returns the test id of a page."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns the language and the text of each block of code."""
    regions = (region for _, region in _FENCES.parse(page).regions)
    return [(region.lexemes["language"].strip(), str(region.lexemes["source"])) for region in regions]


def commands(page: Path) -> list[str]:
    """Returns the blocks that a reader types into a shell."""
    return [source for language, source in blocks(page) if language == "sh"]


def installs(block: str) -> bool:
    """Returns whether the block installs packages; continuous integration runs those in a new environment."""
    return "pip install" in block


if __name__ == "__main__":  # prints a script of the distinct blocks that install something, each run from the checkout
    order = ["docs/index.md", *map(page_id, PAGES)]
    pages = sorted(PAGES, key=lambda page: order.index(page_id(page)))
    scripts = [re.sub(r" *#.*", "", block) for page in pages for block in commands(page) if installs(block)]
    first, *others = dict.fromkeys(scripts)
    print(f"(\n{first})\nexport NFLOWS_KCONV_BUILD=0")  # builds the native library only once, because it takes a while
    for script in others:
        print(f"(\n{script})")
