"""The wording of everything: verbs, labels and advice for each cause, notes, and notes on errors.

Below ``explain``, which renders, this room holds the sentences, so that they can be read and mended in
one place. Facts come in as values; nothing is looked up here. Standard library alone.
"""

from __future__ import annotations

import textwrap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.report import Cause, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.report import Site

# Singular and plural of what a status says now, and what it said in the past.
VERBS = {
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
WIDEST = 160
"""Characters of a line of source that are shown at most."""
IN_NO_OPTIMIZER = ("is in no optimizer", "are in no optimizer")
FROZEN_SINCE = "what it was about is frozen now"
"""Note of a diagnosis that ended because its parameters want no gradient any more."""
SINCE = {
    Status.FROZEN: ("is no longer frozen", "are no longer frozen"),
    Status.ZERO: ("gets a gradient other than zero", "get gradients other than zero"),
    Status.MISSING: ("gets a gradient", "get a gradient"),
    Status.NONFINITE: ("gets a finite gradient", "get a finite gradient"),
}
TRAINS = ("trains", "train")
LABELS = {
    Cause.NOT_IN_LOSS: "the result does not reach the loss",
    Cause.DETACHED: "the result has no history",
    Cause.NO_GRAD: "runs with gradient mode off",
    Cause.LEFT_TORCH: "the value leaves torch here",
    Cause.NON_DIFFERENTIABLE: "{word} has no derivative",
    Cause.CUSTOM_FUNCTION: "no gradient comes back through this Function",
    Cause.REENTRANT_CHECKPOINT: "no input of the checkpoint requires grad",
    Cause.CLEARED: "the gradient is thrown away here",
    Cause.NOT_REQUESTED: "this call does not ask for it",
    Cause.REPLACED: "another tensor is used here",
    Cause.ZERO_GRADIENT: "the gradient becomes zero here",
    Cause.NONFINITE_GRADIENT: "the gradient becomes NaN or infinite here",
}
SIGNS = dict.fromkeys(("eq", "ne", "gt", "ge", "lt", "le"), "a comparison") | {
    "getitem": "an index",
    "setitem": "a write into integers",
    "floordiv": "`//`",
    "and": "`&`",
    "or": "`|`",
    "xor": "`^`",
    "invert": "`~`",
}
"""What to call an operation that the source has as a sign: Python calls `lt` for `h > self.limit` too."""
LABELS_BY_OPERATION = {
    (Cause.NOT_IN_LOSS, "grad"): "the derivative does not depend on it",
    (Cause.NOT_REQUESTED, "grad"): "this call fills no `.grad`",
}
SUMMARIES = {
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
_STEP = "use a soft step, such as `sigmoid` of the difference, in place of the comparison"
_SOFT = "use `softmax` of the scores as weights, so that the choice stays in the loss"
_FLAT = "use another function there, whose derivative is not zero, or a straight-through estimator"
_DEAD = (
    "use `leaky_relu` or `gelu` in its place, or lower the learning rate: its inputs are negative"
)
_AWAY = "keep the input of {call} away from 0, for example with `clamp(min=1e-8)`"
HELPS = {
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
WRITTEN_THROUGH_DATA = "use the result itself, as in `x = x + y`: what is written through `.data` leaves no history; or {freeze}"
HELPS_OUT_OF_SIGHT = {
    Cause.DETACHED: "this call drops the history of the value: use the value itself to train {it}, or {freeze}",
    Cause.LEFT_TORCH: "go on with the tensor itself in place of {call}, or {freeze}",
}
"""What to do where the user's expression does not show the operation that a call makes inside."""
_FLOATING = "keep the value in floating point up to the loss"
_RSAMPLE = "use `rsample()`, or add `log_prob` of the sample to the loss"
_BOUNDS = "widen the bounds of {call}: outside of them its derivative is zero"
_VALUES = "use the values that `{word}` returns, not only the indices"
HELPS_BY_OPERATION = {
    (cause, word): text.replace("{word}", word)
    for cause, words, text in (
        (Cause.DETACHED, "Parameter", "use the computed tensor itself, without `nn.Parameter`"),
        (Cause.DETACHED, "deepcopy", "use the tensor itself, not a copy of it, or {freeze}"),
        (
            Cause.LEFT_TORCH,
            "tensor as_tensor",
            "use the tensors themselves, joined by `torch.stack`, in place of {call}, which copies numbers",
        ),
        (Cause.LEFT_TORCH, "bool", "choose with `torch.where`, which keeps the value in the graph"),
        (
            Cause.LEFT_TORCH,
            "int index",
            "weigh with the value itself, since a count has no derivative, or {freeze}",
        ),
        (Cause.NOT_IN_LOSS, "grad", "add a term of the value itself to the loss, or {freeze}"),
        (
            Cause.NOT_REQUESTED,
            "grad",
            "call `backward()`, or put what the call returns into `.grad`",
        ),
        (Cause.NO_GRAD, "grad", "pass `create_graph=True`, so that the result has a history"),
        (Cause.NON_DIFFERENTIABLE, "argmax argmin multinomial getitem", _SOFT),
        (Cause.NON_DIFFERENTIABLE, "eq ne gt ge lt le", _STEP),
        (Cause.NON_DIFFERENTIABLE, "long int bool byte to type copy_ setitem", _FLOATING),
        (Cause.NON_DIFFERENTIABLE, "topk sort max min median mode kthvalue", _VALUES),
        (Cause.NON_DIFFERENTIABLE, "sample", _RSAMPLE),
        (Cause.ZERO_GRADIENT, "relu relu_", _DEAD),
        (Cause.ZERO_GRADIENT, "clamp clamp_ hardtanh", _BOUNDS),
        (Cause.ZERO_GRADIENT, "round floor ceil sign trunc", _FLAT),
        (Cause.NONFINITE_GRADIENT, "sqrt log norm", _AWAY),
    )
    for word in words.split()
}

ONLY_WITHOUT_GRADIENT = (
    "read only where gradient mode is off, by operations that the loss does not need"
)
CANCELLING = "it is used in several places, and the gradients from there add up to zero"
ONLY_AS_A_NUMBER = "read only as a number, which the loss does not need as far as the text shows"
CLEARED_IN_BACKWARD = (
    "its gradient arrived, and was emptied before the backward pass was over: by a hook"
)
IN_THE_GRAPH = "the autograd graph of the loss leads to it, and no gradient arrived"
TAKEN = "a hook on it, or on its way, may have taken the gradient away"
NOT_IN_THE_GRAPH = "the autograd graph of the loss does not lead to it"
COMPUTE_ANEW = "compute it anew from the parameter in each `forward`, where the loss can reach it"
"""The help where COMPUTED_EARLIER is a note: without what cut it off, the second step would fail."""
COMPUTED_EARLIER = "the value was computed before this step, and is used in the parameter's place"
INSIDE_TRANSFORMS = "values inside of `torch.func` transforms cannot be followed"
NO_BACKWARD = "no backward pass ran in this step"
CALL_BACKWARD = "call `loss.backward()` in each step, before the optimizer's own"
NOT_TRACED = (
    "tracing is switched off; with `trace: auto` in the configuration the cause is looked for"
)
GRAD_FILLS_NOTHING = "`torch.autograd.grad` returns gradients, and fills no `.grad`"
BY_HAND = (
    "gradients are used up by hand within the step: their parameters are not judged; to have them watched, leave "
    "`.grad` as it is until the step ends, and clear it before the next backward pass"
)
NOTHING_LEFT = "`watch` in the configuration leaves out every parameter: nothing is watched"
TAKEN_AWAY = (
    "an optimizer steps inside of backward and empties `.grad`: the gradients of its parameters cannot be "
    "seen, and nothing is said about them"
)
SWITCHED_OFF = "GradWatch failed and has switched itself off; training goes on"
SINK_FAILED = "`%s` failed and gets no more reports; training and watching go on"
DROPS_OUT = "an offset, such as a bias, drops out of a derivative"
NO_STEP = "no optimizer step was seen in this run, so that nothing was judged"
FLATTENED = (
    "FSDP1 keeps gradients in flat pieces without names, so that nothing is watched in this run; with "
    "FSDP2 (`torch.distributed.fsdp.fully_shard`) everything is"
)
DEEPSPEED = (
    "DeepSpeed keeps gradients to itself, so that nothing is said of its parameters; "
    "`deepspeed.utils.safe_get_full_grad` reads one"
)
RAW_BACKWARD = (
    "`loss.backward()` was called in `training_step`, where Lightning cannot see it: use "
    "`self.manual_backward(loss)`, which also scales the loss under mixed precision"
)
DDP_HELP = "let it reach the loss, or pass `find_unused_parameters=True` to DDP where it is left out on purpose"
OUTSIDE = (
    "an optimizer stepped outside of `with watcher.step():`, and that step is not watched: put forward, "
    "backward and the optimizer's step inside"
)
RULED_OUT = (
    "ruled out: a cut that the trace has seen, a cleared gradient, and `backward(inputs=...)`"
)
TRACE_BROKE = "the step could not be traced to its end (see the log record of `gradwatch`)"


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


def listed(names: Sequence[str], shown: int | None = 3) -> str:
    """Return names in backticks as a sentence has them, the first few and how many more.

    Args:
        names: The names, in order.
        shown: How many are named; None names all.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        '`a`, `b`, `c`, and 2 more'
    """
    shown = len(names) if shown is None else shown
    words = [f"`{printable(name)}`" for name in names[:shown]]
    if len(names) > shown:
        words.append(f"{len(names) - shown} more")
    if not words:
        return "no parameters"
    *rest, last = words
    return f"{', '.join(rest)}{',' * (len(rest) > 1)} and {last}" if rest else last


def place(site: Site) -> str:
    """Return ``file:line`` and the text of the line, for the middle of a sentence.

    Example:
        >>> place(Site("net.py", 3, source="    x = x.detach()"))
        'net.py:3: `x = x.detach()`'
    """
    text = printable(shortened((site.source or "").strip()))
    where = f"{printable(shown_path(site.file))}:{site.line}"
    return f"{where}: `{text}`" if text else where


_REGISTERED = {
    "list": "`nn.ModuleList` or `nn.ParameterList`",
    "tuple": "`nn.ModuleList` or `nn.ParameterList`",
    "dict": "`nn.ModuleDict` or `nn.ParameterDict`",
}


def register(kind: str) -> str:
    """Say how the parameters in an attribute of a kind are registered.

    Example:
        >>> register("list")
        'use `nn.ModuleList` or `nn.ParameterList` in place of the list'
        >>> register("Encoder")
        'make `Encoder` an `nn.Module`'
    """
    if kind in _REGISTERED:
        return f"use {_REGISTERED[kind]} in place of the {kind}"
    return f"make `{printable(kind)}` an `nn.Module`"


def not_registered(attribute: str, kept: Site | None) -> str:
    """Say that an attribute hides parameters, and where it is set.

    Example:
        >>> not_registered("Net.layers", Site("net.py", 3, source="self.layers = [a, b]"))
        '`Net.layers` is not registered, `parameters()` does not look into it: net.py:3: `self.layers = [a, b]`'
    """
    where = f": {place(kept)}" if kept else ""
    attribute = printable(attribute)
    return f"`{attribute}` is not registered, `parameters()` does not look into it{where}"


def shortened(text: str) -> str:
    """Return a line of source, of which the end is left out where it is very long."""
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."


def shown_path(file: str) -> str:
    """Return a path as it is shown: relative where it lies below the current directory."""
    with suppress(OSError, ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def no_other_use(count: int) -> str:
    """Say that nothing else connects the parameters to the loss."""
    return f"no other use of {'it' if count == 1 else 'these parameters'} reaches the loss"


def never_stepped(position: int, names: Sequence[str]) -> str:
    """Say that an optimizer did nothing in a whole run."""
    return (
        f"optimizer {position} never stepped in this run, so that nothing is known of its parameters "
        f"({listed(names)})"
    )


def read_if(argument: str, function: str, conditions: Sequence[str]) -> str:
    """Say under which conditions a function reads one of its arguments.

    Example:
        >>> read_if("embeds", "forward", ["ids is None"])
        '`forward`, which runs next, reads `embeds` only if `ids is None`'
    """
    held = " and ".join(f"`{condition}`" for condition in conditions)
    reads = f"reads `{argument}` only if {held}" if conditions else f"does not read `{argument}`"
    return f"`{function}`, which runs next, {reads}"


def called_at(site: Site) -> str:
    """Say where a function was called."""
    return f"called at {place(site)}"


def switched_off(site: Site) -> str:
    """Say where gradient mode was switched off."""
    return f"gradient mode was switched off at {place(site)}"


def switched_by(site: Site) -> str:
    """Say where a helper makes the context that switches gradient mode off."""
    return f"the context is made at {place(site)}"


def asked_to_switch(site: Site) -> str:
    """Say which call asks a function to switch gradient mode off."""
    return f"it was asked for by the call at {place(site)}"


def kept_meanwhile(site: Site) -> str:
    """Say where a value without a history is kept, which is used later where gradients are on."""
    return f"what was computed there is kept for later use at {place(site)}"


def did_not_run(module: str) -> str:
    """Say that a module's forward was not called."""
    return f"module `{module}` did not run in this step"


def strangers(count: int) -> str:
    """Say that an optimizer holds what was replaced in the model."""
    them = (
        "a tensor of such a shape that is"
        if count == 1
        else f"{count} tensors of such shapes that are"
    )
    return f"the optimizers hold {them} not in the model: were parameters replaced after they were made?"


def made_in(function: str, site: Site) -> str:
    """Say where the optimizers are made."""
    return f"the optimizers are made in `{function}` ({place(site)})"


def on_ranks(ranks: Sequence[int], size: int) -> str:
    """Say in which processes of a group something holds."""
    return f"on {len(ranks)} of {size} ranks ({_ranks(ranks)})"


def other_cause(ranks: Sequence[int], cause: Cause, site: Site | None) -> str:
    """Say that other processes see another cause."""
    where = "" if site is None else f" ({place(site)})"
    return f"on {_ranks(ranks)} the cause is {cause}{where}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""  # noqa: PLR2004
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def ddp_waits(rank: int, size: int) -> str:
    """Say what DDP does about a parameter without a gradient."""
    return (
        f"DDP waits for a gradient of every parameter, and rank {rank} of {size} has none here: the next "
        "forward raises, or other ranks wait in this backward until their timeout"
    )


def inside_script(site: Site | None) -> str:
    """Say that a value may have gone through code that nothing is seen of."""
    where = "" if site is None else f" ({place(site)})"
    return f"what runs inside of TorchScript is not seen{where}"


def on_another_thread(module: str) -> str:
    """Say that a module ran where nothing could be seen."""
    return f"module `{module}` ran on another thread, where operations are not seen"


def ran_without_it(module: str) -> str:
    """Say that a module ran and left one of its parameters alone."""
    what = f"module `{module}`" if module else "the model itself"
    return f"{what} ran, and no operation read it"


def read_in_text(
    cls: str, name: str, parts: Sequence[tuple[str, Site, Sequence[str]]], made: Site | None
) -> str:
    """Say which methods of a class read an attribute, and what has to hold for that.

    Example:
        >>> read_in_text("Net", "aux", [("forward", Site("net.py", 9), ["self.training"])], None)
        '`Net` reads `self.aux` only in `forward` (net.py:9) if `self.training`'
    """
    if not parts:
        where = "" if made is None else f", made at {place(made)}"
        return f"nothing in `{cls}` reads `self.{name}`{where}"
    said = []
    for method, site, tests in parts:
        held = " and ".join(f"`{textwrap.shorten(test, 80, placeholder=' ...')}`" for test in tests)
        said.append(f"in `{method}` ({place(site)})" + (f" if {held}" if held else ""))
    return f"`{cls}` reads `self.{name}` only {' and '.join(said)}"


def another_path(cause: Cause, site: Site | None) -> str:
    """Say that a further path to the loss is cut as well."""
    where = "" if site is None else f" at {place(site)}"
    return f"another path to the loss is cut too ({cause}){where}"


def too_long(operations: int) -> str:
    """Say why no more is recorded."""
    return f"more than {operations:,} operations ran: no more are kept"


def under_no_seed(seeds: int) -> str:
    """Say that random numbers are not what keeps the gradient away."""
    return f"no gradient arrived under any of {seeds} seeds"


def under_some_seeds(arrived: int, seeds: int) -> str:
    """Say that a gradient arrives now and then."""
    others = "the other" if seeds - arrived == 1 else "the others"
    return f"it is intermittent: a gradient arrived under {arrived} of {seeds} seeds, and none under {others}"


def say_intermittent(globs: Sequence[str]) -> str:
    """Say how a gradient that arrives now and then is declared."""
    if len(globs) > 3:  # noqa: PLR2004 -- as many as a headline names
        return "if it is meant so, say `gradient: intermittent` in the contract"
    meant = ", ".join(f'"{printable(glob)}"' for glob in globs)
    meant = f"[{meant}]" if len(globs) > 1 else meant
    entry = f'{{"parameters": {meant}, "gradient": "intermittent"}}'
    return f"if it is meant so, say it in the contract: `{entry}`"


def term_reaches_nothing(
    term: str, cause: str | None, at: str | None, advice: str | None = None
) -> str:
    """Say that a term of the loss trains nothing, where it was cut off, and the way out where it is known."""
    text = f"the loss term `{printable(term)}` reaches no parameter"
    if cause is not None and at is not None:
        text += f": `{cause}` at {at}"
    return text if advice is None else f"{text} ({advice})"


def cost(own: float, seconds: float) -> str:
    """Say how much of a run was taken by watching it."""
    share = own / seconds if seconds > 0 else 0.0
    return f"GradWatch took {_percent(share)} of {_duration(seconds)}"


def over_budget(share: float, budget: float, every: int) -> str:
    """Say that watching took more than it may, and what follows."""
    return (
        f"GradWatch took {_percent(share)} of the time, above its budget of {_percent(budget)}: norms are "
        f"measured every {every} steps from now on"
    )


def _percent(share: float) -> str:
    text = f"{share:.1%}"
    return "less than 0.1 %" if text == "0.0%" else text.replace("%", " %")


def _duration(seconds: float) -> str:
    if seconds < 100:  # noqa: PLR2004 -- as people say it
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"  # noqa: PLR2004
