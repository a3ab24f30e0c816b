"""Where the root of an error of torch's lies, when the user's forward or backward raised.

What this room knows that no other does: what torch's messages about autograd mean, and which recorded
operation, write or backward pass they speak of. The error itself is never changed: it gets a note.

Limits: messages are recognised by their words, in English, as torch 2.6 to 2.13 writes them; an
unknown one gets no note.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradwatch import _frames, _source, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._record import node_of
from gradwatch.report import Diagnosis, Site, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from gradwatch._diagnose import Inspection
    from gradwatch._record import Op, Write
    from gradwatch._trace import Trace

_log = logging.getLogger("gradwatch")


def add_note(
    error: Exception,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> None:
    """Add a note with the root cause's line and the way out to an error of the user's code.

    Args:
        error: The exception; it is not changed otherwise.
        inspection: The stopped trace of the step that raised, None where it was not traced.
        model: The model whose classes are read for what was done before the step.
        known: The diagnoses that hold.
    """
    if any("GradWatch" in note for note in getattr(error, "__notes__", ())):
        return
    try:
        note = _note(str(error), inspection, model, known)
    except Exception as failure:  # noqa: BLE001 -- ours, never the user's problem
        _log.warning("an error could not be explained", exc_info=failure)
        return
    if note:
        error.add_note(f"GradWatch: {note}")


def _note(
    message: str,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> str | None:
    if "Expected to have finished reduction in the prior iteration" in message:
        missing = [d for d in known if d.status is Status.MISSING]
        said = [explain.render(diagnosis) for diagnosis in missing]
        return "\n\n".join([_words.error_note("ddp", None), *said]) if missing else None
    for words, find in _KINDS:
        if words in message:
            if inspection is not None:
                return find(message, inspection, model)
            kept = _kept_anywhere(model) if find is _twice else None
            return _words.error_note("kept", *kept) if kept else _words.error_note("untraced", None)
    return None


def _kept_anywhere(model: nn.Module) -> tuple[str, str] | None:
    """Return the statement that keeps a tensor with a history on a module, and the name it has there."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            items = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, Tensor) and node_of(item) is not None for item in items):
                statements = _source.keepings(type(module), name)
                if statements:
                    full = f"{path}.{name}" if path else name
                    return _statement(statements[0]), f" (`{full}`)"
    return None


def _no_history(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain a loss that was computed from nothing that wants a gradient."""
    del message
    parameters = inspection.parameters
    wanting = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not wanting:
        return all_frozen(model)
    found = inspection.diagnose(dict.fromkeys(wanting, Status.MISSING), 0)
    told = next((d for d in found if d.site is not None), found[0] if found else None)
    if told is None:
        return None
    return _words.error_note("no_history", None) + "\n\n" + explain.render(told, tuple(parameters))


def all_frozen(model: nn.Module) -> str:
    """Return what is to be said of a loss without a history when no parameter requires grad."""
    return _words.error_note("all_frozen", _first_freezing(model))


def _first_freezing(model: nn.Module) -> str | None:
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            statements = _source.freezings(type(module))
            if statements:
                return _statement(statements[0])
    return None


def _overwritten(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain a tensor that was saved for backward and changed before."""
    del model
    trace = inspection.trace
    found = re.search(
        r"\[(?:torch\.)?\S+ \[(.*?)\]\](?:, which is output \d+ of ([\w:]+),)? is at version (\d+); "
        r"expected version (\d+)",
        message,
    )
    if found is None:
        return None
    shape = tuple(int(size) for size in found[1].split(",") if size.strip())
    write = _culprit([w for w in trace.writes if w.version > int(found[4])], shape, found[2])
    if write is not None:
        # A view that was made anew says nothing of what the user wrote.
        maker = None if found[2] == "AsStrided" else found[2]
        kind = "overwritten" if maker is None else "overwritten_result"
        return _words.error_note(kind, _at(write.place), write.operation, maker)
    if trace.steps:
        return _words.error_note("optimizer_stepped", _at(trace.steps[-1][0]), found[2])
    return None


def _culprit(writes: list[Write], shape: tuple[int, ...], node: str | None) -> Write | None:
    """Return the write that an error speaks of: by the node and the shape it names, as far as both help.

    Views share a version, not a shape; the weight of a linear layer is saved transposed.
    """
    same = [w for w in writes if shape in w.shapes]
    turned = [w for w in writes if sorted(shape) in map(sorted, w.shapes)]
    for group in ([w for w in same if w.node == node and node is not None], same, turned):
        if group:
            return group[0]
    return None if node is not None and "AccumulateGrad" in node else next(iter(writes), None)


def _twice(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain a graph that an earlier backward pass has freed."""
    del message
    trace = inspection.trace
    for op in trace.ops:
        if op.kind is Kind.LINK and op.place is None:
            reader = next(
                (o for o in trace.ops[op.index :] if set(op.outputs) & set(o.inputs)), None
            )
            kept = _kept_in(model, trace, op, reader)
            if kept is not None:
                return _words.error_note("kept", *kept)
    places = [_at(backward.place) for backward in trace.backwards]
    if len(places) > 1:
        return _words.error_note("twice", f"{places[-2]} (the earlier one)\n  --> {places[-1]}")
    return _words.error_note("twice", places[-1]) if places else None


def _kept_in(
    model: nn.Module, trace: Trace, op: Op, reader: Op | None
) -> tuple[str | None, str] | None:
    """Return the statement that keeps a tensor of an earlier pass, and the name it has there."""
    known = trace.foreign.get(op.index)
    tensor = None if known is None else known()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if tensor is not None and _holds(value, tensor):
                statements = _source.keepings(type(module), name)
                if statements:
                    return _statement(
                        statements[0]
                    ), f" (`{path}.{name}`)" if path else f" (`{name}`)"
    if reader is None or reader.place is None:
        return None
    statements = _source.stores(reader.place[:2])
    return (_statement(statements[0]) if statements else _at(reader.place)), ""


def _in_function(kind: str) -> Callable[[str, Inspection, nn.Module], str | None]:
    """Explain what the ``backward`` of a Function did wrong by the call of the Function."""

    def find(message: str, inspection: Inspection, model: nn.Module) -> str | None:
        del model
        named = re.search(r"[Ff]unction (\w+) returned", message)
        ops = inspection.trace.ops
        if named is None:
            called = [op for op in ops if op.wrapper is Wrapper.CUSTOM_FUNCTION]
            return _words.error_note(kind, _at(called[-1].place)) if called else None
        for node in (node for passed in inspection.passes for node in passed.nodes):
            if node.custom and node.name == named[1] and node.tag >= 0:
                return _words.error_note(kind, _at(ops[node.tag].place))
        return None

    return find


def _without_derivative(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain an operation without a derivative, which torch may say only in the backward pass."""
    named = re.search(r"derivative for '?(?:aten::)?(\w+)", message)
    wanted = "" if named is None else named[1].strip("_")
    for op in reversed(inspection.trace.ops):
        if wanted and op.name.rpartition(".")[2].strip("_") == wanted:
            return _words.error_note("no_derivative", _at(op.place))
    return _failing("no_derivative")(message, inspection, model)


def _without_formula(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain a custom operator that was registered without a derivative."""
    del model
    found = re.search(r"through (\w+\.\w+)", message)
    wanted = "" if found is None else found[1]
    for op in reversed(inspection.trace.ops):
        if wanted and wanted in op.name:
            return _words.error_note("no_formula", _at(op.place))
    return None


def _holds(value: Any, tensor: Any) -> bool:
    """Tell whether a value is a tensor, or a container that holds it."""
    if isinstance(value, dict):
        value = list(value.values())
    return value is tensor or (
        isinstance(value, (list, tuple)) and any(_holds(item, tensor) for item in value)
    )


def _complex_loss(message: str, inspection: Inspection, model: nn.Module) -> str | None:
    """Explain a loss that is a complex number by the operation that made it."""
    del message, model
    trace = inspection.trace
    for root in trace.backwards[-1].roots if trace.backwards else ():
        maker = trace.values[root].producer
        if maker is not None:
            return _words.error_note("complex_loss", _at(trace.ops[maker].place))
    return None


def _failing(kind: str) -> Callable[[str, Inspection, nn.Module], str | None]:
    """Explain an error by the call that raised it."""

    def find(message: str, inspection: Inspection, model: nn.Module) -> str | None:
        del message, model
        failed = inspection.trace.failed
        if failed is None or failed[0] is None:
            return None
        return _words.error_note(kind, _at(failed[0]))

    return find


def _statement(statement: _source.Statement) -> str:
    return _words.place(Site(statement.file, statement.line, source=statement.text))


def _at(place: _frames.Place | None) -> str | None:
    site = _frames.site_of(place)
    return None if site is None else _words.place(site)


_KINDS: tuple[tuple[str, Callable[[str, Inspection, nn.Module], str | None]], ...] = (
    ("does not require grad and does not have a grad_fn", _no_history),
    ("modified by an inplace operation", _overwritten),
    ("Trying to backward through the graph a second time", _twice),
    ("a leaf Variable that requires grad is being used in an in-place", _failing("leaf_in_place")),
    ("a view of a leaf Variable that requires grad", _failing("leaf_in_place")),
    ("invalid index of a 0-dim tensor", _failing("index_of_scalar")),
    ("can be implicitly created only for scalar outputs", _failing("not_scalar")),
    ("can be implicitly created only for real scalar outputs", _complex_loss),
    ("an `inputs` parameter", _failing("reentrant_inputs")),
    ("Inference tensors cannot be saved for backward", _failing("inference")),
    ("Inplace update to inference tensor", _failing("inference")),
    ("is not differentiable with respect to argument", _failing("no_derivative")),
    ("is not implemented", _without_derivative),
    ("no autograd formula was registered", _without_formula),
    ("is being modified inplace", _failing("view_in_place")),
    ("Can't call numpy() on Tensor that requires grad", _failing("numpy")),
    ("nly Tensors of floating point", _failing("integer")),
    ("Only Tensors created explicitly by the user", _failing("copy_of_a_result")),
    ("appears to not have been used in the graph", _failing("not_in_graph")),
    ("returned an incorrect number of gradients", _in_function("wrong_count")),
    ("returned an invalid gradient", _in_function("wrong_shape")),
    ("marked with @once_differentiable", _in_function("once_differentiable")),
)
