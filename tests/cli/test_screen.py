"""Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from sgld.cli import screen
from sgld.cli.screen import Screen
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
    frames = re.findall(r"\[1/2\] denoise: +([0-9]+)%\|(#*)[0-9 ]*\| ([0-3])/3", terminal.getvalue())
    assert [(percent, step) for percent, _, step in frames] == [
        ("0", "0"),
        ("33", "1"),
        ("67", "2"),
        ("100", "3"),
        ("100", "3"),  # once more as it is closed
    ]
    widths = [len(cells) for _, cells, _ in frames]
    assert widths == sorted(widths) and widths[0] < widths[1] < widths[-1]
    assert terminal.getvalue().count("\n") == 2, "each stage keeps its line"


def test_lines_do_not_mix_with_a_bar(terminal: Terminal) -> None:
    shown = Screen(terminal)
    follow = shown.follow()
    follow(Progress("job", "denoise", 1, 2))
    follow(Note("job", "the prompt was cut"))
    assert re.search(r"\r +\rwarning: the prompt was cut\n$", terminal.getvalue())
    follow(Progress("job", "denoise", 1, 2))
    shown.close()
    assert re.search(r"denoise: +50%.*1/2.*\n$", terminal.getvalue())


def test_a_stage_of_no_steps_and_one_that_grows(terminal: Terminal) -> None:
    follow = Screen(terminal).follow()
    for step, total in ((0, 1), (1, 2), (2, 2)):
        follow(Progress("job", "load", step, total))
    assert " 2/2 " in terminal.getvalue()
    follow(Progress("job", "encode", 0, 0))
    assert terminal.getvalue().endswith("\n")


def test_a_terminal_that_has_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "FRAME_S", 0.0)
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        follow = Screen(terminal).follow()
        follow(Progress("job", "denoise", 0, 2))
        assert b"denoise" in os.read(reader, 4096)
        os.close(reader)
        for step in (1, 2):
            follow(Progress("job", "denoise", step, 2))
        print("more", file=terminal, flush=True)


def test_a_full_disk_stops_results_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        screen.say("progress", full)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(OutputError, match="^cannot write to standard output: No space left on device$"):
            screen.say("result.png", full)
        screen.say("result.png", full)  # which is dropped now
