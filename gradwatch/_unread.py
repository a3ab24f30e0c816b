"""Why nothing read a parameter or a module, as far as the text of its owner's class tells.

What this room knows that no other does: which methods of a class read an attribute, and under which conditions. The
statement made is one about the text, so that it is true whatever ran.

Limits: only ``self.name`` counts as reading. A class that may reach its attributes by other ways (``getattr``,
``children()``, a forward of torch's own, ``other.name`` in its file) is left alone.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gradwatch import _source, _statements

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType

_OTHER_WAYS = frozenset(
    [
        *("getattr", "vars", "eval", "exec", "__dict__", "_modules", "_parameters"),
        *("children", "named_children", "modules", "named_modules"),
        *("get_submodule", "get_parameter"),
    ]
)
_MOST_PARTS = 3
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Conditions = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A line at which a method reads an attribute, and what has to hold for it."""

    file: str
    line: int
    method: str
    conditions: _Conditions = ()


def readings(cls: type, name: str) -> list[Reading] | None:
    """Return where a class reads an attribute, None where its text does not tell, or does not explain it.

    Args:
        cls: The class of a module.
        name: The attribute, which is a parameter or a module.
    """
    found: list[Reading] = []
    for base in cls.__mro__:
        if _reads_nothing(base):
            continue
        file = _source.file_of(base)
        bodies = [] if file is None else _source.class_nodes(file, base.__qualname__)
        if file is None or not bodies or base.__module__.startswith("torch."):
            return None
        if _is_reached_otherwise(file, bodies, name):
            return None
        try:
            found += dict.fromkeys(r for body in bodies for r in _in_class(file, body, name))
        except RecursionError:  # an expression of a thousand terms
            return None
    plain = any(r.method == "forward" and not r.conditions for r in found)
    return None if plain or len(found) > _MOST_PARTS else found


def passed_over(code: CodeType) -> tuple[str, Reading] | None:
    """Return the first argument that a function reads at one place, under conditions, or not at all.

    Args:
        code: That of a function.
    """
    inside = _source.function(code)
    if not isinstance(inside, _FUNCTIONS):
        return None
    nodes = [(n, given) for n, given in _in_block(inside.body, ()) if isinstance(n, ast.Name)]
    for argument in (*inside.args.args, *inside.args.kwonlyargs):
        found = [
            Reading(code.co_filename, node.lineno, inside.name, given)
            for node, given in nodes
            if node.id == argument.arg and isinstance(node.ctx, ast.Load)
        ]
        once = len(found) <= 1 and all(reading.conditions for reading in found)
        if argument.arg != "self" and once:
            unread = Reading(code.co_filename, argument.lineno, inside.name)
            return argument.arg, next(iter(found), unread)
    return None


def ignoring_functions(file: str) -> list[_source.Statement]:
    """Return the one function in another one that reads none of its arguments, and what it returns, if there is one.

    What it computes from is then what the function around it holds.
    """
    module = _source.tree(file)
    outer = [n for n in (() if module is None else ast.walk(module)) if isinstance(n, _FUNCTIONS)]
    found: list[list[ast.AST]] = []
    inside = (node for around in outer for part in around.body for node in ast.walk(part))
    for node in dict.fromkeys(inside):
        if isinstance(node, ast.FunctionDef):
            own = {a.arg for a in (*node.args.posonlyargs, *node.args.args)} - {"self", "cls"}
            inner = [n for part in node.body for n in ast.walk(part)]
            names = {n.id for n in inner if isinstance(n, ast.Name)}
            returns = [n for n in inner if isinstance(n, ast.Return) and n.value is not None]
            if own and returns and own.isdisjoint(names):
                found.append([node, returns[-1]])
    return _source.statements_of(file, found[0]) if len(found) == 1 else []


def settings(cls: type, name: str) -> dict[str, list[_source.Statement]]:
    """Return where a file sets the attributes on which the reading of another one depends, by their names.

    The calls that hand a value to a setter come first: the one that does not fit is among them.
    """
    found: dict[str, list[_source.Statement]] = {}
    for reading in readings(cls, name) or ():
        for test in map(ast.parse, reading.conditions):
            for node in ast.walk(test):
                if isinstance(node, ast.Attribute) and _source.root_of(node) == "self":
                    found[node.attr] = _statements.settings(reading.file, node.attr)
    return {attribute: statements for attribute, statements in found.items() if statements}


def _reads_nothing(base: type) -> bool:
    home = base.__module__.partition(".")[0]
    if issubclass(base, nn.Module):  # a user's file may have the name of a standard module
        return base is nn.Module or home in {"pytorch_lightning", "lightning"}
    return home in sys.stdlib_module_names


def _is_reached_otherwise(file: str, bodies: Iterable[ast.ClassDef], name: str) -> bool:
    for method in (method for body in bodies for method in body.body):
        made_here = getattr(method, "name", "") == "__init__"
        nodes = () if made_here else ast.walk(method)
        if any(_source.last_name(node) in _OTHER_WAYS for node in nodes):
            return True
    module = _source.tree(file)
    loads = () if module is None else (node for node in ast.walk(module) if _loads(node, name))
    return not all(map(_is_of_self, loads))  # another class reads one of its own


def _loads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load)


def _is_of_self(node: ast.AST) -> bool:
    owner = getattr(node, "value", None)
    return isinstance(owner, ast.Name) and owner.id == "self"


def _in_class(file: str, body: ast.ClassDef, name: str) -> Iterator[Reading]:
    for method in body.body:
        if isinstance(method, _FUNCTIONS):
            for node, conditions in _in_block(method.body, ()):
                if _loads(node, name) and _is_of_self(node):
                    yield Reading(file, node.lineno, method.name, conditions)  # type: ignore[attr-defined]


def _in_block(
    block: Iterable[ast.AST], given: _Conditions
) -> Iterator[tuple[ast.AST, _Conditions]]:
    """Yield the nodes of statements that follow one another, each with what has to hold for it to be reached."""
    for statement in block:
        yield from _in_node(statement, given)
        if isinstance(statement, ast.If) and isinstance(statement.body[-1], _ENDS):
            given = (*given, _not(statement.test))


def _in_node(node: ast.AST, given: _Conditions) -> Iterator[tuple[ast.AST, _Conditions]]:
    yield node, given
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _in_node(node.test, given)
        body, orelse = (
            part if isinstance(part, list) else [part] for part in (node.body, node.orelse)
        )
        yield from _in_block(body, (*given, ast.unparse(node.test)))
        yield from _in_block(orelse, (*given, _not(node.test)))
        return
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _in_node(value, given)
            held = ast.unparse(value) if isinstance(node.op, ast.And) else _not(value)
            given = (*given, held)
        return
    for _, field in ast.iter_fields(node):
        if isinstance(field, list):
            yield from _in_block((child for child in field if isinstance(child, ast.AST)), given)
        elif isinstance(field, ast.AST):
            yield from _in_node(field, given)


def _not(test: ast.AST) -> str:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return ast.unparse(test.operand)
    text = ast.unparse(test)
    return (
        f"not {text}" if isinstance(test, (ast.Name, ast.Attribute, ast.Call)) else f"not ({text})"
    )
