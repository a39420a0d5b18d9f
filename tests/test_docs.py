"""Pages name files, tests and config groups that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "data" / "README.md",
    *ROOT.glob("benchmarks/**/*.md"),
]
PAGES = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")]  # which tell of earlier versions
NAMED = re.compile(
    r"\b((?:tests|src|conf|sweeps|benchmarks|docs|examples)/[\w./-]+\.(?:py|yaml|md|png|ipynb))(?:::(\w+))?"
)
CHOICE = re.compile(r"\b(method|backbone|world|data|eval|diffusion|annotator|experiment|trainer|logger)=([a-z][\w-]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_is_there(page):
    text = page.read_text()
    for name, test in NAMED.findall(text):
        assert (ROOT / name).exists(), name
        assert not test or f"def {test}(" in (ROOT / name).read_text(), f"{name}::{test}"
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link
    for group, choice in CHOICE.findall(text):
        assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), f"{group}={choice}"
