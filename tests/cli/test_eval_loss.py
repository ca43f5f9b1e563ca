"""`titans eval-loss`: a table per stream, JSON on request, one line for a mistake."""

import json

import pytest

from tests.cli.trained import trained
from titans.cli.main import main


@pytest.fixture
def folder(tmp_path):
    return trained(tmp_path)


def test_table_and_json(folder, capsys):
    out = folder / "loss.json"
    text = str(folder / "text.txt")
    command = ["eval-loss", str(folder / "run"), text, "--buckets", "100", "1000", "--json", str(out)]
    assert main([*command, "--max-tokens", "1500", "--piece", "128"]) == 0
    table = capsys.readouterr().out
    assert "100 - 1,000" in table
    stream = json.loads(out.read_text())["streams"][text]
    assert stream["tokens"] == 1500
    assert [bucket["start"] for bucket in stream["buckets"]] == [0, 100, 1000]
    assert 0 < stream["loss"] < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected at least one file"),
        (["absent.txt"], "absent.txt: no such file"),
        (["empty.txt"], "empty.txt: the file is empty"),
        (["binary.txt"], "not UTF-8"),
        (["text.txt", "--buckets", "5", "3"], "edges: expected ascending"),
        (["text.txt", "--piece", "0"], "piece: expected at least 1"),
        (["text.txt", "--max-tokens", "1"], "--max-tokens: expected at least 2"),
        (["text.txt", "--bucket", "5"], "did you mean --buckets?"),
    ],
)
def test_mistakes_take_one_line(options, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\xff\xff")
    assert main(["eval-loss", "run", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
