"""The documentation runs: Python blocks are executed, and the commands shown exist with the options shown."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
# `<!-- no-test: reason -->` above a block takes it out; the reason is for the reader of the source.
FENCE = re.compile(
    r"^(?P<skip><!-- no-test: .+? -->\n\s*)?^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    code: str


def blocks(page: Path, language: str) -> list[Block]:
    """The page's code blocks of one language, without those marked ``no-test``."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text[: match.start("body")].count("\n"), match["body"])
        for match in FENCE.finditer(text)
        if match["language"] == language and not match["skip"]
    ]


def commands(page: Path) -> list[list[str]]:
    """The ``titans ...`` lines of the page's bash blocks, split into words; a backslash continues a line."""
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("titans ")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """All blocks of a page in order, in one namespace and an empty folder, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # Blank lines in front make a traceback show the page's own line numbers.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_exist_with_their_options(page):
    """Each option shown is one that ``--help`` lists for the same command (and recipe)."""
    helps: dict[str, str] = {}
    for words in commands(page):
        # A command's options may depend on what it is given first, as a recipe's fields do.
        given = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
        shown = " ".join(["titans", *given])
        if shown not in helps:
            run = [sys.executable, "-m", "titans.cli.main", *given, "--help"]
            done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name_of(page)}: {shown} --help failed: {done.stderr}"
            helps[shown] = done.stdout
        for option in (word.partition("=")[0] for word in words[1:] if re.match(r"--\w", word)):
            known = re.search(rf"{re.escape(option)}(?![\w.-])", helps[shown])
            assert known, f"{name_of(page)}: {shown} has no option {option}"


def test_the_fence_pattern_sees_blocks_and_skips(tmp_path):
    """The two tests above pass on a page in which no block is found, so the finding itself is tested."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n```python\nx = 1\n```\ntext\n"
        "<!-- no-test: needs a GPU -->\n```python\nraise SystemExit\n```\n"
        "```bash\nmake demo\ntitans train tiny \\\n    --training.steps 3  # short\n```\n"
    )
    assert blocks(page, "python") == [Block(2, "x = 1\n")]
    assert commands(page) == [["titans", "train", "tiny", "--training.steps", "3"]]
