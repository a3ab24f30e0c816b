"""What the text of the user's functions says about values that no trace can follow.

What this room knows that no other does: where a value goes after it left tensors for Python. A float
has no identity to follow, so the text is read instead: starting from the expression at which the value
left, names, attributes, containers, return values and branches that depend on it are marked, function
by function up the stack, and an operation whose expression holds a mark was computed from it.

Limits: the reading ignores the order of statements, so that a name used twice for different things is
marked both times. Code whose text ``linecache`` cannot find is not followed.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import sys
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Step = tuple[CodeType, int]
"""A code object and the instruction that was running."""

_INNER = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_FILLERS = {"append", "appendleft", "extend", "add", "insert", "update", "setdefault", "put"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Module


@lru_cache(maxsize=256)
def tree(file: str) -> ast.Module | None:
    """Return the syntax tree of a file, or None where its text is not to be had."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


def span(step: Step) -> tuple[int, int, int, int] | None:
    """Return the lines and byte columns of an instruction's expression, as ``ast`` counts them."""
    code, instruction = step
    found = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    if found is None or None in found:
        return None
    line, end_line, column, end_column = found
    return line, column, end_line, end_column  # type: ignore[return-value]


def _span_of(node: ast.AST) -> tuple[int, int, int, int] | None:
    if not hasattr(node, "lineno"):
        return None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def function(code: CodeType) -> _Function | None:
    """Return the syntax of the function that a code object was compiled from."""
    module = tree(code.co_filename)
    if module is None or code.co_name == "<module>":
        return module
    for node in ast.walk(module):
        if isinstance(node, ast.Lambda):
            if code.co_name == "<lambda>" and node.lineno == code.co_firstlineno:
                return node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            if node.name == code.co_name and code.co_firstlineno in lines:
                return node
    return None


def expression(step: Step, inside: ast.AST) -> ast.AST | None:
    """Return the node that an instruction stands for: the smallest one that covers its text."""
    wanted = span(step)
    if wanted is None:
        return None
    start, end = wanted[:2], wanted[2:]
    best: ast.AST | None = None
    for node in ast.walk(inside):
        place = _span_of(node)
        if place is not None and place[:2] <= start and place[2:] >= end:
            best = node
    return best


class Marks:
    """What depends on one value that left torch.

    Args:
        stack: Where it left: the user's frames, the innermost first.
    """

    def __init__(self, stack: Sequence[Step]) -> None:
        self.attributes: set[str] = set()
        self._functions: dict[CodeType, _Marked] = {}
        self._answers: dict[Step, bool] = {}
        steps = [step for step in stack if step[0].co_name not in _INNER]
        inner = next(iter(stack), None)
        for code, instruction in steps:
            # The text of a comprehension belongs to the function around it.
            seed = inner if inner is not None else (code, instruction)
            inner = None
            node = function(code)
            if node is None:
                break
            marked = self._functions.setdefault(code, _Marked(node, self.attributes))
            marked.seed(expression(seed, node))
            if not marked.returns:
                break

    def hold(self, step: Step) -> bool:
        """Tell whether the expression at a step was computed from the value."""
        if step not in self._answers:
            self._answers[step] = self._holds(step)
        return self._answers[step]

    def _holds(self, step: Step) -> bool:
        code = step[0]
        node = function(code) if code.co_name not in _INNER else tree(code.co_filename)
        if node is None:
            return False
        marked = self._functions.get(code)
        if marked is None:
            if code.co_name in _INNER:
                marked = next((m for m in self._functions.values() if m.covers(step)), None)
            if marked is None:
                if not self.attributes:
                    return False
                marked = _Marked(node, self.attributes)
        found = expression(step, node)
        return found is not None and (marked.depends(found) or marked.governs(found))


class _Marked:
    """The marks inside one function."""

    def __init__(self, node: _Function, attributes: set[str]) -> None:
        self.node = node
        self.names: set[str] = set()
        self.attributes = attributes
        self.returns = False
        self._seeds: set[ast.AST] = set()
        self._governed: set[ast.AST] = set()

    def covers(self, step: Step) -> bool:
        wanted, own = span(step), _span_of(self.node)
        return wanted is not None and own is not None and own[:2] <= wanted[:2] <= own[2:]

    def seed(self, node: ast.AST | None) -> None:
        """Mark an expression, and all that follows from it."""
        if node is None:
            return
        self._seeds.add(node)
        size = -1
        while size != (size := len(self.names) + len(self.attributes) + len(self._governed)):
            for statement in _own_nodes(self.node):
                self._visit(statement)
        if isinstance(self.node, ast.Lambda):
            self.returns = self.depends(self.node.body)

    def depends(self, node: ast.AST) -> bool:
        """Tell whether an expression holds anything marked."""
        return any(
            inner in self._seeds
            or (isinstance(inner, ast.Name) and inner.id in self.names)
            or (isinstance(inner, ast.Attribute) and inner.attr in self.attributes)
            for inner in ast.walk(node)
        )

    def governs(self, node: ast.AST) -> bool:
        """Tell whether a node stands in a branch that a marked value chose."""
        return any(node in ast.walk(branch) for branch in self._governed)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            if node.value is not None:
                self._assign(_targets(node), node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._assign([node.target], node.iter)
            if not isinstance(node, ast.comprehension) and self.depends(node.iter):
                self._governed.update(node.body)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._assign([node.optional_vars], node.context_expr)
        elif isinstance(node, ast.Call):
            self._fill(node)
        elif isinstance(node, (ast.If, ast.While)) and self.depends(node.test):
            self._governed.update((*node.body, *node.orelse))
        elif isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:
            self.returns |= self.depends(node.value) or self.governs(node)

    def _assign(self, targets: Iterable[ast.AST], value: ast.AST) -> None:
        marked = self.depends(value)
        for target in targets:
            if (
                isinstance(target, (ast.Tuple, ast.List))
                and isinstance(value, (ast.Tuple, ast.List))
                and len(target.elts) == len(value.elts)
            ):
                for one, other in zip(target.elts, value.elts, strict=True):
                    self._assign([one], other)
            elif marked or self.governs(target):
                self._mark(target)

    def _mark(self, target: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self.names.add(target.id)
        elif isinstance(target, ast.Attribute):
            self.attributes.add(target.attr)
        elif isinstance(target, (ast.Subscript, ast.Starred)):
            self._mark(target.value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._mark(element)

    def _fill(self, call: ast.Call) -> None:
        """Mark a container into which a marked value was put."""
        method = call.func
        if isinstance(method, ast.Attribute) and method.attr in _FILLERS:
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            if any(self.depends(value) for value in values):
                self._mark(method.value)


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _own_nodes(function_: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions defined inside it."""
    todo = list(ast.iter_child_nodes(function_))
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            todo.extend(ast.iter_child_nodes(node))


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement in a file that explains an error, found by reading the text."""

    file: str
    line: int
    text: str


def _classes(module: ast.Module, qualname: str) -> Iterator[ast.ClassDef]:
    wanted = qualname.rpartition(".")[2]
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name == wanted:
            yield node


def file_of(cls: type) -> str | None:
    """Return the file that a class was defined in, where it has one."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None)


def _statements(file: str, found: Iterable[ast.AST]) -> list[Statement]:
    lines = [place[0] for place in map(_span_of, found) if place is not None]
    return [Statement(file, line, linecache.getline(file, line).strip()) for line in lines]


def attribute_assignments(cls: type, name: str) -> list[Statement]:
    """Return where the methods of a class, or of those it inherits from, assign an attribute."""
    for base in cls.__mro__:
        file = file_of(base)
        module = None if file is None else tree(file)
        if file is None or module is None:
            continue
        found = [
            node
            for definition in _classes(module, base.__qualname__)
            for node in ast.walk(definition)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
            and any(isinstance(t, ast.Attribute) and t.attr == name for t in _flat_targets(node))
        ]
        if found:
            return _statements(file, found)
    return []


def freezings(cls: type) -> list[Statement]:
    """Return where the file of a class switches ``requires_grad`` off, its own methods first."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    own = [n for c in _classes(module, cls.__qualname__) for n in ast.walk(c) if _freezes(n)]
    return _statements(file, own or [n for n in ast.walk(module) if _freezes(n)])


def _freezes(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return any(
            isinstance(target, ast.Attribute) and target.attr == "requires_grad"
            for target in node.targets
        )
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"requires_grad_", "freeze"}
    )


def _flat_targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> Iterator[ast.expr]:
    for target in _targets(node):
        yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else (target,)
