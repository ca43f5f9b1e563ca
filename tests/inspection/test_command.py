"""`titans inspect`: a page and pictures from a file, and one line for a mistake before work begins."""

import gzip
import re

import pytest

from tests.cli.trained import trained
from tests.inspection.test_page import data_in
from titans.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    copy = trained(tmp_path)
    monkeypatch.chdir(copy)
    return copy


def test_page_beside_the_file_and_pictures(folder, capsys):
    pytest.importorskip("matplotlib")
    command = [
        "inspect",
        "text.txt",
        "--model",
        "run",
        "--max-tokens",
        "200",
        "--spans",
        "3",
        "--png",
        "figures",
    ]
    assert main(command) == 0
    page = (folder / "text.txt.html").read_text(encoding="utf-8")
    data = data_in(page)
    assert len(data["tokens"]) == 200
    assert data["tokens"][0] == "<bos>"
    assert "".join(data["tokens"][1:]) == (folder / "text.txt").read_text()[:199]
    assert len(data["spans"]) == 3
    assert "titans inspect text.txt --model run --max-tokens 200 --spans 3" in page
    assert len(list((folder / "figures").glob("*.png"))) == 6
    out = capsys.readouterr().out
    whole = len((folder / "text.txt").read_text()) + 1
    assert f"Left out: {whole - 200:,} tokens after the first 200" in out
    assert re.search(r"loss \d\.\d+ nats per token, without writes \d", out)


def test_archives_and_standard_input(folder, monkeypatch):
    text = b"line of text\n" * 10
    with gzip.open(folder / "text.gz", "wb") as file:
        file.write(text)
    assert main(["inspect", "text.gz", "--model", "run", "--spans", "0"]) == 0
    archived = data_in((folder / "text.gz.html").read_text(encoding="utf-8"))
    assert "".join(archived["tokens"][1:]).encode() == text
    assert "spans" not in archived

    (folder / "piped").write_bytes(text)
    with (folder / "piped").open() as piped:
        monkeypatch.setattr("sys.stdin", piped)
        assert main(["inspect", "-", "--model", "run", "--spans", "0"]) == 0
    assert (
        data_in((folder / "standard-input.html").read_text(encoding="utf-8"))["tokens"] == archived["tokens"]
    )


def test_a_long_line_is_not_read_to_its_end(folder, capsys):
    """Only so much text is tokenised as can be shown; what is left out is counted as far as it was read."""
    (folder / "line.txt").write_text("x" * 5_000_000)
    assert main(["inspect", "line.txt", "--model", "run", "--max-tokens", "100", "--spans", "0"]) == 0
    assert "Left out: more than 3,9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.txt", "--model", "run"], "absent.txt: expected a text file, no such file"),
        (["data", "--model", "run"], "data: expected a text file, got a folder"),
        (["empty.txt", "--model", "run"], "empty.txt: the file is empty"),
        (["binary.txt", "--model", "run"], "not UTF-8"),
        (["text.txt", "--model", "absent"], "absent: no such folder"),
        (["text.txt"], "--model"),
        (["text.txt", "--model", "run", "--max-tokens", "1"], "--max-tokens: expected at least 2"),
        (["text.txt", "--model", "run", "--spans", "-1"], "--spans: expected 0"),
        (
            ["text.txt", "--model", "run", "--out", "absent/page.html"],
            "--out absent/page.html: expected a file",
        ),
        (["text.txt", "--model", "run", "--out", "text.txt"], "would replace the text"),
        (
            ["text.txt", "--model", "run", "--png", "text.txt"],
            "--png text.txt: expected a folder, got a file",
        ),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(options, message, folder, capsys):
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\xff\xff")
    assert main(["inspect", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(folder.glob("*.html"))


def test_a_failure_leaves_the_old_page(folder, monkeypatch):
    """The new page is written beside the old one and takes its place whole."""
    page = folder / "text.txt.html"
    page.write_text("old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full", "page"))
    )
    command = ["inspect", "text.txt", "--model", "run", "--max-tokens", "50", "--spans", "0"]
    assert main(command) == 2
    assert page.read_text() == "old"
    assert not list(folder.glob(".*.part"))
