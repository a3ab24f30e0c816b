"""The command ``gradwatch``: read about a cause, check a configuration or a model, report on a run.

What this room knows that no other does: what stands on a command line, and what a shell expects back. The
words are those of ``explain`` and ``config``. It loads no torch but to check a model, so that it answers at
once.

Exit status: 0 when all is well, 1 when a check found something or the output cannot be written, 2 when what
was typed or a file is wrong, 130 after Ctrl-C, and 141 when the reader of a pipe is gone. A mistake of the user's is said in a few
lines on stderr, never as a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradwatch import _findings, _formats
from gradwatch._words import SUMMARIES, listed
from gradwatch.errors import CheckError, ConfigError, HistoryError
from gradwatch.explain import did_you_mean, explain, render
from gradwatch.report import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FOUND, _UNWRITABLE, _MISTAKE, _INTERRUPTED, _NO_READER = 1, 1, 2, 130, 141
_EXAMPLES = """\
examples:
  gradwatch explain                      list the causes
  gradwatch explain detached             read about one of them
  gradwatch config configs/strict.yaml   find the mistakes of a file
  gradwatch report runs/one              say what was found in a run, and write it as a web page
  gradwatch check train:factory          run one step of a model, and fail over what gets no gradient
"""
_EXPLAIN_EXAMPLES = """\
examples:
  gradwatch explain                      list the causes, a line each
  gradwatch explain detached             what it means, an example, and what to do instead
  gradwatch explain detached > page.md   the page as Markdown
"""
_CONFIG_EXAMPLES = """\
examples:
  gradwatch config gradwatch.yaml        say "ok", or show every mistake with its line and column
  gradwatch config --schema > gradwatch.schema.json
                                         for editors: completion and checks while typing
"""

_REPORT_EXAMPLES = """\
examples:
  gradwatch report runs/one              print the findings, and write gradwatch.html
  gradwatch report lightning_logs/version_3 --output report.html
  gradwatch report runs/one --output -   print the findings only
"""
_CHECK_EXAMPLES = """\
the factory:
  def factory():                         # in train.py; or return a LightningModule and a batch
      model, (x, y) = Net(), next(iter(loader))
      return model, lambda: cross_entropy(model(x), y)

examples:
  gradwatch check train:factory          print the findings; the status is 1 where there are any
  gradwatch check train:factory --config gradwatch.yaml
                                         with the contract of a file
  gradwatch check train:factory --format sarif > gradwatch.sarif
  gradwatch check train:factory --baseline known.json --update-baseline
                                         from now on fail over new findings only
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status.

    Args:
        argv: The arguments; None takes those of the process.

    Example:
        >>> main(["explain", "detached"])  # doctest: +ELLIPSIS
        # detached
        ...
        0
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding is no reason for a traceback
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:
        # What is still in the buffer would be written, and fail once more, as Python ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _NO_READER
        where = "" if error.filename is None else f"`{error.filename}`: "
        print(f"error[output]: {where}{error.strerror or error}", file=sys.stderr)
        return _UNWRITABLE
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        return run(arguments) or 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _MISTAKE
    except (CheckError, HistoryError) as error:
        name = "check" if isinstance(error, CheckError) else "history"
        print(f"error[{name}]: {error}", file=sys.stderr)
        return _MISTAKE
    except SystemExit as end:  # argparse's way to end after `--help` and after a mistake
        return int(end.code or 0)


# --- what can be typed ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that words mistakes as the rest of GradWatch does."""

    def print_help(self, file: Any = None) -> None:
        """Print the help, and let a failure to write it through, which argparse keeps to itself."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong on stderr, and end with status 2."""
        unknown = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if unknown:
            choices = re.findall(r"\w+", unknown[2])
            guess = did_you_mean(unknown[1], choices)
            hint = f"did you mean `{guess}`?" if guess else f"there are {listed(choices, None)}"
            option = re.match(r"argument (--[\w-]+)", message)
            what = f"value `{unknown[1]}` of {option[1]}" if option else f"command `{unknown[1]}`"
            message = f"unknown {what}: {hint}"
        print(f"error[usage]: {message}", file=sys.stderr)
        print(f"  = help: {self.prog} --help", file=sys.stderr)
        raise SystemExit(_MISTAKE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradwatch",
        description="Tells why parameters of a PyTorch model get no gradient.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version, and end")
    parser.set_defaults(run=lambda arguments: _version_or_help(arguments, parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_explain(commands)
    _add_config(commands)
    _add_report(commands)
    _add_check(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    help: str,  # noqa: A002 -- as argparse calls it
    description: str,
    examples: str,
) -> _Parser:
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "check",
        "run one step of a model, and fail over what gets no gradient",
        "Runs one step of a model that a function of yours makes, and says which parameters\n"
        "get no gradient, why, and where. The status is 1 where something was found.",
        _CHECK_EXAMPLES,
    )
    command.add_argument(
        "target",
        metavar="MODULE:FACTORY",
        help="function that returns (model, closure), where closure() is the loss, or"
        " (LightningModule, batch); seen from the working directory",
    )
    command.add_argument(
        "--config", metavar="FILE", help="YAML file whose watch and contract sections hold"
    )
    command.add_argument(
        "--format",
        choices=["text", "json", "sarif", "github"],
        default="text",
        help="how findings are printed (default: text)",
    )
    command.add_argument(
        "--baseline", metavar="FILE", help="file of known findings, over which nothing fails"
    )
    command.add_argument(
        "--update-baseline", action="store_true", help="write what is found into the baseline"
    )
    command.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    baseline, updates = arguments.baseline, arguments.update_baseline
    if updates and baseline is None:
        raise ConfigError("error[usage]: `--update-baseline` takes a `--baseline FILE` to write")
    # A file that is there and no baseline is somebody's: it is not written over.
    wanted = baseline is not None and not (updates and not Path(baseline).exists())
    known = _findings.read_baseline(baseline) if wanted else frozenset()
    config = importlib.import_module("gradwatch.config").load_config(arguments.config)
    from gradwatch._check import check  # noqa: PLC0415 -- torch, seconds of imports

    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of a report
        report, made_at = check(arguments.target, config)
    findings = _findings.findings_of(report)
    if updates:
        _findings.write_baseline(baseline, findings)
        print(f"{baseline}: {_formats.counted(len(findings), 'finding')}")
        return 0
    new, gone = _findings.compared(findings, known)
    if arguments.format == "json":
        print(_formats.json_of(arguments.target, report, findings, new))
    elif arguments.format == "sarif":
        version = importlib.import_module("gradwatch").__version__
        print(_formats.sarif_of(arguments.target, version, new, made_at))
    elif arguments.format == "github" and new:
        print(_formats.github_of(new, made_at))
    elif arguments.format == "text":
        for finding in new:
            print(_painted(finding.rendered), end="\n\n")
    # A stream that the shell has closed is None, which `print` takes for stdout.
    aside = sys.stderr or io.StringIO()
    is_data = arguments.format in {"json", "sarif"}
    print(_formats.closing(report, findings, new, gone), file=aside if is_data else sys.stdout)
    return _FOUND if any(finding.fails for finding in new) else 0


def _painted(text: str) -> str:
    return str(importlib.import_module("gradwatch.sinks.console").painted(text, sys.stdout))


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "report",
        "say what was found in a run, and write it as a web page",
        "Prints the findings of a run, and writes findings and map into one HTML file.",
        _REPORT_EXAMPLES,
    )
    command.add_argument("log_dir", metavar="LOG_DIR", help="folder of the run's event file")
    command.add_argument(
        "--output",
        metavar="FILE",
        default="gradwatch.html",
        help="the file to write, - for none (default: gradwatch.html)",
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    # NumPy and tensorboard, a second of imports that no other command needs.
    history = importlib.import_module("gradwatch.history")
    page = importlib.import_module("gradwatch._page")
    known = history.read_history(arguments.log_dir)
    holding = [d for d in known.report.diagnoses if d.healed_at is None]
    for diagnosis in holding:
        print(render(diagnosis, known.names), end="\n\n")
    for alert in known.report.alerts:
        print(render(alert, known.names), end="\n\n")
    if not (len(known.batches) or holding or known.report.alerts):
        print("nothing is known of this run yet: no logged step of it was written")
    elif not (holding or known.report.alerts):
        print(f"no problem found in {len(known.names)} parameters")
    if arguments.output != "-":
        title = Path(arguments.log_dir).resolve().name
        Path(arguments.output).write_text(page.html_of(known, title), "utf-8")
        print(
            f"{len(known.batches)} logged steps of {len(known.names)} parameters: {arguments.output}"
        )
    print(importlib.import_module("gradwatch.sinks").links(arguments.log_dir))


def _add_explain(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "explain",
        "read about a cause, or list them all",
        "Shows what a cause means, an example of it, and what to do instead.",
        _EXPLAIN_EXAMPLES,
    )
    command.add_argument(
        "cause", nargs="?", metavar="CAUSE", help="name of a cause; without one, all are listed"
    )
    command.set_defaults(run=_explain)


def _add_config(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _command(
        commands,
        "config",
        "check a configuration file",
        "Shows every mistake of a configuration file, with its line and column.",
        _CONFIG_EXAMPLES,
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("file", nargs="?", metavar="FILE", help="YAML file to check")
    what.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of configuration files"
    )
    command.set_defaults(run=_config)


# --- what then happens ---------------------------------------------------------------------------------


def _version_or_help(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.version:
        print(f"gradwatch {importlib.import_module('gradwatch').__version__}")
    else:
        parser.print_help()


def _explain(arguments: argparse.Namespace) -> None:
    if arguments.cause is None:
        _list_causes()
        return
    # Also as it stands in a finding: `warning[detached]`.
    word = re.sub(r"^\w*\[(.*)\]$", r"\1", arguments.cause.strip()).lower().replace("-", "_")
    try:
        page = explain(word)
    except ConfigError as error:
        raise ConfigError(f"error[usage]: {_rule_named(word) or error}") from None
    if _is_terminal():
        _show(_rich("markdown").Markdown(page))
    else:
        print(page, end="")


def _rule_named(word: str) -> str | None:
    """Say what a rule's name is, which stands in findings as a cause's does."""
    if word in {rule.name for rule in importlib.import_module("gradwatch.config").Config().rules}:
        return f"`{word}` is a rule: it says for how long, and the finding printed with it names the cause"
    return None


def _list_causes() -> None:
    if _is_terminal():
        table = _rich("table").Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        for cause in Cause:
            table.add_row(cause, _rich("text").Text(SUMMARIES[cause]))
        _show(table)
    else:
        width = max(map(len, Cause))
        for cause in Cause:
            print(f"{cause:{width}}  {SUMMARIES[cause]}")


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _rich(room: str) -> Any:
    """Return a module of rich: only a terminal needs it, and it takes long to load."""
    return importlib.import_module(f"rich.{room}")


def _show(renderable: object) -> None:
    """Print on the terminal, as wide as it is, and in the colours that it wants."""
    _rich("console").Console().print(renderable)


def _config(arguments: argparse.Namespace) -> None:
    if arguments.file is None and not arguments.schema:
        raise ConfigError("error[usage]: `gradwatch config` takes a FILE, or `--schema`")
    # Loaded here, since pydantic takes longer than all that `explain` needs.
    config = importlib.import_module("gradwatch.config")
    if arguments.schema:
        dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        print(json.dumps(dialect | config.Config.model_json_schema(), indent=2))
    else:
        config.load_config(Path(arguments.file) if arguments.file else "")
        print(f"{arguments.file}: ok")
