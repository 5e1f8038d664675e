"""Links and pictures of the texts lead to files of the repository, and places in them."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = "", "docs/", "data/", "logs/", "tools/"
TEXTS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def targets(path: Path) -> list[str]:
    """What it links to, without what stands in blocks of code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    return [link for link in LINK.findall(text) if "://" not in link]


def pictures() -> set[Path]:
    """Those that tools/evidence.sh makes, which may be there or not."""
    script = (ROOT / "tools" / "evidence.sh").read_text("utf-8")
    (names,) = re.findall(r"for picture in ([\w ]+); do", script)
    return {ROOT / "docs" / "pictures" / f"demo.{name}.png" for name in names.split()}


def anchors(path: Path) -> set[str]:
    """Of its titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_somewhere(path):
    for link in targets(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() or target in pictures(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_the_readme_leads_to_every_page_of_docs():
    """Itself, or through a page that it links to."""
    first = {(ROOT / link).resolve() for link in targets(ROOT / "README.md")}
    pages = [path for path in first if path.suffix == ".md" and path.exists()]
    second = {(page.parent / link).resolve() for page in pages for link in targets(page)}
    assert {*(ROOT / "docs").glob("*.md")} <= first | second
