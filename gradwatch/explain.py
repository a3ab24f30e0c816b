"""Every word a user reads: facts come in as values, and only here they become sentences.

Plain text is the form; the console sink adds colour, and nothing is ever wrapped. What is shown of the
user's own text (names, paths, source) is cleaned of control characters, and wide characters count twice,
so that carets stand under exactly what they mean. Joined emoji may still be off: terminals disagree.

Standard library alone, so that reading reports needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import get_close_matches
from importlib import resources
from typing import TYPE_CHECKING

from gradwatch import _snippet, _words
from gradwatch._words import printable
from gradwatch.errors import ConfigError
from gradwatch.report import Action, Alert, Cause, Diagnosis, Report, Severity, Site, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SHOWN_ROWS = 50
_WRITES_DATA = re.compile(r"\.data(\[[^\]]*\])?\s*(\.\w+_\(|[-+*/@|&^]?=(?!=))")
"""A line that writes through `.data`, by an assignment or by a method that works in place."""
SEVERITIES = {
    Action.LOG: Severity.NOTE,
    Action.WARN: Severity.WARNING,
    Action.STOP: Severity.WARNING,
    Action.ABORT: Severity.ERROR,
}
"""How much an alert matters, by what its rule does."""

_CONSEQUENCES = {
    Action.STOP: "training ends after this step",
    Action.ABORT: "training ends before the optimizer writes",
}


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that ``word`` was probably meant to be.

    Args:
        word: What was written.
        choices: The words that would have been right.

    Returns:
        The nearest choice, or None where none is near enough (``difflib``'s cutoff of 0.6).

    Example:
        >>> did_you_mean("threshhold", ["threshold", "action"])
        'threshold'
    """
    return next(iter(get_close_matches(word, list(choices), n=1, cutoff=0.6)), None)


def fold(parameters: Iterable[str], all_names: Iterable[str]) -> tuple[str, ...]:
    """Return ``parameters`` with whole modules folded into one name each.

    A module is folded when every parameter under it is there, the largest such module first. One with a
    single parameter stays that parameter, and the model as a whole is never folded.

    Args:
        parameters: Parameter names.
        all_names: The names of all parameters of the model; empty to fold nothing.

    Returns:
        The names, each once, in the order in which they came.

    Example:
        >>> fold(["enc.a.w", "enc.b.w", "head.w"], ["enc.a.w", "enc.b.w", "head.w", "head.b"])
        ('enc.*', 'head.w')
    """
    chosen = dict.fromkeys(parameters)
    there = Counter(prefix for name in dict.fromkeys(all_names) for prefix in _prefixes(name))
    here = Counter(prefix for name in chosen for prefix in _prefixes(name))
    whole = {prefix for prefix, count in there.items() if 1 < count == here[prefix]}
    folded = (
        next((f"{prefix}.*" for prefix in _prefixes(name) if prefix in whole), name)
        for name in chosen
    )
    return tuple(dict.fromkeys(folded))


def render(subject: Diagnosis | Alert | Report, all_names: Iterable[str] = ()) -> str:
    """Return a diagnosis, an alert, or a whole report as plain text in the form of compiler messages.

    Args:
        subject: What to show.
        all_names: The names of all parameters of the model, to fold whole modules into one name. For a
            report they default to the names it knows.

    Returns:
        Lines without a newline at the end; empty for a report without diagnoses and alerts.

    Example:
        >>> print(render(Alert("exploding", Action.WARN, ("x",), 1.3e4, 100.0, 3, 1200)))
        warning[exploding]: grad norm of `x` is 1.3e+04, above 1.0e+02
           = note: fired in step 1200, the last of 3 in a row
    """
    if isinstance(subject, Diagnosis):
        return _render_diagnosis(subject, all_names)
    if isinstance(subject, Alert):
        return _render_alert(subject, all_names)
    names = tuple(all_names) or tuple(subject.statuses)
    entries: list[Diagnosis | Alert] = [*subject.diagnoses, *subject.alerts]
    return "\n\n".join(render(entry, names) for entry in entries)


def fact(subject: Diagnosis | Alert, all_names: Iterable[str] = ()) -> str:
    """Return the one sentence that a diagnosis or an alert begins with.

    Args:
        subject: What to tell.
        all_names: As for ``render``.

    Example:
        >>> print(fact(Diagnosis(Severity.WARNING, Cause.UNUSED, Status.MISSING, ("w",))))
        `w` gets no gradient
    """
    names = fold(subject.parameters, all_names)
    if isinstance(subject, Alert):
        return _alert_fact(subject, names)
    return f"{_words.listed(names)} {_fact(subject, names)}"


def label(diagnosis: Diagnosis) -> str:
    """Return what is said under the carets; empty for causes without a line of their own.

    Args:
        diagnosis: What to tell.

    Example:
        >>> label(Diagnosis(Severity.WARNING, Cause.NO_GRAD, Status.MISSING, ("w",)))
        'runs with gradient mode off'
    """
    word = _word(diagnosis.operation)
    own = _words.LABELS_BY_OPERATION.get((diagnosis.cause, word))
    text = own or _words.LABELS.get(diagnosis.cause, "")
    sign = _words.SIGNS.get(word)
    if sign and not (diagnosis.site and re.search(rf"\b{word}\b", diagnosis.site.source or "")):
        return text.format(word=sign)
    return text.format(word=f"`{word}`" if word else "this")


def healed(diagnosis: Diagnosis, all_names: Iterable[str] = ()) -> str:
    """Return the one line that says that a diagnosis no longer holds.

    Args:
        diagnosis: One whose ``healed_at`` is set.
        all_names: As for ``render``.

    Example:
        >>> print(
        ...     healed(Diagnosis(Severity.NOTE, Cause.UNUSED, Status.MISSING, ("w",), healed_at=12))
        ... )
        note[unused]: `w` gets a gradient since step 12
    """
    names = fold(diagnosis.parameters, all_names)
    forms = _words.SINCE.get(diagnosis.status, _words.TRAINS)
    if diagnosis.cause is Cause.NOT_IN_OPTIMIZER:
        forms = ("is in an optimizer", "are in an optimizer")
    elif _words.FROZEN_SINCE in diagnosis.notes:
        forms = _words.VERBS[Status.FROZEN][:2]
    verb = forms[_is_many(names)]
    return (
        f"note[{diagnosis.cause}]: {_words.listed(names)} {verb} since step {diagnosis.healed_at}"
    )


def help_for(
    cause: Cause,
    operation: str | None = None,
    parameters: Sequence[str] = (),
    site: Site | None = None,
    all_names: Iterable[str] = (),
) -> str | None:
    """Return one concrete change that would end the cause.

    Args:
        cause: Why the parameters have the status they have.
        operation: Public name of the operation at the site, such as ``torch.Tensor.detach``.
        parameters: The parameters it is about.
        site: Where it happens, or None where no line of the user's is known.
        all_names: All parameter names of the model, by which whole modules are recognised.

    Returns:
        One line, or None where nothing sure can be said.

    Example:
        >>> help_for(Cause.DETACHED, "torch.Tensor.detach", ["a.weight", "a.bias"])
        'remove `.detach()` to train them, or freeze `a` with `requires_grad_(False)`'
    """
    template = _words.HELPS_BY_OPERATION.get((cause, _word(operation))) or _words.HELPS.get(cause)
    call = _call(operation) or ("this call" if site else "the call")
    is_sign = _word(operation) == "bool"  # which `if` and `while` call
    if cause in _words.HELPS_OUT_OF_SIGHT and not (is_sign or _shows(site, _word(operation))):
        template, call = _words.HELPS_OUT_OF_SIGHT[cause], "this call"
    if cause is Cause.DETACHED and site and _WRITES_DATA.search(site.source or ""):
        template = _words.WRITTEN_THROUGH_DATA
    if template is None:
        return None
    it = "it" if len(parameters) == 1 else "them"
    owner = _owner(fold(parameters, all_names))
    return template.format(
        it=it,
        owner=owner or it,
        freeze=f"freeze {owner or it} with `requires_grad_(False)`",
        call=call,
    )


def _shows(site: Site | None, word: str) -> bool:
    """Tell whether the user's expression names an operation, as far as it is one line that is known."""
    place = site.caller if site and site.caller else site
    if place is None or not place.source or place.end_line not in {None, place.line}:
        return True
    return word.strip("_") in place.source


def explain(cause: Cause | str) -> str:
    """Return the page about a cause: what it means, an example, and what to do instead.

    Args:
        cause: A cause or its name.

    Returns:
        Markdown; one sentence where the page is not installed.

    Raises:
        ConfigError: There is no cause of that name. It is a ``ValueError`` too.

    Example:
        >>> "detach" in explain("detached")
        True
    """
    if cause not in set(Cause):
        names = ", ".join(f"`{known}`" for known in sorted(Cause))
        guess = did_you_mean(cause, Cause)
        hint = f"did you mean `{guess}`?" if guess else f"the causes are {names}"
        raise ConfigError(f"unknown cause `{printable(cause)}`: {hint}")
    name = Cause(cause)
    page = resources.files("gradwatch") / "causes" / f"{name}.md"
    if page.is_file():
        return page.read_text(encoding="utf-8")
    return f"{name}: {_words.SUMMARIES[name]}\n"


def summary_line(report: Report) -> str:
    """Return the state of all parameters of a report in one line, the worst first.

    Args:
        report: Any report.

    Example:
        >>> summary_line(Report(step=0, statuses={"a": Status.MISSING, "b": Status.OK}))
        '1 parameter gets no gradient, 1 trains'
    """
    return _count(report.statuses)


def markdown(
    diagnoses: Sequence[Diagnosis],
    statuses: Mapping[str, Status],
    step: int,
    alerts: Sequence[Alert] = (),
) -> str:
    """Return a page for dashboards that show markdown, newest findings first.

    Names are written so that no markdown or HTML in them takes effect. Words only: no colour, no symbols.

    Args:
        diagnoses: What was diagnosed; at most 50 are shown.
        statuses: The status of every known parameter.
        step: The step as of which this holds.
        alerts: What rules fired; at most 50 are shown.

    Example:
        >>> print(markdown([], {"w": Status.OK}, 7))
        ## GradWatch, step 7
        <BLANKLINE>
        **1 parameter trains**
        <BLANKLINE>
        No problem found.
    """
    parts = [f"## GradWatch, step {step}", f"**{_count(statuses)}**"]
    newest = sorted(
        diagnoses, key=lambda entry: (entry.healed_at is None, entry.step), reverse=True
    )
    shown = newest[:_SHOWN_ROWS]
    if shown:
        parts.append(f"### Findings ({len(newest)})")
        parts.append(_finding_table(shown, statuses))
    if alerts:
        parts.append(f"### Alerts ({len(alerts)})")
        parts.append(_alert_table(sorted(alerts, key=lambda entry: -entry.step), statuses))
    parts.extend(_fenced(render(entry, statuses)) for entry in shown)
    if not (shown or alerts):
        parts.append("No problem found.")
    if len(newest) > len(shown):
        parts.append(f"{len(newest) - len(shown)} more findings are not shown.")
    return "\n\n".join(parts)


# --- diagnoses and alerts ------------------------------------------------------------------------------


def _render_diagnosis(diagnosis: Diagnosis, all_names: Iterable[str]) -> str:
    heading = f"{diagnosis.severity}[{diagnosis.cause}]: {fact(diagnosis, all_names)}"
    site = diagnosis.site
    # The user's own line is the one to look at; what a library does inside it is evidence.
    place = site.caller if site and site.caller else site
    notes = list(diagnosis.notes)
    lines, width = [heading], 2
    if place:
        width = len(str(place.line))
        module = place.module or (site.module if site else None)
        lines.append(f"{' ' * width}--> {_snippet.location(place, module)}")
        shown = _snippet.snippet(place, label(diagnosis), width)
        lines += shown
        if not shown and label(diagnosis):
            notes.insert(0, label(diagnosis))
    if site and site is not place:
        notes.insert(0, _snippet.inside(site))
    bullets = [f"note: {note}" for note in notes]
    if diagnosis.help:
        bullets.append(f"help: {diagnosis.help}")
    bullets.append(f"more: gradwatch explain {diagnosis.cause}")
    return "\n".join([*lines, *_bullets(bullets, width)])


def _render_alert(alert: Alert, all_names: Iterable[str]) -> str:
    names = fold(alert.parameters, all_names)
    severity = SEVERITIES[alert.action]
    fired = f"fired in step {alert.step}"
    run = f"{fired}, the last of {alert.steps} in a row" if alert.steps > 1 else fired
    bullets = [f"note: {run}"]
    if alert.action in _CONSEQUENCES:
        bullets.append(f"note: {_CONSEQUENCES[alert.action]}")
    heading = f"{severity}[{printable(alert.rule)}]: {_alert_fact(alert, names)}"
    return "\n".join([heading, *_bullets(bullets, 2)])


def _fact(diagnosis: Diagnosis, names: Sequence[str]) -> str:
    many = _is_many(names)
    if diagnosis.cause is Cause.NOT_IN_OPTIMIZER:
        return _words.IN_NO_OPTIMIZER[many]
    if _words.NO_BACKWARD in diagnosis.notes:
        return f"{_words.VERBS[diagnosis.status][many]}, as {_words.NO_BACKWARD}"
    if diagnosis.cause is Cause.UNDETERMINED:
        return f"{_words.VERBS[diagnosis.status][many]}, and the cause was not found"
    return _words.VERBS[diagnosis.status][many]


def _alert_fact(alert: Alert, names: Sequence[str]) -> str:
    if alert.message:
        return printable(alert.message)
    if alert.status is not None:
        run = f"for {alert.steps} steps in a row" if alert.steps > 1 else f"in step {alert.step}"
        return f"{_words.listed(names)} {_words.VERBS[alert.status][2]} {run}"
    if alert.value is None or alert.limit is None:
        return f"the rule fired for {_words.listed(names)}"
    below = alert.value < alert.limit
    norm = f"grad norm of {_words.listed(names)}" if names else "total grad norm"
    # One value stands for all of them: it is the worst.
    verb = ("is down to" if below else "is up to") if _is_many(names) else "is"
    return f"{norm} {verb} {alert.value:.1e}, {'below' if below else 'above'} {alert.limit:.1e}"


def _bullets(bullets: Iterable[str], width: int) -> list[str]:
    margin = " " * (width + 1)
    return [f"{margin}= {bullet}".replace("\n", f"\n{margin}  ") for bullet in map(_lines, bullets)]


# --- names and numbers ---------------------------------------------------------------------------------


def _prefixes(name: str) -> list[str]:
    """Return the modules that a parameter is in, the largest first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _is_many(names: Sequence[str]) -> bool:
    return len(names) != 1 or names[0].endswith(".*")


def _count(statuses: Mapping[str, Status]) -> str:
    counts = Counter(statuses.values())
    parts: list[str] = []
    for status in sorted(counts, key=lambda entry: -entry.code):
        many = counts[status] != 1
        verb = _words.TRAINS[many] if status is Status.OK else _words.VERBS[status][many]
        # "is frozen" and "are frozen" go without their verb behind the first part.
        verb = verb.removeprefix("is ").removeprefix("are ") if parts else verb
        noun = "" if parts else (" parameters" if many else " parameter")
        parts.append(f"{counts[status]}{noun} {verb}")
    return ", ".join(parts) or "no parameters"


def _owner(parameters: Sequence[str]) -> str | None:
    """Return the one thing that holds all the parameters, as code, or None where there is none."""
    if len(parameters) == 1:
        return f"`{printable(parameters[0].removesuffix('.*'))}`"
    modules = {name.rpartition(".")[0] for name in parameters}
    module = modules.pop() if len(modules) == 1 else ""
    return f"`{printable(module)}`" if module else None


def _word(operation: str | None) -> str:
    last = (operation or "").removesuffix(".__get__").rpartition(".")[2]
    return last.strip("_") if last.startswith("__") else last


def _call(operation: str | None) -> str:
    word = _word(operation)
    if not operation or not word:
        return ""
    if word == "data":
        return "`.data`"
    if operation.rpartition(".")[2].startswith("__"):
        return f"`{word}`"
    if operation.startswith("torch.Tensor."):
        return f"`.{word}()`"
    return f"`{word}`"


# --- places and source ---------------------------------------------------------------------------------


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())


# --- markdown ------------------------------------------------------------------------------------------


def _finding_table(diagnoses: Sequence[Diagnosis], statuses: Mapping[str, Status]) -> str:
    rows = ["| Severity | Cause | Parameters | Place | Since |", "|---|---|---|---|---|"]
    for entry in diagnoses:
        site = entry.site
        place = site.caller if site and site.caller else site
        since = f"step {entry.step}"
        if entry.healed_at is not None:
            since += f", healed at step {entry.healed_at}"
        where = _snippet.location(place, None) if place else "not one line"
        names = _words.listed(fold(entry.parameters, statuses))
        cells = (entry.severity, entry.cause, names, where, since)
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(rows)


def _alert_table(alerts: Sequence[Alert], statuses: Mapping[str, Status]) -> str:
    rows = ["| Severity | Rule | What | Step |", "|---|---|---|---|"]
    for entry in alerts[:_SHOWN_ROWS]:
        fact = _alert_fact(entry, fold(entry.parameters, statuses))
        cells = (SEVERITIES[entry.action], entry.rule, fact, str(entry.step))
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    # Entities are left alone by markdown and shown as the character itself.
    return "".join(
        char if char.isalnum() or char in " .,:/-()" or not char.isascii() else f"&#{ord(char)};"
        for char in printable(text.replace("`", ""))
    )


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
