"""Every word a user reads: facts come in as values, and only here they become sentences.

Plain text is the form; the console sink adds colour, and nothing is ever wrapped. What is shown of the
user's own text (names, paths, source) is cleaned of control characters, and wide characters count twice,
so that carets stand under exactly what they mean. Joined emoji may still be off: terminals disagree.

Standard library alone, so that reading reports needs no torch.
"""

from __future__ import annotations

import tokenize
import unicodedata
from collections import Counter
from contextlib import suppress
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import ConfigError
from gradwatch.report import Action, Alert, Cause, Diagnosis, Report, Severity, Site, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SHOWN_NAMES = 3
_SHOWN_ROWS = 50
_SEVERITIES = {
    Action.LOG: Severity.NOTE,
    Action.WARN: Severity.WARNING,
    Action.STOP: Severity.WARNING,
    Action.ABORT: Severity.ERROR,
}
_CONSEQUENCES = {
    Action.STOP: "training ends after this step",
    Action.ABORT: "training ends before the optimizer writes",
}

# Singular and plural of what a status says now, and what it said in the past.
_VERBS = {
    Status.OK: ("gets a gradient", "get a gradient", "got a gradient"),
    Status.FROZEN: ("is frozen", "are frozen", "stayed frozen"),
    Status.UNSEEN: ("cannot be seen", "cannot be seen", "could not be seen"),
    Status.ZERO: ("gets a gradient of zero", "get a gradient of zero", "got a gradient of zero"),
    Status.MISSING: ("gets no gradient", "get no gradient", "got no gradient"),
    Status.NONFINITE: (
        "gets a gradient with NaN or infinity",
        "get a gradient with NaN or infinity",
        "got a gradient with NaN or infinity",
    ),
}
_IN_NO_OPTIMIZER = ("is in no optimizer", "are in no optimizer")
_AGAIN = {
    Status.FROZEN: ("is no longer frozen", "are no longer frozen"),
    Status.ZERO: ("gets a gradient other than zero again", "get gradients other than zero again"),
    Status.MISSING: ("gets a gradient again", "get a gradient again"),
    Status.NONFINITE: ("gets a finite gradient again", "get a finite gradient again"),
}
_TRAINS = ("trains", "train")

_LABELS = {
    Cause.NOT_IN_LOSS: "the result goes nowhere",
    Cause.DETACHED: "the result has no history",
    Cause.NO_GRAD: "runs with gradient mode off",
    Cause.LEFT_TORCH: "the value leaves torch here",
    Cause.NON_DIFFERENTIABLE: "{word} has no derivative",
    Cause.CUSTOM_FUNCTION: "its backward returns no gradient for it",
    Cause.REENTRANT_CHECKPOINT: "no input of the checkpoint requires grad",
    Cause.CLEARED: "the gradient is thrown away here",
    Cause.NOT_REQUESTED: "this call does not ask for it",
    Cause.REPLACED: "another tensor is used here",
    Cause.ZERO_GRADIENT: "the gradient becomes zero here",
    Cause.NONFINITE_GRADIENT: "the gradient becomes NaN or infinite here",
}

_SUMMARIES = {
    Cause.FROZEN: "`requires_grad` is False, so no gradient is computed.",
    Cause.UNUSED: "No operation of the forward pass read the parameter.",
    Cause.NOT_IN_LOSS: "The parameter was used, but nothing computed from it gets to the loss.",
    Cause.DETACHED: "The path from the parameter to the loss is cut by `.detach()` or the like.",
    Cause.NO_GRAD: "An operation on the path to the loss ran with gradient mode off.",
    Cause.LEFT_TORCH: "The value left tensors for Python or NumPy, and came back as a constant.",
    Cause.NON_DIFFERENTIABLE: "An operation without a derivative is on the way to the loss.",
    Cause.CUSTOM_FUNCTION: "The backward of a `torch.autograd.Function` returned None for it.",
    Cause.REENTRANT_CHECKPOINT: "A reentrant checkpoint had no input that requires grad.",
    Cause.CLEARED: "A gradient arrived, and was emptied before the optimizer could use it.",
    Cause.NOT_REQUESTED: "The backward pass was asked for the gradients of other tensors only.",
    Cause.REPLACED: "The forward pass used another tensor than the registered parameter.",
    Cause.NOT_IN_OPTIMIZER: "The parameter is in no parameter group of any optimizer.",
    Cause.ZERO_GRADIENT: "A gradient arrived, and every element of it is 0.",
    Cause.NONFINITE_GRADIENT: "A gradient arrived with NaN or infinity in it.",
    Cause.UNDETERMINED: "No cause could be shown; the notes list what was ruled out.",
}

_SOFT = "use `softmax` of the scores as weights, so that the choice stays in the loss"
_STEP = "use a soft step, such as `sigmoid` of the difference, in place of the comparison"
_FLAT = "use another function there, whose derivative is not zero, or a straight-through estimator"
_DEAD = (
    "use `leaky_relu` or `gelu` in its place, or lower the learning rate: its inputs are negative"
)
_AWAY = "keep the input of {call} away from 0, for example with `clamp(min=1e-8)`"
_HELPS = {
    Cause.FROZEN: "call `requires_grad_(True)` on {owner} to train {it}",
    Cause.UNUSED: "use {owner} in `forward`, or {freeze}",
    Cause.NOT_IN_LOSS: "let the loss depend on this result to train {it}, or {freeze}",
    Cause.DETACHED: "remove {call} to train {it}, or {freeze}",
    Cause.NO_GRAD: "run this with gradient mode on to train {it}, or {freeze}",
    Cause.LEFT_TORCH: "go on with the tensor itself in place of {call}, or {freeze}",
    Cause.NON_DIFFERENTIABLE: "use a differentiable operation in place of {call}, or {freeze}",
    Cause.CUSTOM_FUNCTION: "return a gradient for every input that needs one from its `backward`",
    Cause.REENTRANT_CHECKPOINT: "pass `use_reentrant=False` to `checkpoint`",
    Cause.CLEARED: "clear gradients only after `optimizer.step()` has used them",
    Cause.NOT_REQUESTED: "name {it} in the inputs of this call, or call `backward()` without `inputs`",
    Cause.REPLACED: "compute with the parameter that is registered on the module, not with a copy",
    Cause.NOT_IN_OPTIMIZER: "pass {it} to an optimizer, or {freeze}",
    Cause.ZERO_GRADIENT: "look for a mask, a factor of zero, or a saturated input in this expression",
    Cause.NONFINITE_GRADIENT: "keep the inputs of {call} where its derivative is finite",
}
_HELPS_BY_OPERATION = {
    (
        Cause.DETACHED,
        "Parameter",
    ): "use the computed tensor itself, without `nn.Parameter`, or {freeze}",
    (Cause.DETACHED, "deepcopy"): "use the tensor itself, not a copy of it, or {freeze}",
    (
        Cause.LEFT_TORCH,
        "tensor",
    ): "use `torch.stack` in place of `torch.tensor`, which copies numbers",
    **{
        (Cause.NON_DIFFERENTIABLE, word): text
        for words, text in (
            ("argmax argmin multinomial getitem", _SOFT),
            ("eq ne gt ge lt le", _STEP),
            ("long int bool byte to type", "keep the value in floating point up to the loss"),
        )
        for word in words.split()
    },
    (Cause.NON_DIFFERENTIABLE, "topk"): "use the values that `topk` returns, not only the indices",
    (Cause.NON_DIFFERENTIABLE, "sort"): "use the values that `sort` returns, not only the indices",
    (Cause.NON_DIFFERENTIABLE, "max"): "use the values that `max` returns, not only the indices",
    (
        Cause.NON_DIFFERENTIABLE,
        "sample",
    ): "use `rsample()`, or add `log_prob` of the sample to the loss",
    (Cause.ZERO_GRADIENT, "relu"): _DEAD,
    (
        Cause.ZERO_GRADIENT,
        "clamp",
    ): "widen the bounds of `clamp`: outside them its derivative is zero",
    **{(Cause.ZERO_GRADIENT, word): _FLAT for word in ("round", "floor", "ceil", "sign")},
    **{(Cause.NONFINITE_GRADIENT, word): _AWAY for word in ("sqrt", "log", "norm")},
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


def printable(text: str) -> str:
    r"""Return ``text`` with everything escaped that a terminal or an event file could trip over.

    Args:
        text: A name, a path, or anything else that the user chose.

    Example:
        >>> printable("a\x1b[2Kb")
        'a\\x1b[2Kb'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


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


def healed(diagnosis: Diagnosis, all_names: Iterable[str] = ()) -> str:
    """Return the one line that says that a diagnosis no longer holds.

    Args:
        diagnosis: One whose ``healed_at`` is set.
        all_names: As for ``render``.

    Example:
        >>> print(
        ...     healed(Diagnosis(Severity.NOTE, Cause.UNUSED, Status.MISSING, ("w",), healed_at=12))
        ... )
        note[unused]: `w` gets a gradient again since step 12
    """
    names = fold(diagnosis.parameters, all_names)
    forms = _AGAIN.get(diagnosis.status, _TRAINS)
    if diagnosis.cause is Cause.NOT_IN_OPTIMIZER:
        forms = ("is in an optimizer", "are in an optimizer")
    verb = forms[_is_many(names)]
    return f"note[{diagnosis.cause}]: {_enumerate(names)} {verb} since step {diagnosis.healed_at}"


def help_for(
    cause: Cause,
    operation: str | None = None,
    parameters: Sequence[str] = (),
    site: Site | None = None,
) -> str | None:
    """Return one concrete change that would end the cause.

    Args:
        cause: Why the parameters have the status they have.
        operation: Public name of the operation at the site, such as ``torch.Tensor.detach``.
        parameters: The parameters it is about.
        site: Where it happens, or None where no line of the user's is known.

    Returns:
        One line, or None where nothing sure can be said.

    Example:
        >>> help_for(Cause.DETACHED, "torch.Tensor.detach", ["a.weight", "a.bias"])
        'remove `.detach()` to train them, or freeze `a` with `requires_grad_(False)`'
    """
    template = _HELPS_BY_OPERATION.get((cause, _word(operation))) or _HELPS.get(cause)
    if template is None:
        return None
    it = "it" if len(parameters) == 1 else "them"
    owner = _owner(parameters)
    return template.format(
        it=it,
        owner=owner or it,
        freeze=f"freeze {owner or it} with `requires_grad_(False)`",
        call=_call(operation) or ("this call" if site else "the call"),
    )


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
    return f"{name}: {_SUMMARIES[name]}\n"


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
    names = fold(diagnosis.parameters, all_names)
    heading = (
        f"{diagnosis.severity}[{diagnosis.cause}]: {_enumerate(names)} {_fact(diagnosis, names)}"
    )
    site = diagnosis.site
    # The user's own line is the one to look at; what a library does inside it is evidence.
    place = site.caller if site and site.caller else site
    notes = list(diagnosis.notes)
    lines, width = [heading], 2
    if place:
        width = len(str(place.line))
        module = place.module or (site.module if site else None)
        lines.append(f"{' ' * width}--> {_location(place, module)}")
        lines += _snippet(place, _label(diagnosis), width)
    if site and site is not place:
        notes.insert(0, _inside(site))
    bullets = [f"note: {note}" for note in notes]
    if diagnosis.help:
        bullets.append(f"help: {diagnosis.help}")
    bullets.append(f"more: gradwatch explain {diagnosis.cause}")
    return "\n".join([*lines, *_bullets(bullets, width)])


def _render_alert(alert: Alert, all_names: Iterable[str]) -> str:
    names = fold(alert.parameters, all_names)
    severity = _SEVERITIES[alert.action]
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
        return _IN_NO_OPTIMIZER[many]
    if diagnosis.cause is Cause.UNDETERMINED:
        return f"{_VERBS[diagnosis.status][many]}, and the cause was not found"
    return _VERBS[diagnosis.status][many]


def _alert_fact(alert: Alert, names: Sequence[str]) -> str:
    if alert.message:
        return printable(alert.message)
    if alert.status is not None:
        run = f"for {alert.steps} steps in a row" if alert.steps > 1 else f"in step {alert.step}"
        return f"{_enumerate(names)} {_VERBS[alert.status][2]} {run}"
    if alert.value is None or alert.limit is None:
        return f"the rule fired for {_enumerate(names)}"
    below = alert.value < alert.limit
    norm = f"grad norm of {_enumerate(names)}" if names else "total grad norm"
    # One value stands for all of them: it is the worst.
    verb = ("is down to" if below else "is up to") if _is_many(names) else "is"
    return f"{norm} {verb} {alert.value:.1e}, {'below' if below else 'above'} {alert.limit:.1e}"


def _label(diagnosis: Diagnosis) -> str:
    word = _word(diagnosis.operation)
    return _LABELS.get(diagnosis.cause, "").format(word=f"`{word}`" if word else "this")


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


def _enumerate(names: Sequence[str]) -> str:
    words = [f"`{printable(name)}`" for name in names[:_SHOWN_NAMES]]
    if len(names) > _SHOWN_NAMES:
        words.append(f"{len(names) - _SHOWN_NAMES} more")
    if not words:
        return "no parameters"
    *rest, last = words
    comma = "," if len(rest) > 1 else ""
    return f"{', '.join(rest)}{comma} and {last}" if rest else last


def _count(statuses: Mapping[str, Status]) -> str:
    counts = Counter(statuses.values())
    parts: list[str] = []
    for status in sorted(counts, key=lambda entry: -entry.code):
        many = counts[status] != 1
        verb = _TRAINS[many] if status is Status.OK else _VERBS[status][many]
        # "is frozen" and "are frozen" go without their verb behind the first part.
        verb = verb.removeprefix("is ").removeprefix("are ") if parts else verb
        noun = "" if parts else (" parameters" if many else " parameter")
        parts.append(f"{counts[status]}{noun} {verb}")
    return ", ".join(parts) or "no parameters"


def _owner(parameters: Sequence[str]) -> str | None:
    """Return the one thing that holds all the parameters, as code, or None where there is none."""
    if len(parameters) == 1:
        return f"`{printable(parameters[0])}`"
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


def _location(site: Site, module: str | None) -> str:
    text = f"{printable(_path(site.file))}:{site.line}"
    # What stands before `<locals>` is the place where the class was made, not where the line is.
    function = (site.function or "").rpartition("<locals>.")[2]
    if function and function != "<module>":
        text += f" in {printable(function)}"
    return f"{text} (module `{printable(module)}`)" if module else text


def _path(file: str) -> str:
    with suppress(OSError, ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def _inside(site: Site) -> str:
    text = f"it happens inside this call, at {_location(site, None)}"
    source = (site.source or "").strip()
    return f"{text}: `{printable(source)}`" if source else text


def _snippet(site: Site, label: str, width: int) -> list[str]:
    """Return the source line between gutter lines, with carets under the expression and the label."""
    source = (site.source or "").rstrip()
    if not source:
        return []
    begin, end = _span(site, source)
    cells = [_cell(char) for char in source]
    shown = "".join(text for text, _ in cells)
    margin = " " * sum(size for _, size in cells[:begin])
    carets = "^" * max(1, sum(size for _, size in cells[begin:end]))
    if site.end_line is not None and site.end_line > site.line:
        label = f"... to line {site.end_line}{': ' if label else ''}{label}"
    bar = f"{' ' * width} |"
    return [bar, f"{site.line:>{width}} | {shown}", f"{bar} {margin}{carets} {label}".rstrip(), bar]


def _span(site: Site, source: str) -> tuple[int, int]:
    """Return the columns to underline; the whole line where they are not known."""
    indent = len(source) - len(source.lstrip())
    begin = indent if site.column is None else min(site.column, len(source) - 1)
    goes_on = site.end_line is not None and site.end_line > site.line
    if goes_on or site.column is None or site.end_column is None:
        return begin, max(begin + 1, _code_end(source))
    return begin, max(begin + 1, site.end_column)


def _code_end(source: str) -> int:
    """Return the column behind the last character of code, leaving a comment out."""
    # The line may be part of an expression: what was read up to an error still counts.
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(iter([source]).__next__):
            if token.type == tokenize.COMMENT and token.start[1] > 0:
                return len(source[: token.start[1]].rstrip())
    return len(source)


def _cell(char: str) -> tuple[str, int]:
    """Return what is shown for one character of source, and how many columns it takes."""
    if char == "\t":
        return "    ", 4
    category = unicodedata.category(char)
    if category == "Cf":  # direction marks and joiners could show other code than what runs
        return "", 0
    if category in {"Mn", "Me"}:
        return char, 0
    if not char.isprintable():
        return "\N{REPLACEMENT CHARACTER}", 1
    return char, 2 if unicodedata.east_asian_width(char) in "WF" else 1


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
        where = _location(place, None) if place else "not one line"
        names = _enumerate(fold(entry.parameters, statuses))
        cells = (entry.severity, entry.cause, names, where, since)
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(rows)


def _alert_table(alerts: Sequence[Alert], statuses: Mapping[str, Status]) -> str:
    rows = ["| Severity | Rule | What | Step |", "|---|---|---|---|"]
    for entry in alerts[:_SHOWN_ROWS]:
        fact = _alert_fact(entry, fold(entry.parameters, statuses))
        cells = (_SEVERITIES[entry.action], entry.rule, fact, str(entry.step))
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
