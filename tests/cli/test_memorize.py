"""`titans memorize`, `ask` and `generate --memory`: what a person types, and what mistakes are told."""

import io
import os
import signal

import pytest

from tests.inference.saved import TEXT, checkpoint
from titans import Memory
from titans.cli.main import main
from titans.cli.memorize import _Display
from titans.inference.memory_file import read_memory


@pytest.fixture
def work(tmp_path, monkeypatch):
    checkpoint(tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXT[:150])
    (tmp_path / "b.txt").write_text(TEXT[150:250])
    monkeypatch.chdir(tmp_path)
    return tmp_path


NEW = ["memorize", "a.txt", "--model", "model", "--out", "x.memory"]


def test_memorize_ask_and_go_on(work, capsys):
    assert main(NEW) == 0
    table = capsys.readouterr().out
    tokens = 1 + len(TEXT[:150].encode())
    for shown in (
        "tokens read in all",
        f"{tokens}",
        "tokens/s",
        "state",
        f"{os.path.getsize('x.memory'):,} bytes",
    ):
        assert shown in table
    assert main(["memorize", "b.txt", "--from", "x.memory", "--out", "y.memory"]) == 0
    capsys.readouterr()
    memory = Memory.load("y.memory", "model")
    assert [source.name for source in memory.sources] == ["a.txt", "b.txt"]

    # The model's place is in the file, wherever one asks from.
    os.chdir("model")
    before = (work / "y.memory").read_bytes()
    assert main(["ask", "../y.memory", "line", "--max-new-tokens", "9", "--seed", "2"]) == 0
    assert capsys.readouterr().out == memory.ask("line", max_new_tokens=9, seed=2) + "\n"
    assert (work / "y.memory").read_bytes() == before


def test_generate_goes_on_from_a_memory(work, capsys):
    assert main(NEW) == 0
    capsys.readouterr()
    memory = Memory.load("x.memory", "model")
    options = ["--memory", "x.memory", "--max-new-tokens", "9", "--greedy"]
    assert main(["generate", "model", *options, "--prompt", "line"]) == 0
    assert capsys.readouterr().out == "line" + memory.ask("line", max_new_tokens=9, greedy=True) + "\n"
    assert main(["generate", *options]) == 0  # right on, with the model that the file names
    assert capsys.readouterr().out == memory.ask("", max_new_tokens=9, greedy=True) + "\n"


def test_control_c_saves_and_the_same_command_goes_on(work, capsys, monkeypatch):
    small = [*NEW, "--piece", "16"]
    show = _Display.show

    def interrupt(self, bytes_read, tokens):
        show(self, bytes_read, tokens)
        if tokens == 64:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_Display, "show", interrupt)
        assert main(small) == 130
    shown = capsys.readouterr()
    assert "interrupted and saved: the same command goes on from 64 tokens" in shown.out
    assert "SIGINT: finishing this step, then saving" in shown.err
    assert main(["memorize", "b.txt", "--model", "model", "--out", "x.memory"]) == 2
    assert "x.memory: holds an unfinished reading of a.txt" in capsys.readouterr().err
    assert main(["memorize", "b.txt", "--from", "x.memory", "--out", "y.memory"]) == 2
    assert "--from x.memory: its own reading is unfinished" in capsys.readouterr().err
    assert main(NEW) == 0  # with the piece of the first run, though it is not named again
    assert main([*small[:-4], "--out", "whole.memory", "--piece", "16"]) == 0
    assert (work / "x.memory").read_bytes() == (work / "whole.memory").read_bytes()


def test_standard_input(work, monkeypatch):
    with (work / "a.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["memorize", "-", "--model", "model", "--out", "x.memory"]) == 0
    assert main(["memorize", "a.txt", "--model", "model", "--out", "y.memory"]) == 0
    one, other = read_memory(work / "x.memory"), read_memory(work / "y.memory")
    assert [source.name for source in one.header.sources] == ["standard input"]
    assert one.header.sources[0].sha256 == other.header.sources[0].sha256
    assert all(one.tensors[name].equal(tensor) for name, tensor in other.tensors.items())


def test_nothing_is_replaced_unasked(work, capsys):
    assert main(NEW) == 0
    before = (work / "x.memory").read_bytes()
    assert main(NEW) == 2
    assert "x.memory: exists already: read on with --from x.memory, or replace it" in capsys.readouterr().err
    assert main(["memorize", "b.txt", "--model", "model", "--out", "x.memory", "--overwrite"]) == 0
    assert (work / "x.memory").read_bytes() != before


def test_a_damaged_memory_can_be_replaced(work, capsys):
    assert main(NEW) == 0
    whole = (work / "x.memory").read_bytes()
    (work / "x.memory").write_bytes(whole[:-1])
    assert main(NEW) == 2
    assert "x.memory: cut short" in capsys.readouterr().err
    assert main([*NEW, "--overwrite"]) == 0
    assert (work / "x.memory").read_bytes() == whole


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["memorize", "absent.txt", "--model", "model", "--out", "x"], "absent.txt: no such file"),
        (["memorize", "--model", "model", "--out", "x"], "no sources"),
        (["memorize", "empty.txt", "--model", "model", "--out", "x"], "empty.txt: the file is empty"),
        (["memorize", "model/model.safetensors", "--model", "model", "--out", "x"], "not UTF-8 text"),
        (["memorize", "a.txt", "--out", "x"], "--model: expected a checkpoint"),
        (["memorize", "a.txt", "--model", "absent", "--out", "x"], "absent: no such folder"),
        (
            ["memorize", "a.txt", "--model", "model", "--out", "x", "--piece", "0"],
            "--piece: expected at least 1",
        ),
        (
            ["memorize", "a.txt", "--model", "model", "--out", "x", "--save-every", "-1"],
            "--save-every: expected",
        ),
        (["memorize", "texts", "--model", "model", "--out", "texts/x"], "lies inside the source texts"),
        (["memorize", "a.txt", "--model", "model", "--out", "a.txt"], "a.txt: is one of the sources"),
        (
            ["memorize", "a.txt", "--model", "model", "--out", "a.txt", "--overwrite"],
            "a.txt: is one of the sources",
        ),
        (
            ["memorize", "a.txt", "--model", "model", "--out", "b.txt", "--overwrite"],
            "b.txt: not a memory file",
        ),
        (["memorize", "a.txt", "--from", "absent", "--out", "x"], "absent: no such file"),
        (["ask", "absent", "what"], "absent: no such file"),
        (["ask", "a.txt", "what"], "a.txt: not a memory file"),
        (["ask", "old.memory", ""], "the question is empty"),
        (["ask", "old.memory", "what", "--temperature", "0"], "temperature: expected a number above 0"),
        (["ask", "old.memory", "what", "--model", "other"], "made with another model"),
        (["generate", "--prompt", "a"], "expected a checkpoint (or --memory)"),
        (["generate", "model", "--memory", "a.txt"], "a.txt: not a memory file"),
    ],
)
def test_mistakes_take_one_line(work, capsys, command, message):
    (work / "empty.txt").touch()
    (work / "texts").mkdir()
    (work / "texts" / "c.txt").write_text("abc")
    checkpoint(work / "other", seed=1)
    assert main(["memorize", "a.txt", "--model", "model", "--out", "old.memory"]) == 0
    capsys.readouterr()
    files = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("titans: error: ")
    assert message in error
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == files


def test_elsewhere_than_at_a_terminal_progress_is_lines(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)

    class Corpus:
        size = 1000

    with _Display(Corpus(), 100) as display:
        for number in range(1, 8):
            display.show(100 * number, 100 + 10 * number)
    lines = written.getvalue().splitlines()
    assert len(lines) == 2
    assert "130 tokens" in lines[0]
    assert "30% of the text" in lines[0]
