"""`titans demo` at a size of seconds, with models that know nothing and with the shipped ones."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.inspection.test_search_report import Reader as Page
from tests.tasks.shipped import tiny_checkpoint
from titans.cli import demo
from titans.cli.main import main
from titans.inference.checkpoint import from_pretrained
from titans.inference.shipped import shipped_names
from titans.inference.stream import Stream
from titans.tasks.search import Answer, Reader

ROOT = Path(__file__).parent.parent.parent
MODELS = ["--model", "memory", "--twin", "twin"]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Two checkpoints with one tokenizer in the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(Path("memory"), "mag")
    tiny_checkpoint(Path("twin"), "attention")
    monkeypatch.setattr(demo, "LENGTHS", (400, 800))


@pytest.fixture
def knows(monkeypatch):
    """The model with the memory answers right, its twin does not."""

    def answer(self, hidden, progress=lambda read: None):
        progress(self.cost(hidden))
        variant = self._new.model.config.variant
        given = hidden.value if variant == "mag" else "1"
        return Answer(text=f" {given}.", given=given, value=hidden.value, state_bytes=10)

    monkeypatch.setattr(Reader, "answer", answer)


def run(*words: str) -> int:
    return main(["demo", "--tokens", "1200", *MODELS, *words])


def test_found(knows, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert "memory found the number" in printed
    for part in (
        "python-docs: 1,2",
        "words",
        "asked at the end",
        "right",
        "wrong",
        "key-value cache",
        "400",
        "800",
    ):
        assert part in printed, part
    out = Path("runs/demo")
    wanted = {"report.html", "demo.json"} | (
        {"picture.png"} if importlib.util.find_spec("matplotlib") else set()
    )
    assert {file.name for file in out.iterdir()} == wanted
    figures = json.loads((out / "demo.json").read_text())
    assert (
        figures["sentence"]
        == f"One of the special magic numbers for {figures['sentence'].split()[7]} is: {figures['value']}."
    )
    assert [side["answer"]["right"] for side in figures["sides"]] == [True, False]
    assert {(cell["length"], cell["depth"]) for cell in figures["cells"]} >= {
        (400, 0.1),
        (800, 0.9),
        (1200, 0.1),
    }
    words = "".join(Page((out / "report.html").read_text()).words)
    assert figures["sentence"] in words
    assert figures["value"] in words


def test_not_found_is_a_sentence_and_exit_code_1(capsys):
    assert run("--depth", "0.5", "--seed", "3") == 1
    printed = capsys.readouterr().out
    value = json.loads(Path("runs/demo/demo.json").read_text())["value"]
    assert "memory did not find the number: it answered" in printed
    assert f"the true value is {value}" in printed


def test_both_models_read_the_same(monkeypatch, capsys):
    """An answer is worth something only beside that of a model which was given the same text."""
    read: dict[str, list[int]] = {"mag": [], "attention": []}
    original = Stream.read

    def noting(self, ids, *rest):
        read[self.model.config.variant] += ids.tolist()
        return original(self, ids, *rest)

    monkeypatch.setattr(demo, "_set_threads", lambda *_: None)
    monkeypatch.setattr(Stream, "read", noting)
    run()
    assert read["mag"] == read["attention"] != []
    assert len(read["mag"]) > 2_000
    capsys.readouterr()


def test_seed_and_depth_decide(knows, capsys):
    found = []
    for words in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--depth", "0.9"]):
        run(*words, "--source", "python-docs")
        found.append(json.loads(Path("runs/demo/demo.json").read_text()))
    assert found[0]["sentence"] == found[1]["sentence"] == found[3]["sentence"] != found[2]["sentence"]
    assert found[0]["position"] == found[1]["position"]
    assert abs(found[3]["depth"] - 0.9) < 0.1
    capsys.readouterr()


def test_a_source_of_the_users(knows, capsys):
    Path("mine").mkdir()
    Path("mine/a.txt").write_text(
        "<b>Bold</b> & <script>alert(1)</script> of mine. Another sentence.\n\nAnd more."
    )
    assert run("--source", "mine") == 0
    page = Path("runs/demo/report.html").read_text()
    assert "<script" not in page
    assert "<script>alert(1)</script> of mine" in "".join(Page(page).words)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depth", "1.5"], "--depth: expected a share of the text, 0 to 1, got 1.5"),
        (["--tokens", "10"], "--tokens: expected at least 256, got 10"),
        (["--source", "absent.txt"], "absent.txt: no such file"),
        (["--source", "blank.txt"], "blank.txt: expected at least one sentence"),
        (["--twin", "memory"], "--twin: expected another model than memory"),
        (["--twin", "bytes"], "--twin bytes: expected the tokenizer of memory, got another"),
        (["--model", "needle-none"], "unknown checkpoint 'needle-none'"),
        (["--out", "blank.txt"], "blank.txt: File exists"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    from tests.inference.saved import checkpoint

    checkpoint(Path("bytes"), "attention")
    Path("blank.txt").write_text(" \n")
    capsys.readouterr()  # transformers' own bar of saving, unless another test has switched it off
    assert run(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_an_interrupted_run_leaves_no_half_file(tmp_path):
    """Ctrl-C while it reads: one line, 130, and what an earlier run wrote is as it was."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("an earlier one")
    command = [
        sys.executable,
        "-m",
        "titans.cli.main",
        "demo",
        "--tokens",
        "2000000",
        *MODELS,
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "2. the memory" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert [file.name for file in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "an earlier one"


@pytest.mark.slow
@pytest.mark.skipif(
    not {demo.MEMORY, demo.TWIN} <= set(shipped_names()), reason="needs the shipped checkpoints"
)
def test_the_shipped_memory_finds_what_its_twin_does_not(capsys):
    assert main(["demo", "--tokens", "20000"]) == 0
    sides = json.loads(Path("runs/demo/demo.json").read_text())["sides"]
    assert [side["answer"]["right"] for side in sides] == [True, False]
    models = [from_pretrained(name) for name in (demo.MEMORY, demo.TWIN)]
    sizes = [sum(each.numel() for each in model.model.parameters()) for model in models]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    capsys.readouterr()
