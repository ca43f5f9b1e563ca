"""Kills, full disks, two writers of one memory file: the old file is whole, or the new one."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.inference.saved import TEXT, checkpoint
from titans.cli.main import main
from titans.errors import UserError
from titans.inference import memory_file
from titans.inference.memory import Memory
from titans.inference.memory_file import locked, read_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model, a text of a few pieces, and a memory file of an earlier text."""
    checkpoint(tmp_path / "model")
    (tmp_path / "old.txt").write_text(TEXT[:100])
    (tmp_path / "text.txt").write_text(TEXT[100:400])
    monkeypatch.chdir(tmp_path)
    assert main(["memorize", "old.txt", "--model", "model", "--out", "x.memory"]) == 0
    return tmp_path


READ_ON = ["memorize", "text.txt", "--from", "x.memory", "--out", "x.memory", "--piece", "32"]


def only_these_files(folder, *names):
    """No temporary file and no lock is left behind."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model", "old.txt", "text.txt", *names])


def test_a_full_disk_leaves_the_old_file(work, capsys):
    """A limit on the size of files stands in for the disk: the kernel refuses the write half-way."""
    before = (work / "x.memory").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code = main([*READ_ON, "--save-every", "0"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "x.memory: cannot be written: File too large; the file that was there" in capsys.readouterr().err
    assert (work / "x.memory").read_bytes() == before
    only_these_files(work, "x.memory")
    assert main(READ_ON) == 0


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_old_file(work, call, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (work / "x.memory").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(memory_file.os, call, full)
        assert main(READ_ON) == 2
    error = capsys.readouterr().err
    assert "x.memory: cannot be written: No space left on device" in error
    assert "Traceback" not in error
    assert (work / "x.memory").read_bytes() == before
    only_these_files(work, "x.memory")


def test_a_folder_that_cannot_be_written_is_told_before_work(work, capsys, monkeypatch):
    (work / "file").touch()
    monkeypatch.setattr(Memory, "new", lambda *_: pytest.fail("the model was loaded"))
    assert main(["memorize", "text.txt", "--model", "model", "--out", "file/x.memory"]) == 2
    assert "file/x.memory: cannot be written: " in capsys.readouterr().err


def test_the_second_writer_is_told_before_work(work, capsys):
    """Also when its model would not even load."""
    before = (work / "x.memory").read_bytes()
    with locked(work / "x.memory"):
        assert main(["memorize", "text.txt", "--model", "absent", "--out", "x.memory", "--overwrite"]) == 2
        assert "x.memory: another process is writing it" in capsys.readouterr().err
        with pytest.raises(UserError, match="another process is writing it"):
            Memory.new("model").save("x.memory")
    assert (work / "x.memory").read_bytes() == before


def test_the_lock_and_the_torn_file_of_a_dead_writer_are_in_nobodys_way(work):
    (work / ".x.memory.lock").touch()
    (work / ".x.memory.saving").write_bytes(b"half a file")
    assert main(READ_ON) == 0
    only_these_files(work, "x.memory")


# Loads everything once; then memorizes in a fresh process for every line: a signal, when to send it, words.
PROGRAM = """
import os, sys, time
import titans.inference.reading
from titans.cli.main import main
for line in sys.stdin:
    number, after, *words = line.split()
    end = time.monotonic() + float(after)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(words))
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, int(number))
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Runner:
    """`titans ...` in processes that start at once; each may be sent a signal after a while."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, words, number=signal.SIGKILL, after=100.0) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(int(number), after, *words, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=30)


@pytest.fixture
def runner():
    made = Runner()
    yield made
    made.close()


def commands(work):
    """Reading the text into `x.memory`, a save after every piece; and the same undisturbed, elsewhere."""
    (work / "text.txt").write_text(TEXT[100:1500])
    start = (work / "x.memory").rename(work / "start.memory")
    read = ["memorize", work / "text.txt", "--from", start, "--piece", "32", "--save-every", "0", "--out"]
    return [*read, work / "x.memory"], [*read, work / "whole.memory"]


@pytest.mark.slow
def test_twenty_kills_at_random_moments(work, runner):
    """Each leaves a whole file or none; the same command goes on from it, to the same end, to the bit."""
    disturbed, undisturbed = commands(work)
    assert runner.run(["--version"]) == 0  # it is ready, and what follows is timed
    out, moments = work / "x.memory", random.Random(0)
    started = time.monotonic()
    assert runner.run(undisturbed) == 0
    duration = time.monotonic() - started
    whole = (work / "whole.memory").read_bytes()
    kills = places = 0
    position = -1
    while kills < 20:
        code = runner.run(disturbed, after=moments.uniform(0, 0.6 * duration))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if not out.exists():
            continue
        header = read_memory(out).header  # whole
        if header.reading is None:  # finished before the kill: once more from the start
            assert out.read_bytes() == whole
            out.unlink()
            position = -1
        else:
            assert header.tokens_read >= position  # nothing that was saved is lost
            places += header.tokens_read > position
            position = header.tokens_read
    assert places >= 3  # they did fall into the reading
    assert runner.run(disturbed) == 0
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_command_goes_on(work, runner):
    disturbed, undisturbed = commands(work)
    assert runner.run(["--version"]) == 0
    started = time.monotonic()
    assert runner.run(undisturbed) == 0
    duration = time.monotonic() - started
    assert runner.run(disturbed, number=signal.SIGINT, after=duration / 2) == 130
    assert read_memory(work / "x.memory").header.reading is not None
    assert runner.run(disturbed) == 0
    assert (work / "x.memory").read_bytes() == (work / "whole.memory").read_bytes()


@pytest.mark.slow
def test_two_writers_of_one_file(work, runner):
    """The second of two processes is refused; the first does not notice."""
    disturbed, undisturbed = commands(work)
    second = Runner()
    try:
        assert runner.run(undisturbed) == 0
        assert second.run(["--version"]) == 0  # it is ready
        with locked(work / "x.memory"):
            assert second.run(disturbed) == 2
        assert second.run(disturbed) == 0
    finally:
        second.close()
    assert (work / "x.memory").read_bytes() == (work / "whole.memory").read_bytes()
