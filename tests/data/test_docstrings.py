"""Documentation of installed packages as text: what is taken, without running any of it."""

import json
import sys

import pytest

from tools.docstrings import Options, main, paragraphs


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "documented"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""First.\n\nSecond."""\nraise SystemExit("it was run")\n')
    (folder / "part.py").write_text(
        'class A:\n    """Of a class."""\n\n    def f(self):\n        """First."""\n'
    )
    (folder / "broken.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)
    return "documented"


def test_paragraphs_of_modules_classes_and_functions(package):
    assert list(paragraphs(package)) == ["First.", "Second.", "Of a class.", "First."]


def test_a_paragraph_is_written_once(package, tmp_path, capsys):
    main(Options((package,), tmp_path / "d.jsonl"))
    lines = [json.loads(line)["text"] for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert lines == ["First.", "Second.", "Of a class."]
    assert "3 paragraphs" in capsys.readouterr().out
    assert "documented" not in sys.modules


def test_an_unknown_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected installed packages, got 'no_such_package'"):
        main(Options(("no_such_package",), tmp_path / "d.jsonl"))
