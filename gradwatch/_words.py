"""The sentences of notes: evidence beside a diagnosis, and what is added to an error of torch's.

Beside ``explain``, which renders, this room holds the wording of what the engine found out. Facts come in
as values; nothing is looked up here. Standard library alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.report import Cause, Site

NO_OTHER_USE = "no other use of these parameters reaches the loss"
ONLY_WITHOUT_GRADIENT = (
    "read only where gradient mode is off, by operations that the loss does not need"
)
IN_THE_GRAPH = "the autograd graph of the loss leads to it, and no gradient arrived"
NOT_IN_THE_GRAPH = "the autograd graph of the loss does not lead to it"
NO_BACKWARD = "no backward pass ran in this step"
NOT_TRACED = "tracing is switched off (`trace: never`)"
TRACE_BROKE = "the step could not be traced to its end (see the log record of `gradwatch`)"


def place(site: Site) -> str:
    """Return ``file:line`` and the text of the line, for the middle of a sentence.

    Example:
        >>> place(Site("net.py", 3, source="    x = x.detach()"))
        'net.py:3: `x = x.detach()`'
    """
    path = Path(site.file)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    text = (site.source or "").strip()
    return f"{path}:{site.line}: `{text}`" if text else f"{path}:{site.line}"


def did_not_run(module: str) -> str:
    """Say that a module's forward was not called."""
    return f"module `{module}` did not run in this step"


def ran_without_it(module: str) -> str:
    """Say that a module ran and left one of its parameters alone."""
    return f"module `{module or 'the model itself'}` ran, and no operation read it"


def another_path(cause: Cause, site: Site | None) -> str:
    """Say that a further path to the loss is cut as well."""
    where = "" if site is None else f" at {place(site)}"
    return f"another path to the loss is cut too ({cause}){where}"


def output_of(operation: str, dtype: str) -> str:
    """Say why the output of an operation has no derivative."""
    return f"its output here is of dtype `{dtype}`, which carries no gradient (`{operation}`)"


ERRORS = {
    "all_frozen": (
        "every parameter has `requires_grad=False`, so the loss has no history",
        "leave `requires_grad` on for the parameters that should train",
    ),
    "no_history": ("no parameter that requires grad reaches the loss", None),
    "overwritten": (
        "`{1}` needs this tensor for its backward, and `{2}` changes it in place",
        "write `x = x + y` in place of `x += y` here, or pass `inplace=False`",
    ),
    "optimizer_stepped": (
        "the optimizer changes weights here that this backward still needs ({1})",
        "step the optimizer after this backward, or compute the loss again after the step",
    ),
    "kept": (
        "a tensor that an earlier backward has freed is kept and used again{1}",
        "compute it anew in every step, or `.detach()` it where it is kept",
    ),
    "twice": (
        "an earlier backward went through the same graph and freed it",
        "add the losses and call `backward()` once, or pass `retain_graph=True` to the first call",
    ),
    "leaf_in_place": (
        "a parameter, or another leaf that requires grad, is changed in place",
        "write `x = x + y` in place of `x += y`, or do it under `torch.no_grad()` where no gradient "
        "is wanted",
    ),
    "index_of_scalar": (
        "a tensor with 0 dimensions, such as a loss, is indexed",
        "read its number with `.item()`",
    ),
    "not_scalar": (
        "`backward()` starts from a tensor with several elements",
        "reduce it to one number, with `.mean()` or `.sum()`",
    ),
    "inference": (
        "a tensor made under `torch.inference_mode()` is used where gradients are computed",
        "make it under `torch.no_grad()`, or `.clone()` it outside of inference mode",
    ),
    "no_derivative": (
        "torch has no derivative for this operation with these inputs",
        "use a differentiable operation, or `.detach()` the input that needs no gradient",
    ),
}


def error_note(kind: str, where: str | None, *facts: str | None) -> str:
    """Return the note that is added to an error: the root cause's place, the fact, and the way out.

    Args:
        kind: A key of ``ERRORS``.
        where: The root cause's place, as ``place`` writes it.
        facts: What the sentence has gaps for.

    Example:
        >>> print(error_note("index_of_scalar", "train.py:7: `loss.data[0]`"))
        a tensor with 0 dimensions, such as a loss, is indexed
          --> train.py:7: `loss.data[0]`
          = help: read its number with `.item()`
    """
    fact, advice = ERRORS[kind]
    lines = [fact.format(where, *("an operation" if given is None else given for given in facts))]
    if where is not None:
        lines.append(f"  --> {where}")
    if advice is not None:
        lines.append(f"  = help: {advice}")
    return "\n".join(lines)
