"""`titans` and `titans prepare`: exit codes, one line for a mistake, no slow imports before they count."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import titans.cli
from titans.cli import main as main_module
from titans.cli.main import COMMANDS, main
from titans.data.shards import TokenShards
from titans.errors import UserError

# Runs main() with `titans` itself replaced by an empty package, and says which slow modules it imported.
LIGHT = """
import sys, types
package = types.ModuleType("titans")
package.__path__ = [{package!r}]
package.__version__ = "0"
sys.modules["titans"] = package
from titans.cli.main import main
code = main()
slow = {{"torch", "transformers", "datasets"}} & set(sys.modules)
print("code", code, "imported", *sorted(slow), file=sys.stderr)
"""


def run_light(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    program = LIGHT.format(package=str(Path(titans.cli.__file__).parent.parent))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )


def add_command(monkeypatch: pytest.MonkeyPatch, run: object, **attributes: object) -> None:
    """A command ``probe`` whose arguments are an int and which does what ``run`` does."""
    module = types.ModuleType("titans.cli.probe")
    vars(module).update(parse=lambda argv: argv, run=run, **attributes)
    monkeypatch.setitem(sys.modules, "titans.cli.probe", module)
    monkeypatch.setitem(COMMANDS, "probe", "a command of this test")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    return tmp_path / "a.jsonl"


def test_prepare_makes_shards_and_a_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["prepare", str(source), "--out", str(out), "--validation-documents", "3"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("split", "train", "val", "17", "tokens/s"))
    assert len(TokenShards(out, "val").starts) == 3


def test_prepare_says_that_one_document_was_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("text " * 100)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 0
    assert "one document only: its last part is the validation split" in capsys.readouterr().out


def test_prepare_passes_its_options_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.data").write_text('{"body": "one"}\n{"body": ""}\n{"body": "two"}\n')
    options = ["--format", "jsonl", "--text-field", "body", "--validation-fraction", "0", "--shard-size", "3"]
    options += ["--seed", "7", "--overwrite"]
    assert main(["prepare", str(tmp_path / "a.data"), "--out", str(tmp_path / "out"), *options]) == 0
    shards = TokenShards(tmp_path / "out")
    assert shards.read(0, len(shards)).tolist() == [256, *b"one", 256, *b"two"]
    assert [shard.tokens for shard in shards.meta.splits["train"].shards] == [3, 3, 2]
    assert shards.meta.seed == 7
    printed = capsys.readouterr().out
    assert "1 empty documents were left out" in printed
    assert "No validation split" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no sources: expected files, folders, '-', 'python-docs' or a data set's name"),
        (["nope.txt"], "nope.txt: no such file or folder"),
        (
            ["python-docs", "--sed", "3"],
            "Unrecognized options: --sed, 3: did you mean --seed? (see titans prepare",
        ),
        (["python-docs", "--seed", "z"], "Error parsing --seed: invalid literal for int() with base 10: 'z'"),
        (["python-docs", "--format", "xml"], "--format"),
        (
            ["python-docs", "--validation-fraction", "nan"],
            "validation_fraction: expected a number in [0, 1), got nan",
        ),
        (["python-docs", "--tokenizer", "nope"], "tokenizer 'nope': no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("titans: error: ")
    assert message in lines[0]
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_in_options_are_one_line_in_any_encoding(encoding: str):
    """tyro draws its boxes otherwise where the terminal cannot show UTF-8."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = run_light("prepare", "python-docs", "--out", "x", "--sed", "1", environment=environment)
    error, last = result.stderr.splitlines()
    expected = "Unrecognized options: --sed, 1: did you mean --seed? (see titans prepare --help)"
    assert error == f"titans: error: {expected}"
    assert last == "code 2 imported"


def test_a_missing_option_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["prepare", "python-docs"]) == 2
    assert "titans: error: Missing from titans prepare: --out PATH" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prepare", "--help"], ["trian"]])
def test_help_and_early_mistakes_import_nothing_slow(arguments: list[str]):
    """torch and transformers take seconds; nobody should wait for them to read a help text."""
    result = run_light(*arguments)
    assert result.stderr.splitlines()[-1] == f"code {2 if arguments == ['trian'] else 0} imported", (
        result.stderr
    )
    if "--help" in arguments:
        assert result.stdout.startswith("usage: titans")


def test_mistakes_in_prepares_sources_import_nothing_slow(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = run_light("prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"))
    error, last = result.stderr.splitlines()
    assert "not UTF-8 text: byte 0xff at offset 0" in error
    assert last == "code 2 imported"


def test_the_table_names_every_command(capsys: pytest.CaptureFixture[str]):
    """Every command has its module and every module that can be run its line, also in `titans --help`."""
    files = Path(titans.cli.__file__).parent.glob("*.py")
    runnable = {path.stem for path in files if "\ndef run(" in path.read_text(encoding="utf-8")}
    assert {name.replace("-", "_") for name in COMMANDS} == runnable
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and text in printed for name, text in COMMANDS.items())
    assert main([]) == 2


def test_unknown_words(capsys: pytest.CaptureFixture[str]):
    assert main(["trian"]) == 2
    assert "titans: error: unknown command 'trian': did you mean 'train'?" in capsys.readouterr().err
    assert main(["--verbose"]) == 2
    assert "titans: error: unknown option '--verbose'" in capsys.readouterr().err


def test_a_command_without_its_module_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(COMMANDS, "no-such", "")
    assert main(["no-such"]) == 2
    expected = (
        "titans: error: the command 'no-such' is not part of this installation: no module titans.cli.no_such"
    )
    assert expected in capsys.readouterr().err


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    add_command(monkeypatch, interrupted)
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "titans: interrupted\n"


def test_files_that_cannot_be_used_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    add_command(monkeypatch, lambda arguments: open("/nonexistent/file").close())
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "titans: error: /nonexistent/file: No such file or directory\n"


def test_our_value_errors_are_one_line_and_others_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A ValueError out of a library is a bug: hiding where it came from would make it unfindable."""

    def raise_from(module: str, error: str) -> object:
        scope: dict[str, object] = {"__name__": module, "UserError": UserError}
        exec(f"def run(arguments):\n    raise {error}", scope)
        return scope["run"]

    add_command(monkeypatch, raise_from("titans.ops.api", "ValueError('q: expected\\n 4 dimensions')"))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "titans: error: q: expected 4 dimensions\n"
    add_command(monkeypatch, raise_from("torch.nn", "UserError('wrong')"))
    assert main(["probe"]) == 2
    add_command(monkeypatch, raise_from("torch.nn", "ValueError('internal')"))
    with pytest.raises(ValueError, match="internal"):
        main(["probe"])


@pytest.mark.parametrize(
    "arguments", [["--traceback", "prepare", "nope", "--out", "x"], ["prepare", "--traceback"]]
)
def test_traceback_shows_where_a_mistake_was_found(arguments: list[str]):
    with pytest.raises(UserError):
        main(arguments)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path):
    """`titans ... | head -1`"""
    program = (
        "import sys; from titans.cli import main as m; import types;"
        "m._dispatch = lambda words: print('line\\n' * 100_000) or 0; sys.exit(m.main([]))"
    )
    stub = LIGHT.split("from titans.cli.main")[0].format(
        package=str(Path(main_module.__file__).parent.parent)
    )
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", stub + program], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_ctrl_c_while_preparing_leaves_nothing(tmp_path: Path):
    """A real signal in a real process, while it waits for more input."""
    stub = LIGHT.split("from titans.cli.main")[0].format(
        package=str(Path(main_module.__file__).parent.parent)
    )
    program = stub + "from titans.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "prepare", "-", "--out", str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/spool")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.decode().strip().endswith("titans: interrupted")
    assert os.listdir(tmp_path) == []
