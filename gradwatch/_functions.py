"""What the author of an ``autograd.Function`` got wrong, and which line of the class says so.

What this room knows that no other does: how to tell from torch's message and the frames that it passed which class
of the user's is meant, and what its ``forward`` and ``backward`` owe each other: as many gradients as arguments, as
many arguments as outputs, and what the one keeps for the other.

Limits: a class is found by its name, so that of two of one name nothing is said of the class.
"""

from __future__ import annotations

import difflib
import inspect
import re
from typing import TYPE_CHECKING, Any

from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from gradwatch import _error_words, _frames, _nearby, _source, _statements
from gradwatch._calls import Kind, Wrapper
from gradwatch._failure import (
    Raised,
    at,
    entries,
    in_nearest_file,
    last_of_user,
    listed,
    role_of,
    statement,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType

    from gradwatch._failure import Find


def in_function(kind: str) -> Find:
    """Explain what the ``backward`` of a Function returned by the call of the Function and the ``return``."""

    def find(raised: Raised) -> str | None:
        named = re.search(r"[Ff]unction (\w+) returned", raised.message)
        ops = raised.trace.ops
        if named is None:
            return None
        found = re.search(r"at index (\d+)", raised.message)
        index = None if found is None else int(found[1])
        own = _return_of(_named(named[1].removesuffix("Backward")), index)
        own = listed(_registered_return(raised), own) if "GeneratedBackward" in named[1] else own
        for node in (node for passed in raised.inspection.passes for node in passed.nodes):
            if node.custom and node.name == named[1] and node.tag >= 0:
                return _error_words.note(kind, listed(at(ops[node.tag].place), own))
        given = [at(op.place) for op in ops if op.kind is Kind.SET_DATA]
        if own is None and given and kind == "wrong_shape":
            return _error_words.note("other_data", listed(*given))
        return None if own is None else _error_words.note(kind, own)

    return find


def _registered_return(raised: Raised) -> str | None:
    """Return what the function returns that is registered as the backward of the custom operator in a message."""
    counts = re.search(r"expected \d+, got (\d+)", raised.message)
    given = in_nearest_file(raised, _registered_backwards)
    wanted = 0 if counts is None else int(counts[1]) - 1  # torch adds one of its own
    found = [s for each in given for s in _nearby.returned_by_name(each, wanted)]
    return role_of("returned here", statement(found[0])) if len(given) == 1 and found else None


def _registered_backwards(file: str) -> list[_source.Statement]:
    return _statements.method_calls(file, "register_autograd")


def once_differentiable(raised: Raised) -> str | None:
    """Explain a Function that may be differentiated once by its call, and its mark where one alone has it."""
    ops = [op for op in raised.trace.ops if op.wrapper is Wrapper.CUSTOM_FUNCTION]
    call = at(ops[-1].place) if ops else None
    codes = [code for cls in _functions() if (code := _method(cls, "backward")) is not None]
    marks = in_nearest_file(raised, lambda file: _marks_in(file, codes))
    marked = statement(marks[0]) if len(marks) == 1 else None
    places = listed(marked, call)
    return None if places is None else _error_words.note("once_differentiable", places)


def _marks_in(file: str, codes: Iterable[CodeType]) -> list[_source.Statement]:
    own = [code for code in codes if code.co_filename == file]
    marks = (_nearby.decorator(code, "once_differentiable") for code in own)
    return list(dict.fromkeys(mark for mark in marks if mark is not None))


def no_tensor_for_a_gradient(raised: Raised) -> str | None:
    """Explain a gradient that is no tensor by the ``return`` of the only Function that the pass went through."""
    nodes = [n for passed in raised.inspection.passes for n in passed.nodes if n.custom]
    names = {node.name.removesuffix("Backward") for node in nodes}
    own = _return_of(_named(names.pop()), None) if len(names) == 1 else None
    return None if own is None else _error_words.note("no_tensor_for_a_gradient", own)


def without_backward(raised: Raised) -> str | None:
    """Explain a Function that has no ``backward`` by its class, and its call."""
    cls = _function_of(raised.error)
    if cls is None:
        return None
    own = [statement(head) for head in _nearby.heads(cls)[:1]]
    close = difflib.get_close_matches("backward", vars(cls), n=1)
    code = _method(cls, close[0]) if close else None
    head = None if code is None else _nearby.head(code)
    near = None if head is None else role_of("its name is not `backward`", statement(head))
    return _error_words.note("no_backward", listed(near, *own, _call_of(raised, cls)))


def with_other_arguments(raised: Raised) -> str | None:
    """Explain a ``forward`` or ``backward`` with another number of arguments by its first line."""
    cls = _function_of(raised.error)
    name = "backward" if ".backward()" in raised.message else "forward"
    code = None if cls is None else _method(cls, name)
    head = None if code is None else _nearby.head(code)
    if head is None or cls is None:
        return None
    call = None if name == "forward" else _call_of(raised, cls)
    last = at(last_of_user(raised.error))
    return _error_words.note(f"{name}_arguments", listed(statement(head), call, last))


def told_to_ctx(kind: str, method: str) -> Find:
    """Explain what a Function told torch wrongly by the line that calls the method of ``ctx``."""

    def find(raised: Raised) -> str | None:
        cls = _function_of(raised.error)
        told = [] if cls is None else _statements.calls_of(cls, method)
        last = at(last_of_user(raised.error))
        return _error_words.note(kind, listed(*map(statement, told[:1]), last))

    return find


def not_kept(raised: Raised) -> str | None:
    """Explain an attribute that ``backward`` reads in vain by the method that should set it on ``ctx``."""
    found = re.search(r"'(\w+)Backward' object has no attribute '(\w+)'", raised.message)
    cls = None if found is None else _named(found[1])
    last = last_of_user(raised.error)
    if found is None or cls is None or last is None:
        return None
    code = _method(cls, "setup_context") or _method(cls, "forward")
    head = None if code is None else _nearby.head(code)
    kept = [*_statements.assignments(cls, found[2]), *([] if head is None else [head])]
    return _error_words.note("not_kept", listed(*map(statement, kept[:1]), at(last)), found[2])


def saved_otherwise(raised: Raised) -> str | None:
    """Explain ``ctx.saved_tensors`` taken apart into another number of names by what ``forward`` saves."""
    cls, last = _function_of(raised.error), last_of_user(raised.error)
    if cls is None or last is None or "saved_tensors" not in _source.text_of(last[:2]):
        return None
    saved = _statements.calls_of(cls, "save_for_backward")
    places = listed(*map(statement, saved[:1]), at(last))
    return _error_words.note("saved_otherwise", places) if saved else None


def _first_local(frame: Any) -> Any:
    names = frame.f_code.co_varnames if frame.f_code.co_argcount else ()
    return frame.f_locals.get(names[0]) if names else None


def _function_of(error: Exception) -> type | None:
    """Return the Function whose method torch was about to run, or ran, last."""
    for entry in reversed(list(entries(error))):
        first = _first_local(entry.tb_frame)
        if isinstance(first, BackwardCFunction):
            return _named(type(first).__name__.removesuffix("Backward"))
        if isinstance(first, type) and issubclass(first, Function) and first is not Function:
            return first
    return None


def _functions() -> list[type]:
    """Return every Function, of those of one name the one that was defined last at first."""
    todo, found = [Function], list[type]()
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        found.append(cls)
    return found[1:]


def _named(name: str) -> type | None:
    """Return the only Function of a name, the user's own before all; of one that was defined again, the last."""
    found = [cls for cls in _functions() if cls.__name__ == name]
    found = [cls for cls in found if _is_users(cls)] or found
    return found[0] if len({(cls.__module__, cls.__qualname__) for cls in found}) == 1 else None


def _is_users(cls: type) -> bool:
    file = _source.file_of(cls)
    return file is not None and _frames.owner_of_file(file) is _frames.Owner.USER


def _method(cls: type, name: str) -> CodeType | None:
    method = getattr(cls, name, None)
    if method is getattr(Function, name, None):
        return None
    code: CodeType | None = getattr(inspect.unwrap(method), "__code__", None) if method else None
    return code


def _call_of(raised: Raised, cls: type) -> str | None:
    """Return the last call of a Function in the step."""
    places = [
        raised.trace.ops[node.tag].place
        for passed in raised.inspection.passes
        for node in passed.nodes
        if node.custom and node.name == f"{cls.__name__}Backward" and node.tag >= 0
    ]
    return role_of("called here", at(places[-1])) if places else None


def _return_of(cls: type | None, index: int | None) -> str | None:
    """Return what the ``backward`` of a Function returns, and where the one at an index is computed."""
    code = None if cls is None else _method(cls, "backward")
    returned = [] if code is None else _nearby.returned(code, index)
    head = None if code is None or returned else _nearby.head(code)
    if head is not None:
        return role_of("returns nothing", statement(head))
    roles = ["returned here", "computed here"]
    return listed(*(role_of(role, statement(s)) for role, s in zip(roles, returned, strict=False)))
