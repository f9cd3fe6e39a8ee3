"""What the pages under docs/ say works when typed: each block of Python runs, and prints what stands beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISED = re.compile(r"^ *print\(.*\) +# (.+)$", re.MULTILINE)
DEADLINE = 120

pytestmark = pytest.mark.usefixtures("unmeasured")

# Each block is a script of its own, in the order of the page; a block that begins with "# name.py" is also that file.
RUNNER = """
import json, sys
page, blocks = json.load(sys.stdin)
for line, code in blocks:
    print(f"\\0{line}", flush=True)
    name = code.partition("\\n")[0].removeprefix("# ")
    if name.endswith(".py"):
        with open(name, "w", encoding="utf-8") as file:
            file.write(code)
    exec(compile("\\n" * line + code, page, "exec"), {"__name__": "__main__"})
"""


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[tuple[int, str]]:
    """The blocks of Python on a page, each with the number of the line before it."""
    text = text_of(page)
    found = FENCED.finditer(text)
    return [(text.count("\n", 0, one.start(2)), one[2]) for one in found if one[1] == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps([str(DOCS / page), blocks]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, "OPENAI_API_KEY": "none is needed to describe a job"},
    )
    assert done.returncode == 0, done.stderr
    said = dict(part.split("\n", 1) for part in done.stdout.split("\0")[1:])
    for line, code in blocks:
        for promised in PROMISED.findall(code):
            pattern = ".*".join(map(re.escape, promised.split("…")))
            assert re.search(pattern, said[str(line)], re.DOTALL), f"{page}, line {line}: {promised!r} isn't said"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """Only Python is run: what can't be, says so."""
    assert {one[1] for one in FENCED.finditer(text_of(page))} <= {"python", "text", "console"}


def anchors_of(path: Path) -> set[str]:
    """What the headings of a page are linked by, those of what it includes, too."""
    text = path.read_text(encoding="utf-8")
    for included in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE):
        text += (ROOT / included).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text_of(page)):
        if not link.startswith("https://"):
            path = (DOCS / page).parent / link if link else DOCS / page
            assert path.exists(), link
            assert not anchor or anchor in anchors_of(path), f"{link}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r"[\w/]+\S*\.md", navigation)) == PAGES


def test_every_public_name_is_in_the_reference_once() -> None:
    import penstock

    listed = re.findall(r"^::: penstock\.(\w+)$", text_of("reference.md"), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(penstock.__all__)
    assert "`ps.__version__`" in text_of("reference.md")


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = "\n".join(map(text_of, PAGES))
    for target in set(re.findall(r"`make (\w+)`", said)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for example in set(re.findall(r"examples/[\w/]+\.(?:py|ipynb)", said)):
        assert (ROOT / example).exists(), example
    assert set(re.findall(r"(?:`|\$ )penstock (\w+)", said)) <= {"run", "fetch", "dead", "torture", "log"}
