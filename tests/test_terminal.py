"""Text on a terminal: no control character of a file gets there; messages stay out of the progress bar."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from bert_fast._progress import ProgressBar
from bert_fast._terminal import SafeStream, data_stream, printable, safe_streams

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "8-bit CSI": "\x9b31mred",
    "title": "\x1b]0;title\x07",
    "8-bit OSC": "\x9d52;c;aGk=\x9c",
    "clipboard": "\x1b]52;c;aGk=\x1b\\",
    "carriage return": "bad\rgood",
    "backspace": "ab\x08c",
    "bell": "\a",
    "delete": "a\x7f",
    "override": "\u202etxt.exe",
    "isolate": "\u2066a\u2069",
    "marks": "\u200e\u200f\u061c",
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "null": "a\x00b",
    "byte order mark": "\ufeffa",
    "surrogate": "\udce9",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_written_as_escapes(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() for character in shown)
    # The escapes are JSON's: the text can be read back from the data that a terminal shows.
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_ordinary_text_stays() -> None:
    text = "naïve 好 👩\u200d🔬 العربية\ttab\nline C:\\path"
    assert printable(text) == text
    assert printable("a\nb\tc", lines=False) == "a\\nb\\tc"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_streams(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = kind(), kind()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with safe_streams():
        print("\x1b[31m")
        print("\x9b", file=sys.stderr)
        data_stream().write("\x85\n")
        sys.stdout.writelines(["a\n", "\r\n"])
    assert (sys.stdout, sys.stderr) == (out, err)
    data = "\\u0085" if kind is Terminal else "\x85"
    assert out.getvalue() == f"\\u001b[31m\n{data}\na\n\\u000d\n"
    assert err.getvalue() == "\\u009b\n"


class Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_messages_that_nobody_reads_are_lost_and_data_is_not() -> None:
    for error in (BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")):
        SafeStream(Broken(error), is_message=True).write("a")
        with pytest.raises(OSError, match=r"Broken pipe|stdout can't be written: No space left"):
            SafeStream(Broken(error), is_message=False).write("a")


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    buffer = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(buffer, encoding="ascii"), is_message=False)
    stream.write("a好\n")
    stream.flush()
    assert buffer.getvalue() == b"a\\u597d\n"


def test_messages_are_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with safe_streams(), ProgressBar(5, shown=True, unit="step") as bar:
        bar.update(2)
        print("a warning\x1b[31m", file=sys.stderr)
        print("and", "another", file=sys.stderr)
        bar.update(3)
    written = terminal.getvalue()
    # A message begins at the start of a line that the bar has been cleared from, and ends it.
    for message in ("a warning\\u001b[31m", "and another"):
        before, _, after = written.partition(message)
        assert before.endswith("\r")
        assert before[:-1].rpartition("\r")[2].strip() == ""
        assert after.startswith("\n")
    assert "5/5" in written.rpartition("\r")[2]
    with safe_streams():
        print("later", file=sys.stderr)
    assert terminal.getvalue().endswith("later\n")


def test_a_bar_outside_the_command_line_changes_no_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(2, shown=True, unit="step") as bar:
        bar.update()
        print("message", file=sys.stderr)
    assert "message\n" in capsys.readouterr().err
