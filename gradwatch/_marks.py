"""Where a value goes after it left tensors for Python, by the text of the user's functions.

What this room knows that no other does: how a number travels from function to function. What Python computed with it
has no identity to follow, so the text is read: starting from the expression at which the value left, all that holds it
is marked, function by function up the stack, and an operation whose expression holds a mark was computed from it. How
marks spread inside a function is the room below; what an expression holds by them, the one below that.

Limits: code whose text ``linecache`` cannot find is not followed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch._bindings import arguments_of
from gradwatch._held import MarkSets, News, Returned, known_functions
from gradwatch._shapes import WHOLE
from gradwatch._source import Function, Step, called, expression, function
from gradwatch._spread import Marked

if TYPE_CHECKING:
    from collections.abc import Sequence

_INNER = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


@dataclass(frozen=True, slots=True)
class Use:
    """What is known of an operation that may have been computed from the value."""

    step: Step
    """Its place."""
    plain: frozenset[int | str] | None = None
    """Positions and keywords of the arguments that a Python value may have come through; None where
    arguments and text do not correspond."""
    arity: int = 0
    """How many positional arguments it had."""
    callers: tuple[Step, ...] = ()
    """The calls around it."""


class Marks:
    """What depends on one value that left torch.

    A name is marked for its *data* when it was computed from the value, and as *chosen* when the value
    only decided what it is: in a branch, by a loop's length, as an index. A tensor that torch made
    carries no Python data, but it may have been chosen.

    Args:
        stack: Where it left: the user's frames, the innermost first.
        through: The method that torch was left through: `min(a, b)` asks for a truth and hands on a tensor,
            `losses[k]` asks for an index.
    """

    def __init__(self, stack: Sequence[Step], through: str = "") -> None:
        self.shared = MarkSets(News())
        self._functions: dict[ast.AST, Marked] = {}
        self._answers: dict[Use, bool] = {}
        inner = next(iter(stack), None)
        returned = Returned(WHOLE)
        for step in stack:
            if step[0].co_name in _INNER:
                inner = inner or step
                continue
            node = function(step[0])
            if node is None:
                break
            marked = self._marked(step[0].co_filename, node)
            marked.know(step[0].co_freevars)
            # The text of a comprehension belongs to the function around it.
            expr = expression(inner or step, node)
            marked.seed(expr, Returned(chosen=True) if _only_chooses(expr, through) else returned)
            inner, returned, through = None, marked.returned, ""
            if not (returned.shape or returned.chosen or self.shared):
                break

    def hold(self, use: Use) -> bool:
        """Tell whether an operation was computed from the value, or chosen by it."""
        if use not in self._answers:
            self._answers[use] = self._holds(use)
        return self._answers[use]

    def chose(self, step: Step) -> bool:
        """Tell whether the value decided what an expression is, without being part of it."""
        marked = self._around(step)
        found = None if marked is None else expression(step, marked.node)
        return (
            marked is not None
            and found is not None
            and (marked.governs(found) or marked.chooses(found))
        )

    def _holds(self, use: Use) -> bool:
        marked = self._around(use.step)
        found = None if marked is None else expression(use.step, marked.node)
        if marked is not None and found is not None:
            # The operation itself is torch's, also where a function of the file bears its name.
            parts = [*arguments_of(found), found.func] if isinstance(found, ast.Call) else [found]
            if marked.governs(found) or any(map(marked.chooses, parts)):
                return True
            operands = parts if use.plain is None else _operands(found, use)
            if any(map(marked.depends, operands)):
                return True
        return use.plain != frozenset() and any(map(self._passes, use.callers))

    def _passes(self, caller: Step) -> bool:
        """Tell whether a call was handed the value."""
        marked = self._around(caller)
        call = None if marked is None else expression(caller, marked.node)
        if marked is None or not isinstance(call, ast.Call):
            return False
        if known_functions(caller[0].co_filename, call):
            return False  # its text is known, and says which of its arguments go where
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        # A function or an object may carry the value: a closure, a `partial`, a module that was set up.
        given.append(call.func)
        return any(marked.depends(argument) for argument in given)

    def _around(self, step: Step) -> Marked | None:
        code = step[0]
        if code.co_name in _INNER:
            return next((m for m in self._functions.values() if m.covers(step)), None)
        node = function(code)
        return None if node is None else self._functions.get(node) or self._reached(step, node)

    def _reached(self, step: Step, node: Function) -> Marked | None:
        """Return the marks of a function that the value reaches through names outside of it."""
        code = step[0]
        outer = [m for m in self._functions.values() if m.names_among(code.co_freevars)]
        if not (outer or self.shared):
            return None
        marked = self._marked(code.co_filename, node)
        for around in outer:
            marked.take_up(around, code.co_freevars)
        marked.spread()
        return marked

    def _marked(self, file: str, node: Function) -> Marked:
        if node not in self._functions:
            self._functions[node] = Marked(file, node, self.shared, self._marked)
        return self._functions[node]


def _only_chooses(node: ast.AST | None, through: str) -> bool:
    """Tell whether an expression in which a value was asked for hands on something else, by the answer."""
    if isinstance(node, ast.Subscript):
        return through == "__index__"
    if isinstance(node, ast.BoolOp):
        return through == "__bool__"
    if isinstance(node, ast.Call) and called(node) in _CHOOSERS:
        return through == "__bool__" or any(keyword.arg == "key" for keyword in node.keywords)
    return False


_CHOOSERS = frozenset(["min", "max", "sorted", "nlargest", "nsmallest"])
"""Functions that hand on some of what they are given, by the order of something else."""


def _operands(node: ast.AST, use: Use) -> list[ast.AST]:
    """Return the operands of an expression that stand for the plain arguments of its call."""
    plain = use.plain or frozenset()
    if isinstance(node, ast.BinOp) and len(plain) == 1:
        # `2 * x` calls a method of x: its side says nothing, but a constant tells.
        sides: list[ast.AST] = [node.left, node.right]
        constants: list[ast.AST] = [s for s in sides if isinstance(s, ast.Constant)]
        return constants if len(constants) == 1 else sides
    if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
        receiver = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        texts = [receiver, *node.args] if use.arity > len(node.args) else node.args
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        found = [texts[k] for k in plain if isinstance(k, int) and k < len(texts)]
        if any(isinstance(k, str) and k not in named for k in plain):
            found.append(node.func)  # a `partial` brings what the text does not show
        return [*found, *(named[k] for k in plain if isinstance(k, str) and k in named)]
    if isinstance(node, ast.Call):
        return [*arguments_of(node), node.func] if plain else []
    return [node] if plain else []
