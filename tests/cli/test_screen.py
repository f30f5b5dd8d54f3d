"""Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sgld.cli import screen
from sgld.cli.screen import Screen, bar
from sgld.errors import OutputError
from sgld.messages import Note, Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal; it has no size, so 80 columns are taken."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no size")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(screen, "FRAME_S", 0.0)
    return Terminal()


def run(shown: Screen, steps: int = 3) -> None:
    follow = shown.follow("[1/2]")
    for stage, total in (("encode", 1), ("denoise", steps)):
        for step in range(total + 1):
            follow(Progress("job", stage, step, total))


def test_a_pipe_gets_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Screen()
    run(shown)
    shown.close()
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(": ")[0] for line in told.err.splitlines()] == ["[1/2] encode", "[1/2] denoise"]


def test_a_pipe_gets_a_sign_of_life_in_a_long_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "QUIET_S", 0.0)
    run(Screen(), steps=2)
    assert "[1/2] denoise: 1/2\n" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_that_grows(terminal: Terminal) -> None:
    run(Screen(terminal))
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert [text.count("#") for text in drawn if "denoise" in text] == [0, 8, 16, 24]
    assert drawn[-1].endswith("\n")
    assert all(len(text.rstrip("\n")) < 80 for text in drawn)


def test_lines_do_not_mix_with_a_bar(terminal: Terminal) -> None:
    shown = Screen(terminal)
    follow = shown.follow()
    follow(Progress("job", "denoise", 1, 2))
    follow(Note("job", "the prompt was cut"))
    assert terminal.getvalue().endswith("\r\x1b[Kwarning: the prompt was cut\n")
    follow(Progress("job", "denoise", 1, 2))
    shown.close()
    assert terminal.getvalue().endswith("s left\n")


def test_a_bar_tells_what_is_left() -> None:
    assert bar(Progress("job", "denoise", 5, 20), 2.0) == "denoise  [######------------------] 5/20  2.0 s, 6.0 s left"
    assert bar(Progress("job", "denoise", 0, 20), 2.0).endswith("] 0/20  2.0 s")
    assert bar(Progress("job", "load", 0, 0), 2.0).endswith("] 0/0  2.0 s")


def test_a_full_disk_stops_results_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        screen.say("progress", full)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(OutputError, match="^cannot write to standard output: No space left on device$"):
            screen.say("result.png", full)
        screen.say("result.png", full)  # which is dropped now
