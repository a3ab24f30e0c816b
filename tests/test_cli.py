"""The command line as a shell sees it: what is printed where, and which status comes back."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradwatch
from gradwatch import explain
from gradwatch.cli import main
from gradwatch.report import Cause

COMMAND = [sys.executable, "-m", "gradwatch"]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment without what would change colours or widths, but for ``changes``."""
    ours = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONIOENCODING"}
    return {name: value for name, value in os.environ.items() if name not in ours} | changes


def shell(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with its output in pipes."""
    return subprocess.run(  # noqa: S603
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=environment(**changes),
        check=False,
        timeout=60,
    )


def terminal(*arguments: str, width: int = 80, **changes: str) -> str:
    """Return what the command prints on a terminal."""
    ours, theirs = pty.openpty()
    changes = {"TERM": "xterm-256color", "COLUMNS": str(width), **changes}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=theirs, env=environment(**changes))  # noqa: S603
    os.close(theirs)
    printed = b""
    while chunk := _read(ours):
        printed += chunk
    os.close(ours)

    assert process.wait(timeout=60) == 0
    return printed.decode().replace("\r\n", "\n")


def words(text: str) -> set[str]:
    """Return the longer words of a text, but for the languages of code blocks."""
    return set(re.findall(r"\b[a-z]{6,12}\b", text)) - {"python"}


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its status, what it printed, and its errors."""
    status = main(arguments)
    return status, *capsys.readouterr()


# --- gradwatch -----------------------------------------------------------------------------------------


def test_nothing_to_do_shows_the_help(capsys) -> None:
    """Without arguments the command says what it can do, with examples."""
    status, out, err = said(capsys)

    assert (status, err) == (0, "")
    assert "usage: gradwatch" in out
    assert "gradwatch explain detached" in out


@pytest.mark.parametrize("command", ["explain", "config", "report", "check"])
def test_help_of_commands(capsys, command: str) -> None:
    """The help of each command shows examples of it."""
    status, out, err = said(capsys, command, "--help")

    assert (status, err) == (0, "")
    assert f"usage: gradwatch {command}" in out
    assert re.search(rf"examples:\n  gradwatch {command} ", out)


def test_version(capsys) -> None:
    """``--version`` prints the name and the version of the package."""
    assert said(capsys, "--version") == (0, f"gradwatch {gradwatch.__version__}\n", "")


def test_unknown_command(capsys) -> None:
    """A misspelt command gets a suggestion on stderr, and status 2."""
    status, out, err = said(capsys, "explian")

    assert (status, out) == (2, "")
    assert err.startswith("error[usage]: unknown command `explian`: did you mean `explain`?\n")


def test_unknown_command_without_a_neighbour(capsys) -> None:
    """A command that is like none lists those that there are."""
    assert "there are `explain`, `config`, `report`, and `check`" in said(capsys, "zzz")[2]


def test_unknown_option(capsys) -> None:
    """An unknown option is said in our form, with the way to the help."""
    status, out, err = said(capsys, "--nope")

    assert (status, out) == (2, "")
    assert err == ("error[usage]: unrecognized arguments: --nope\n  = help: gradwatch --help\n")


def test_process() -> None:
    """``python -m gradwatch`` hands the status to the shell, and prints no traceback."""
    done = shell("explain", "nothing")

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_script() -> None:
    """The installed command is the same program."""
    script = Path(sys.executable).with_name("gradwatch")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout == f"gradwatch {gradwatch.__version__}\n"


# --- gradwatch explain ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", Cause)
def test_explain(capsys, cause: Cause) -> None:
    """Off a terminal the page of a cause is printed as it is written."""
    assert said(capsys, "explain", cause) == (0, explain.explain(cause), "")


@pytest.mark.parametrize(
    "spelling",
    ["not_in_loss", "not-in-loss", "Not_In_Loss", " not_in_loss ", "warning[not_in_loss]"],
)
def test_explain_spellings(capsys, spelling: str) -> None:
    """Case and hyphens do not matter in the name of a cause, nor what stands around it in a finding."""
    assert said(capsys, "explain", spelling)[1].startswith("# not_in_loss\n")


def test_explain_lists(capsys) -> None:
    """Without a name every cause is listed, a line each, with a sentence."""
    status, out, err = said(capsys, "explain")
    lines = out.splitlines()

    assert (status, err) == (0, "")
    assert [line.split()[0] for line in lines] == list(Cause)
    assert all(re.fullmatch(r"\w+  +[A-Z`].*\.", line) for line in lines)


def test_explain_a_rule(capsys) -> None:
    """The name of a rule is told apart from that of a cause."""
    assert main(["explain", "disconnected"]) == 2
    assert capsys.readouterr().err == (
        "error[usage]: `disconnected` is a rule: it says for how long, and the finding printed with it names "
        "the cause\n"
    )


def test_explain_unknown(capsys) -> None:
    """A misspelt cause gets a suggestion on stderr, and status 2."""
    assert said(capsys, "explain", "detatched") == (
        2,
        "",
        "error[usage]: unknown cause `detatched`: did you mean `detached`?\n",
    )


def test_explain_unknown_without_a_neighbour(capsys) -> None:
    """A name that is like none lists all causes."""
    status, out, err = said(capsys, "explain", "xyz")

    assert (status, out) == (2, "")
    assert all(f"`{cause}`" in err for cause in Cause)


def test_explain_on_a_terminal() -> None:
    """On a terminal the page is laid out and coloured, without the marks of Markdown."""
    shown = terminal("explain", "detached")

    assert "\x1b[" in shown
    assert "What it means" in shown
    assert "## " not in shown
    assert "```" not in shown


@pytest.mark.parametrize("arguments", [("explain",), ("explain", "detached")])
def test_explain_loses_no_word(capsys, monkeypatch, arguments: tuple[str, ...]) -> None:
    """What is laid out for a terminal has every word that goes into a pipe."""
    plain = said(capsys, *arguments)[1]
    monkeypatch.setattr("gradwatch.cli._is_terminal", lambda: True)
    shown = said(capsys, *arguments)[1]

    assert shown != plain
    assert words(plain) <= words(shown)


def test_explain_without_colour() -> None:
    """``NO_COLOR`` leaves no colour on the terminal."""
    codes = re.findall(r"\x1b\[([\d;]*)m", terminal("explain", "detached", NO_COLOR="1"))

    assert not {code for entry in codes for code in entry.split(";") if len(code) > 1}


@pytest.mark.parametrize("arguments", [("explain",), ("explain", "left_torch")])
def test_explain_on_a_narrow_terminal(arguments: tuple[str, ...]) -> None:
    """A narrow terminal gets lines that fit into it."""
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal(*arguments, width=40))

    assert max(map(len, shown.splitlines())) <= 40


def test_explain_needs_no_torch() -> None:
    """Reading a page loads neither torch nor anything else that takes long."""
    code = (
        "import sys; from gradwatch.cli import main; main(['explain', 'unused']);"
        "print([name for name in ('torch', 'pydantic', 'rich', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout.splitlines()[-1] == "[]"


# --- gradwatch config ----------------------------------------------------------------------------------


def test_config(capsys) -> None:
    """A file without mistakes is said to be ok."""
    Path("ok.yaml").write_text("trace: never\n")

    assert said(capsys, "config", "ok.yaml") == (0, "ok.yaml: ok\n", "")


def test_config_mistakes(capsys) -> None:
    """Every mistake of a file is shown on stderr, with its place, and the status is 2."""
    Path("bad.yaml").write_text("trace: sometimes\nlogs: {}\n")
    status, out, err = said(capsys, "config", "bad.yaml")

    assert (status, out) == (2, "")
    assert "bad.yaml:1:8" in err
    assert "bad.yaml:2:1" in err
    assert "did you mean `log`?" in err


@pytest.mark.parametrize("name", ["missing.yaml", ".", "", "{trace: never}"])
def test_config_without_a_file(capsys, name: str) -> None:
    """What is no file is said so, also where it looks like YAML."""
    status, out, err = said(capsys, "config", name)

    assert (status, out) == (2, "")
    assert err.startswith("error[config]: ")


def test_config_of_nothing(capsys) -> None:
    """Without a file and without ``--schema`` the command says what it takes."""
    status, out, err = said(capsys, "config")

    assert (status, out) == (2, "")
    assert err == "error[usage]: `gradwatch config` takes a FILE, or `--schema`\n"


def test_config_of_both(capsys) -> None:
    """A file together with ``--schema`` is a mistake."""
    assert said(capsys, "config", "a.yaml", "--schema")[0] == 2


def test_config_schema(capsys) -> None:
    """``--schema`` prints a JSON Schema with every section, each described, and no other allowed."""
    status, out, err = said(capsys, "config", "--schema")
    schema = json.loads(out)

    assert (status, err) == (0, "")
    assert set(schema["properties"]) == set(gradwatch.Config.model_fields)
    assert all(entry.keys() & {"description", "$ref"} for entry in schema["properties"].values())
    assert schema["additionalProperties"] is False


# --- what a shell does to it ---------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("explain", "detached"), ("config", "--schema"), ()])
def test_closed_pipe(arguments: tuple[str, ...]) -> None:
    """When the reader of a pipe is gone, the command ends at once and without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(  # noqa: S603
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs Linux's device that is always full"
)
def test_full_disk() -> None:
    """Output that cannot be written is said in one line, with status 1."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(  # noqa: S603
            [*COMMAND, "explain"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert done.returncode == 1
    assert done.stderr == "error[output]: No space left on device\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_output_that_fails(capsys, monkeypatch, error: OSError) -> None:
    """An output that fails ends the command with a status of its own, and never with a traceback."""
    monkeypatch.setattr("builtins.print", _raising(error, print))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    status, out, err = said(capsys, "explain")

    assert out == ""
    assert (status, err) in [(141, ""), (1, "error[output]: No space left on device\n")]


def _raising(error: BaseException, real):
    """Return a ``print`` that fails on stdout, and works on stderr."""

    def print_(*args: object, file: object = None, **kwargs: object) -> None:
        if file is None:
            raise error
        real(*args, file=file, **kwargs)

    return print_


def test_interrupt(capsys, monkeypatch) -> None:
    """Ctrl-C ends the command with the usual status, and without a traceback."""
    monkeypatch.setattr("builtins.print", _raising(KeyboardInterrupt(), print))

    assert said(capsys, "explain") == (130, "", "")


def test_narrow_encoding() -> None:
    """A terminal whose encoding lacks a character gets a question mark in its place."""
    Path("b\N{LATIN SMALL LETTER A WITH DIAERESIS}d.yaml").write_text("trace: never\n")
    done = shell(
        "config", "b\N{LATIN SMALL LETTER A WITH DIAERESIS}d.yaml", PYTHONIOENCODING="ascii"
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "b?d.yaml: ok\n", "")


@pytest.mark.parametrize("width", ["1", "20", "1000"])
def test_help_at_any_width(width: str) -> None:
    """The help is printed on terminals of any width."""
    done = shell("--help", COLUMNS=width)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_stream(closed: str) -> None:
    """A stream that the shell has closed is no reason for a traceback."""
    redirection = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    line = f'"{sys.executable}" -m gradwatch explain detached {redirection}'
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)  # noqa: S603

    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_output_elsewhere(monkeypatch, stream: io.StringIO | None) -> None:
    """A program that calls ``main`` may have its output elsewhere, or nowhere."""
    monkeypatch.setattr(sys, "stdout", stream)

    assert main(["explain"]) == 0
    assert stream is None or stream.getvalue().startswith("frozen ")


def test_module() -> None:
    """``python -m gradwatch`` runs ``main``, and ends with its status."""
    command = [sys.executable, "-m", "gradwatch", "explian"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout) == (2, "")
    assert "explain" in done.stderr
