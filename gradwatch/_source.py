"""What the text of the user's code says, read as a syntax tree.

What this room knows that no other does: which node of the text an instruction stands for, which functions and
classes a file defines, and where a value was wrapped anew around an expression.

Limits: code whose text ``linecache`` cannot find is not read.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import sys
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Step = tuple[CodeType, int]
"""A code object and the instruction that was running."""

FILLERS = frozenset(
    ["append", "appendleft", "extend", "add", "insert", "update", "setdefault", "put"]
)
"""Methods that put their arguments into a container."""
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Module


_trees: dict[str, tuple[list[str], ast.Module | None]] = {}
"""For each file its lines, as ``linecache`` holds them, and their syntax."""


def tree(file: str) -> ast.Module | None:
    """Return the syntax tree of a file, or None where its text is not to be had."""
    lines = linecache.getlines(file)
    known = _trees.get(file)
    if known is None or known[0] is not lines:  # a file that was edited and loaded again
        try:
            known = lines, ast.parse("".join(lines))
        except (SyntaxError, ValueError):
            known = lines, None
        _trees[file] = known
    return known[1]


@lru_cache(maxsize=1024)
def _fresh(code: CodeType) -> None:
    """Read a file anew that has changed, when code is seen that was not seen before."""
    linecache.checkcache(code.co_filename)


def span(step: Step) -> tuple[int, int, int, int] | None:
    """Return the lines and byte columns of an instruction's expression, as ``ast`` counts them."""
    code, instruction = step
    found = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    if found is None or None in found:
        return None
    line, end_line, column, end_column = found
    return line, column, end_line, end_column  # type: ignore[return-value]


def span_of(node: ast.AST) -> tuple[int, int, int, int] | None:
    if not hasattr(node, "lineno"):
        return None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def function(code: CodeType) -> Function | None:
    """Return the syntax of the function that a code object was compiled from."""
    _fresh(code)
    return _function(code, tree(code.co_filename))


@lru_cache(maxsize=1024)
def _function(code: CodeType, module: ast.Module | None) -> Function | None:
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
        place = span_of(node)
        if place is not None and place[:2] <= start and place[2:] >= end:
            best = node
    return best


def is_of_arguments(step: Step, *, given: bool = False) -> bool:
    """Tell whether an expression reads arguments of its function alone: then the caller has chosen them.

    Args:
        step: The place of the expression.
        given: Whether of a call only what it is given counts, and not what is called.
    """
    code = step[0]
    inside = function(code)
    read = None if inside is None else expression(step, inside)
    if inside is None or read is None:
        return False
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self", "cls"}
    loops = [node for node in own_nodes(inside) if isinstance(node, (ast.For, ast.comprehension))]
    # What a loop takes out of an argument was chosen with it.
    taken = {
        name.id: loop
        for loop in loops
        if root_of(loop.iter) in arguments
        for name in ast.walk(loop.target)
        if isinstance(name, ast.Name)
    }
    arguments |= taken.keys()
    own = {id(name) for loop in taken.values() for name in ast.walk(loop.target)}
    # What is changed in place stays what the caller gave.
    own |= {id(node.target) for node in own_nodes(inside) if isinstance(node, ast.AugAssign)}
    changed = {
        node.id
        for node in own_nodes(inside)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in own
    }
    parts: list[ast.AST] = [read]
    if given and isinstance(read, ast.Call):
        parts = [*read.args, *read.keywords]
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    names &= {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return bool(names) and names <= arguments - changed


def attributes_in(code: CodeType) -> frozenset[str]:
    """Return the names of the attributes that a function reads or sets."""
    inside = function(code)
    nodes = () if inside is None else ast.walk(inside)
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))


@lru_cache(maxsize=256)
def definitions(
    module: ast.Module | None,
) -> dict[str, tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]]:
    """Return the functions of a file by their names; methods of several classes may share one."""
    found: dict[str, tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]] = {}
    for node in () if module is None else ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = (*found.get(node.name, ()), node)
    return found


@lru_cache(maxsize=256)
def owner_of(module: ast.Module | None) -> dict[ast.AST, str]:
    return {
        method: cls.name
        for cls in (() if module is None else ast.walk(module))
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
    }


def targets_of(node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def own_nodes(function_: ast.AST) -> Iterator[ast.AST]:
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

    @property
    def attribute(self) -> str:
        """The name of what it assigns to; empty where it assigns nothing."""
        before, equals, _ = self.text.partition(" = ")
        return before.strip().rpartition(".")[2] if equals else ""


def class_nodes(file: str, qualname: str) -> tuple[ast.ClassDef, ...]:
    """Return the definitions of a class in a file."""
    module = tree(file)
    return () if module is None else classes_in(module, qualname)


def classes_in(module: ast.Module, qualname: str) -> tuple[ast.ClassDef, ...]:
    """Return the definitions of a class: several of one name where none has its very path."""
    paths = _paths_of_classes(module)
    exact = paths.get(qualname.replace("<locals>.", ""))
    last = qualname.rpartition(".")[2]
    return exact or tuple(
        node for path, nodes in paths.items() if path.rpartition(".")[2] == last for node in nodes
    )


@lru_cache(maxsize=256)
def _paths_of_classes(module: ast.Module) -> dict[str, tuple[ast.ClassDef, ...]]:
    """Return the classes of a file by the names of what they are defined in, and their own."""
    found: dict[str, tuple[ast.ClassDef, ...]] = {}
    todo: deque[tuple[str, ast.AST]] = deque([("", module)])
    while todo:
        path, node = todo.popleft()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            path = f"{path}.{node.name}" if path else node.name
        if isinstance(node, ast.ClassDef):
            found[path] = (*found.get(path, ()), node)
        todo.extend((path, child) for child in ast.iter_child_nodes(node))
    return found


def file_of(cls: type) -> str | None:
    """Return the file that a class was defined in, or what stands for one in a notebook, where it has any."""
    file: str | None = getattr(sys.modules.get(cls.__module__), "__file__", None)
    methods = (getattr(value, "__func__", value) for value in vars(cls).values())
    own = [inspect.unwrap(method) for method in methods if isinstance(method, FunctionType)]
    typed = [method.__code__.co_filename for method in own if isinstance(method, FunctionType)]
    for name in dict.fromkeys([*typed, *([] if file is None else [file])]):
        module = tree(name)
        if module is not None and classes_in(module, cls.__qualname__):
            return name
    return file


def statements_of(file: str, found: Iterable[ast.AST]) -> list[Statement]:
    lines = [place[0] for place in map(span_of, found) if place is not None]
    return [Statement(file, line, linecache.getline(file, line).strip()) for line in lines]


def root_of(node: ast.AST) -> str:
    """Return the name that a chain of attributes, items and calls begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def line_at(file: str, line: int) -> str:
    """Return a line of a file."""
    return linecache.getline(file, line).strip()


def text_of(step: Step) -> str:
    """Return the line that an instruction stands in."""
    place = span(step)
    return "" if place is None else linecache.getline(step[0].co_filename, place[0])


def flat_targets(
    node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr,
) -> Iterator[ast.expr]:
    for target in targets_of(node):
        yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else (target,)


@dataclass(frozen=True, slots=True)
class Text:
    """An expression in a file, found by reading the text."""

    file: str
    span: tuple[int, int, int, int]
    """First line, first byte column, last line, byte column behind the last one."""
    function: str
    """Qualified name of the function that holds it."""


def wrapping(reader: Step, maker: Step | None) -> Text | None:
    """Return the call that wrapped a computed value as ``nn.Parameter``.

    Args:
        reader: Where the wrapped tensor was first used.
        maker: Where the value under it was computed.
    """
    around = None if maker is None else _wrap_around(maker)
    return around or _wrap_before(reader)


def _wrap_around(step: Step) -> Text | None:
    """Return the wrap in whose argument an expression stands, or a name for it: ``nn.Parameter(w + noise)``."""
    node = function(step[0])
    inner = None if node is None else expression(step, node)
    if node is None or inner is None:
        return None
    names = {
        target.id
        for statement in own_nodes(node)
        if isinstance(statement, ast.Assign) and any(part is inner for part in ast.walk(statement))
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    calls = [
        call
        for call in _wraps_in(node)
        if any(part is inner for part in ast.walk(call))
        or any(isinstance(a, ast.Name) and a.id in names for a in call.args)
    ]
    return _text(step[0], calls[-1]) if calls else None


def _wrap_before(step: Step) -> Text | None:
    """Return the wrap that gave a name its value which an expression uses, in a helper of the file too."""
    code = step[0]
    node = function(code)
    used = None if node is None else expression(step, node)
    if node is None or used is None:
        return None
    names = {inner.id for inner in ast.walk(used) if isinstance(inner, ast.Name)}
    makers = [
        statement.value
        for statement in ast.walk(node)
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
        and statement.value is not None
        and statement.lineno <= used.lineno  # type: ignore[attr-defined]
        and any(isinstance(t, ast.Name) and t.id in names for t in flat_targets(statement))
    ]
    for call in (c for maker in makers for c in _wraps_in(maker)):
        return _text(code, call)
    module = tree(code.co_filename)
    for maker in (m for m in (*makers, used) if isinstance(m, ast.Call)):
        helpers = definitions(module).get(called(maker), ())
        calls = [call for helper in helpers for call in _wraps_in(helper)]
        if len(calls) == 1:
            owner = owner_of(module).get(helpers[0])
            name = f"{owner}.{helpers[0].name}" if owner else helpers[0].name
            return _text(code, calls[0], name)
    return None


def _wraps_in(node: ast.AST) -> list[ast.Call]:
    calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
    return [call for call in calls if called(call) in {"Parameter", "Variable"}]


def _text(code: CodeType, node: ast.AST, name: str | None = None) -> Text | None:
    place = span_of(node)
    return None if place is None else Text(code.co_filename, place, name or code.co_qualname)


def called(call: ast.Call) -> str:
    function_ = call.func
    if isinstance(function_, ast.Attribute):
        return function_.attr
    return function_.id if isinstance(function_, ast.Name) else ""
