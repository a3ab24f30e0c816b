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
AGAIN = {
    Status.FROZEN: ("is no longer frozen", "are no longer frozen"),
    Status.ZERO: ("gets a gradient other than zero again", "get gradients other than zero again"),
    Status.MISSING: ("gets a gradient again", "get a gradient again"),
    Status.NONFINITE: ("gets a finite gradient again", "get a finite gradient again"),
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


def output_of(operation: str, dtype: str) -> str:
    """Say why the output of an operation has no derivative."""
    return f"its output here is of dtype `{dtype}`, which carries no gradient (`{operation}`)"


ERRORS = {
    "ddp": (
        "DDP waits for a gradient of every parameter, and some got none in an earlier step",
        "mend what follows, or pass `find_unused_parameters=True`",
    ),
    "untraced": (
        "this step was not traced, so that the line at the root is not known",
        "run the step inside of `with gradwatch.diagnose(model):` to find it",
    ),
    "no_parameters": (
        "the model has no parameters, so the loss has no history",
        "assign layers to attributes of the module: a plain list or dictionary does not register them",
    ),
    "all_frozen": (
        "every parameter has `requires_grad=False`, so the loss has no history",
        "leave `requires_grad` on for what should train, or let the input require grad if its gradient is wanted",
    ),
    "left_off": (
        "gradient mode was switched off, and is off still",
        "switch it off with `with torch.no_grad():`, which switches it on again whatever happens",
    ),
    "no_history": ("no parameter that requires grad reaches the loss", None),
    "overwritten": (
        "`{1}` changes a tensor in place here that a backward needs as it was",
        "{2}, or change it after the backward pass",
    ),
    "overwritten_result": (
        "`{1}` changes in place here what `{3}` made, and a backward needs it as it was",
        "{2}",
    ),
    "renormed": (
        "`max_norm` makes this call change the table in place, and an earlier operation needs it as it was",
        "look everything up in one call, or give the earlier operation `weight.clone()`",
    ),
    "view_without_history": (
        "a view that was made under `torch.no_grad()` is changed in place where gradients are on",
        "make the view where gradients are on, or `.clone()` it",
    ),
    "cut_before": (
        "a gradient is asked for {2} the output was not computed from: `{1}` cuts it off here",
        "take the gradient with respect to the tensor that goes into the output",
    ),
    "not_wanting": (
        "a gradient is asked of, or for, a tensor that does not require grad",
        "call `.requires_grad_()` on the input before it is used, and look for a `detach` or `no_grad` on the way",
    ),
    "flag_of_a_result": (
        "`requires_grad` is switched off for the result of an operation, which only leaves allow",
        "write `x = x.detach()`",
    ),
    "flag_set_on_a_result": (
        "`requires_grad` is set on the result of an operation that has a history: only leaves have that flag",
        "start from a leaf: `x = x.detach().requires_grad_()`, or call `x.retain_grad()` for its `.grad`",
    ),
    "hook": (
        "a hook that is registered here returns a gradient of another shape or type than it was given",
        "return a gradient like the one that came, or None to leave it as it is",
    ),
    "hook_returns": (
        "a hook returns a gradient of another shape or type than it was given",
        "return a gradient like the one that came, or None to leave it as it is",
    ),
    "recomputed": (
        "what runs inside of this checkpoint does something else when backward runs it again",
        "let it depend on its arguments alone: no counter, no random number of Python's or of a generator of its own, no state that it changes",
    ),
    "detach_of_a_view": (
        "a view of another tensor cannot be detached in place",
        "write `x = x.detach()` in place of `x.detach_()`",
    ),
    "nothing_registered": (
        "the module registers no parameter: {1}",
        "{2}",
    ),
    "no_parameter_made": (
        "the module registers no parameter: `{1}` is the result of an operation, which is none",
        "make the parameter last: `self.weight = nn.Parameter(...)` around all that is computed",
    ),
    "used_up": (
        "the optimizer is given an iterator that was read to its end before",
        "make it a list, which can be read again: `params = list(...)`",
    ),
    "nothing_wanting": (
        "the optimizer is given no parameter: all of them have `requires_grad=False`",
        "leave `requires_grad` on for what should train",
    ),
    "no_leaf": (
        "an optimizer is given the result of this operation, which is no leaf",
        "make it a leaf: `x = (...).detach().requires_grad_()`, or call `requires_grad_()` last",
    ),
    "no_parameter": (
        "the result of an operation is assigned to the name of a parameter",
        "change the parameter's values, `with torch.no_grad(): weight.copy_(...)`, or keep the result under a name of its own",
    ),
    "registered_tensor": (
        "a tensor that is no parameter is registered as one",
        "wrap it: `nn.Parameter(tensor)`, or use `register_buffer` for what does not train",
    ),
    "grad_of_a_result": (
        "`.grad` is None here: it is kept for leaves, and this is the result of an operation",
        "call `.retain_grad()` before the backward pass, or make it a leaf: `x = x.detach().requires_grad_()`",
    ),
    "grad_of_a_copy": (
        "`.grad` is read of a detached copy of a parameter, which has none: it was taken here",
        "read it of the parameter itself: `model.named_parameters()` in place of `state_dict()`",
    ),
    "grad_is_none": (
        "`.grad` of a parameter is None here: no gradient came to it",
        "leave out those without one: `if p.grad is not None`, or mend what follows",
    ),
    "number": (
        "the loss is a number: it left torch here, and has no `backward`",
        "add up the tensors themselves, and take `.item()` for the log only",
    ),
    "grad_of_another_type": (
        "a gradient of another type than the parameter is assigned",
        "cast it first: `p.grad = gradient.to(p.dtype)`",
    ),
    "not_finite": (
        "the gradients that are to be clipped here are NaN or infinite",
        None,
    ),
    "asked_for_nothing": (
        "no tensor is named to differentiate for",
        "name at least one that requires grad, or leave `inputs` out of `backward()`",
    ),
    "not_parameters": (
        "the optimizer is given something that is no parameter",
        "pass `model.parameters()` itself, or groups: `[{{'params': model.head.parameters()}}]`",
    ),
    "in_two_groups": (
        "{1} would be in two groups of the optimizer",
        "leave out of the one group what the other one holds",
    ),
    "resized": (
        "a tensor that requires grad is resized in place",
        "use what `reshape`, a slice, or `torch.nn.functional.pad` returns",
    ),
    "stepped_before": (
        "the optimizer has already stepped with these gradients, and `scaler.update()` was not called since",
        "call `unscale_()`, `step()` and `update()` in this order, and each once for a step",
    ),
    "unscaled_twice": (
        "gradients are unscaled here for the second time since `scaler.update()`",
        "call `unscale_()` once for each step of the optimizer: in the micro-batch in which it steps",
    ),
    "half_parameters": (
        "the parameters are in float16, and a GradScaler is for parameters in float32",
        "keep the model in float32 and run it under `torch.autocast`, or do without the scaler",
    ),
    "some_in_half": (
        "`{1}` is in float16, and a GradScaler is for parameters in float32",
        "make it in float32, as the others are, and run the model under `torch.autocast`",
    ),
    "nothing_to_unscale": (
        "no parameter of the optimizer that steps here has got a gradient",
        None,
    ),
    "held_before": (
        "the optimizer holds parameters that the model does not have any more: they were replaced here",
        "build the optimizer after the model is complete",
    ),
    "sparse": (
        "sparse gradients are given to what is for dense ones",
        "leave out `sparse=True`, or give these parameters to `torch.optim.SparseAdam`",
    ),
    "serialised": (
        "a tensor with a history is sent to another process",
        "`.detach()` it before it is sent",
    ),
    "grad_of_another_size": (
        "a gradient of another size than the parameter is assigned",
        "give it the shape of the parameter: `p.grad = piece.view_as(p)`",
    ),
    "cat_of_scalars": (
        "tensors with 0 dimensions, such as losses, are concatenated",
        "use `torch.stack`, which gives them a dimension",
    ),
    "expanded_in_place": (
        "a tensor whose elements share memory, as those of `expand` do, is changed in place",
        "write `x = x + y` in place of `x += y`, or `.clone()` it first",
    ),
    "nothing_in_checkpoint": (
        "nothing that runs inside of this reentrant checkpoint leads back to what requires grad",
        "pass `use_reentrant=False` to `checkpoint`, or do not checkpoint what is frozen",
    ),
    "no_setup_context": (
        "this Function is written in a way that `torch.func` does not take",
        "give it a `setup_context(ctx, inputs, output)`, and a `forward` without `ctx`",
    ),
    "random_in_vmap": (
        "`vmap` is not told whether random numbers are the same for each sample",
        'pass `randomness="different"` or `randomness="same"` to `vmap`, or draw them outside',
    ),
    "in_place_in_vmap": (
        "a value for each sample is written into a tensor that all of them share",
        "collect the values in a list and `torch.stack` them, or make the tensor from one of the inputs",
    ),
    "norm_in_vmap": (
        "a layer counts its inputs in place, which `vmap` does not allow",
        "use `GroupNorm`, or pass `track_running_stats=False` to the layer",
    ),
    "anomaly": (
        "the backward of this operation is not finite at the values that it was given",
        "keep it away from them: add an epsilon, or choose what goes in with `torch.where`",
    ),
    "grad_outputs": (
        "`grad_outputs` has another shape than what is differentiated",
        "pass `torch.ones_like(output)`, or a weight for each of its elements",
    ),
    "behind_a_hook": (
        "what a module with a full backward hook returns is changed in place",
        "pass `inplace=False` to what follows the module, or hook the one behind it",
    ),
    "item_in_vmap": (
        "`vmap` cannot take a number out of a batch of tensors, nor decide by one",
        "stay in torch: `torch.clamp`, `torch.where` and `torch.minimum` do without `.item()`",
    ),
    "func_of_a_vector": (
        "`torch.func.grad` is given a function that returns a tensor with several elements",
        "reduce it to one number inside of the function, with `.mean()` or `.sum()`",
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
        "add the losses and call `backward()` once, `.detach()` what one should not train, or pass `retain_graph=True`",
    ),
    "twice_in_backward": (
        "the `backward` of a Function goes through a graph here that an earlier pass has freed",
        "compute all of it anew in there, `.detach()` what it shares with other calls, or pass `retain_graph=True` inside",
    ),
    "leaf_in_place": (
        "a parameter, or another leaf that requires grad, is changed in place",
        "write `x = x + y` in place of `x += y`, or do it under `torch.no_grad()`",
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
    "view_in_place": (
        "one of several views of a tensor is changed in place",
        "write `x = x + y` in place of `x += y`",
    ),
    "out_argument": (
        "`out=` writes the result into a tensor of yours, which has no derivative",
        "call it without `out=`, and keep what it returns",
    ),
    "nothing_to_retain": (
        "`retain_grad()` is called on a tensor that has no history: it comes from here",
        "look for a `detach` or `no_grad` on the way to it, or call `retain_grad()` where gradients are on",
    ),
    "nothing_to_hook": (
        "a hook is registered on a tensor that has no history: it comes from here",
        "register it where gradients are on, or only `if x.requires_grad`",
    ),
    "computed_off": (
        "the loss is computed while gradients are off",
        "compute it outside of `no_grad` and `inference_mode`, or under `with torch.enable_grad():`",
    ),
    "in_double": (
        "a tensor in float64 meets those of the model, which are in float32",
        "make it in float32: `torch.tensor(values, dtype=torch.float32)`, or `.float()`",
    ),
    "output_without_history": (
        "what is differentiated here has no history: it was lost here",
        "pass `create_graph=True` where it is a derivative itself, and look for a `detach` or `no_grad`",
    ),
    "not_none": (
        "the `backward` of this Function returns a gradient for an argument that is no tensor",
        "return None in the place of each argument of `forward` that is no tensor",
    ),
    "grad_in_backward": (
        "the `backward` of a Function runs with gradient mode off, so that what it computes has no history",
        "compute it under `with torch.enable_grad():`, from inputs that require grad",
    ),
    "legacy_function": (
        "an instance of a `torch.autograd.Function` is called",
        "make `forward` and `backward` static methods, and call `MyFunction.apply(...)`",
    ),
    "outlived": (
        "a tensor of an earlier step is used with its graph{1}, whose weights the optimizer has changed since",
        "`.detach()` it where it is kept",
    ),
    "numpy": (
        "a tensor that requires grad is turned into a NumPy array",
        "call `.detach().numpy()` where no gradient is wanted, or stay in torch where one is",
    ),
    "integer": (
        "a tensor of integers or booleans is asked for a gradient",
        "keep the value in floating point: what `argmax`, a comparison or a cast gives has none",
    ),
    "copy_of_a_result": (
        "a tensor with a history is copied with `deepcopy`, which takes leaves alone",
        "copy `x.detach().clone()`, or do not keep the result of a computation on the object",
    ),
    "not_in_graph": (
        "a gradient is asked for {1} the output was not computed from",
        "pass `allow_unused=True` where that is right, or look for a cut between the two",
    ),
    "wrong_count": (
        "the `backward` of this Function returns another number of gradients than `forward` takes",
        "return one value for each argument of `forward` after `ctx`, and None where there is none",
    ),
    "wrong_shape": (
        "the `backward` of this Function returns a gradient that does not have the shape of its argument",
        "return each gradient in the shape of the argument of `forward` that it belongs to: sum over what was broadcast",
    ),
    "no_tensor_for_a_gradient": (
        "the `backward` of this Function returns a number, or something else, in the place of a gradient",
        "return a tensor for each argument of `forward` that has a gradient, and None for each other one",
    ),
    "no_backward": (
        "this Function has no `backward`, and a gradient is asked for through it",
        "give it a static method `backward(ctx, *grad_outputs)`, or `.detach()` what goes into it",
    ),
    "backward_arguments": (
        "the `backward` of this Function does not take one gradient for each output of `forward`",
        "give it an argument for each of them behind `ctx`: those of outputs that nobody used are zeros",
    ),
    "forward_arguments": (
        "the `forward` of this Function does not take what it is given here",
        "let it take `ctx` and each argument of `apply`, or define `setup_context` where it is to do without `ctx`",
    ),
    "saved_no_tensor": (
        "`save_for_backward` is given something that is no tensor",
        "keep shapes, numbers and flags as attributes: `ctx.shape = x.shape`",
    ),
    "not_returned": (
        "the `forward` of this Function says that it changes a tensor in place, and does not return it",
        "return the very tensor that `ctx.mark_dirty` is given, or leave the mark out where nothing is changed",
    ),
    "not_kept": (
        "`backward` reads `ctx.{1}`, which was not set when the Function was called",
        "set `ctx.{1}` wherever the Function is called, before it returns",
    ),
    "saved_otherwise": (
        "`backward` takes another number of tensors out of `ctx.saved_tensors` than were saved here",
        "take as many as `save_for_backward` is given, in its order",
    ),
    "once_differentiable": (
        "the `backward` of this Function is marked with `@once_differentiable`, and is differentiated here",
        "write `backward` with operations of torch and without the mark, or do without `create_graph=True`",
    ),
    "complex_loss": (
        "the loss is a complex number",
        "take its real part, or the square of its absolute value: `.real`, `.abs().square()`",
    ),
    "reentrant_inputs": (
        "a reentrant checkpoint cannot work out gradients for some tensors only",
        "pass `use_reentrant=False` to `checkpoint`",
    ),
    "no_formula": (
        "this custom operator has no derivative",
        "give it one with `register_autograd`, or `.detach()` its inputs where no gradient is wanted",
    ),
    "no_derivative": (
        "torch has no derivative for this operation with these inputs",
        "use a differentiable operation, or `.detach()` the input that needs no gradient",
    ),
}


_AUGMENTED = {
    "add_": "+",
    "sub_": "-",
    "mul_": "*",
    "div_": "/",
    "pow_": "**",
    "__iadd__": "+",
    "__isub__": "-",
    "__imul__": "*",
    "__itruediv__": "/",
    "__ipow__": "**",
}
"""Operations in place that Python has an operator for."""
_WITHOUT_RESULT = frozenset(
    ["__setitem__", "zero_", "fill_", "copy_", "normal_", "uniform_", "set_"]
)
"""Those that have no twin which leaves its argument as it is."""


def overwritten(kind: str, where: str | None, operation: str, maker: str | None) -> str:
    """Return the note on a tensor that was changed before a backward needed it, with the way around the write.

    Example:
        >>> print(overwritten("overwritten", None, "torch.Tensor.masked_fill_", None))
        `torch.Tensor.masked_fill_` changes a tensor in place here that a backward needs as it was
          = help: use what `masked_fill` returns, or change it after the backward pass
    """
    short = operation.rpartition(".")[2]
    # `x += y` is an `add_` too.
    sign = _AUGMENTED.get(short)
    if sign is not None and where is not None and f"{sign}=" in where:
        advice = f"write `x = x {sign} y` in place of `x {sign}= y`"
    elif short in _WITHOUT_RESULT:
        advice = "write into a `.clone()` of it, or choose with `torch.where`"
    elif short.endswith("_"):
        advice = f"use what `{short.removesuffix('_')}` returns"
    else:
        advice = "pass `inplace=False`"
    return error_note(kind, where, operation, advice, maker)


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
    gaps = (where, *("an operation" if given is None else given for given in facts))
    lines = [fact.format(*gaps)]
    if where is not None:
        lines.append(f"  --> {where}")
    if advice is not None:
        lines.append(f"  = help: {advice.format(*gaps)}")
    return "\n".join(lines)


def set_here(attribute: str, where: str) -> str:
    """Say where an attribute is set that decides what a forward reads."""
    return f"`self.{attribute}` is set here\n  --> {where}"


def cut_as_well(where: str) -> str:
    """Say where else parameters are cut off from a loss."""
    return f"others are cut off from the loss as well\n  --> {where}"


def called_inside(where: str) -> str:
    """Say which call, made with gradients off, led to the failing line."""
    return f"gradients are off in this call\n  --> {where}"


def frozen_too(folded: str, where: str | None) -> str:
    """Say that parameters are frozen which a loss without a history was, or may have been, computed from."""
    at = "" if where is None else f"\n  --> {where}"
    return f"`requires_grad` is False for {folded}{at}"


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
