"""Where the user's text keeps what a line reads, or what is made at one: attributes, containers, records, decorators.

What this room knows that no other does: how to get from an expression to the statement that put its value where it
was found, and to the call that handed it in.

Limits: as in ``_statements``; a name that several functions of a file have is taken for one.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from gradwatch._nearby import functions_around, is_in_line
from gradwatch._source import (
    FILLERS,
    Statement,
    Step,
    called,
    expression,
    flat_targets,
    function,
    last_name,
    own_nodes,
    owner_of,
    span,
    statements_of,
    tree,
)
from gradwatch._statements import keeping_rank

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_FILLING = 0
"""The rank of what is put into a container."""

_KEEP_NOTHING = frozenset(
    [
        "property",
        "staticmethod",
        "classmethod",
        "abstractmethod",
        "override",
        "no_grad",
        "enable_grad",
        "inference_mode",
        "compile",
        "contextmanager",
        "wraps",
        "overload",
        "autocast",
        "custom_fwd",
        "jit",
        "script",
    ]
)
"""Decorators that are known to keep no result of the function."""


def stores(step: Step) -> list[Statement]:
    """Return where a file keeps what an expression is given, the tellest statement first.

    Args:
        step: The place of the expression.
    """
    code = step[0]
    node = function(code)
    module = tree(code.co_filename)
    inside = node or module  # of a comprehension, which is a function of its own before Python 3.12
    read = None if inside is None else expression(step, inside)
    if read is None or module is None:
        return []
    functions = [
        n for n in ast.walk(module) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    names = _given_names(read, {n.name: n for n in functions})
    names |= _containers(names, inside or module)
    homes = owner_of(module)
    mine = None if node is None else homes.get(node)
    found: list[tuple[int, bool, ast.AST]] = [
        (rank, homes.get(definition) != mine, kept)
        for definition in [*functions, module]
        for kept in own_nodes(definition)
        for name in names
        if (rank := keeping_rank(kept, name, getattr(definition, "name", ""))) is not None
    ]
    # An object is filled where it is made: `Transition(state, log_prob)`.
    made = {
        cls.name
        for cls in ast.walk(module)
        if isinstance(cls, ast.ClassDef) and _has_fields(cls, names)
    }
    calls = [n for n in ast.walk(module) if isinstance(n, ast.Call) and called(n) in made]
    found += [(1, False, call) for call in calls]
    # What a closure uses of the function around it, and a function of its file, was computed there.
    outer = {*code.co_freevars, *code.co_names} & names
    given = {*code.co_varnames[: code.co_argcount]} & names - {"self"}
    for definition in [*functions, module]:
        nodes = list(own_nodes(definition))
        shared = {name for n in nodes if isinstance(n, ast.Global) for name in n.names}
        if definition is module or node in nodes or shared & outer:
            found += [(1, False, kept) for kept in nodes if _computes(kept, outer)]
        # What a function is given was perhaps computed under the same name elsewhere.
        found += [(6, True, kept) for kept in nodes if _computes(kept, given)]
    return statements_of(code.co_filename, [n for *_, n in sorted(found, key=lambda f: f[:2])])


def owner_stores(step: Step, name: str) -> list[Statement]:
    """Return where a file keeps that of which a line reads an attribute: `self.xys` of `self.xys.grad.norm()`."""
    inside, line = function(step[0]) or tree(step[0].co_filename), span(step)
    nodes = () if inside is None or line is None else ast.walk(inside)
    owners = {
        last_name(node.value)
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == name and is_in_line(node, line)
    }
    return _kept_under(step[0].co_filename, owners)


def argument_stores(step: Step) -> list[Statement]:
    """Return where a file keeps what a call is given first: `self.tokens` of `Adam(self.tokens, lr=self.lr)`."""
    inside = function(step[0]) or tree(step[0].co_filename)
    read = None if inside is None else expression(step, inside)
    given = read.args[:1] if isinstance(read, ast.Call) else []
    attributes = (
        node for arg in given for node in ast.walk(arg) if isinstance(node, ast.Attribute)
    )
    return _kept_under(step[0].co_filename, {node.attr for node in attributes})


def argument_fillings(step: Step) -> list[Statement]:
    """Return where a file fills the container that a call is given first: `np.log10(self.losses)`, or `log10(losses)`."""
    inside = function(step[0]) or tree(step[0].co_filename)
    read = None if inside is None else expression(step, inside)
    given = read.args[:1] if isinstance(read, ast.Call) else []
    names = {last_name(arg) for arg in given} - {""}
    return _kept_under(step[0].co_filename, names, most=_FILLING)


def _kept_under(file: str, names: Collection[str], most: int | None = None) -> list[Statement]:
    """Return where a file keeps something under some names, the tellest statement first, up to a rank."""
    module = tree(file)
    ranked = [
        (rank, node)
        for node in (() if module is None else ast.walk(module))
        for name in names
        if (rank := keeping_rank(node, name, "")) is not None and (most is None or rank <= most)
    ]
    return statements_of(file, [node for _, node in sorted(ranked, key=lambda pair: pair[0])])


def stored_after(file: str, line: int) -> list[Statement]:
    """Return where a function keeps, in an attribute or an element, what is made of the name that a line assigns."""
    around = functions_around(tree(file), line)
    nodes = list(own_nodes(around[-1])) if around else []
    assigns = [n for n in nodes if isinstance(n, ast.Assign)]
    made = [n for n in assigns if n.lineno == line]
    names = {t.id for n in made for t in flat_targets(n) if isinstance(t, ast.Name)}
    kept = [
        n
        for n in assigns
        if n.lineno > line
        and any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in flat_targets(n))
        and names & {i.id for i in ast.walk(n.value) if isinstance(i, ast.Name)}
    ]
    return statements_of(file, kept)


def fillings(step: Step) -> list[Statement]:
    """Return where a file fills the attribute from which a loop takes what an expression is given."""
    inside, module = function(step[0]) or tree(step[0].co_filename), tree(step[0].co_filename)
    read = None if inside is None else expression(step, inside)
    if inside is None or module is None or read is None:
        return []
    names = _containers({n.id for n in ast.walk(read) if isinstance(n, ast.Name)}, inside)
    found = [n for n in ast.walk(module) if any(keeping_rank(n, name, "") == 0 for name in names)]
    return statements_of(step[0].co_filename, found)


def _containers(names: set[str], inside: ast.AST) -> set[str]:
    """Return the attributes from which loops take values of some names: `frames` of `for old in self.frames`."""
    loops = [n for n in ast.walk(inside) if isinstance(n, (ast.For, ast.comprehension))]
    return {
        loop.iter.attr
        for loop in loops
        if isinstance(loop.iter, ast.Attribute) and last_name(loop.target) in names
    }


def _has_fields(cls: ast.ClassDef, names: set[str]) -> bool:
    """Tell whether a class declares one of some names as a field, as dataclasses and named tuples do."""
    fields = (node.target for node in cls.body if isinstance(node, ast.AnnAssign))
    return any(isinstance(field, ast.Name) and field.id in names for field in fields)


def _computes(node: ast.AST, names: set[str]) -> bool:
    """Tell whether a statement gives one of some names what a call returns."""
    return (
        isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
        and any(isinstance(inner, ast.Call) for inner in ast.walk(node.value))
    )


def outer_assignment(step: Step) -> Statement | None:
    """Return what assigned a name that an expression reads, in a function around its own, by a call."""
    code = step[0]
    inside, module = function(code), tree(code.co_filename)
    read = None if inside is None else expression(step, inside)
    if read is None or module is None or not code.co_freevars:
        return None
    names = {n.id for n in ast.walk(read) if isinstance(n, ast.Name)} & {*code.co_freevars}
    for outer in ast.walk(module):
        nodes = list(own_nodes(outer)) if isinstance(outer, ast.FunctionDef) else []
        if inside in nodes:
            found = [n for n in nodes if _computes(n, names)]
            if found:
                return statements_of(code.co_filename, found)[0]
    return None


def keeping_decorators(file: str, line: int) -> list[Statement]:
    """Return the decorators of the innermost function that a line stands in, as far as they may keep its results."""
    around = functions_around(tree(file), line)
    if not around:
        return []
    decorators = around[-1].decorator_list
    named = {last_name(n.func if isinstance(n, ast.Call) else n): n for n in decorators}
    return statements_of(file, [node for name, node in named.items() if name not in _KEEP_NOTHING])


def calls_kept(step: Step, reader: Step) -> list[Statement]:
    """Return where a file keeps, in an attribute or an element, what a function returns, for others to read.

    Args:
        step: A place in that function.
        reader: The place that reads what was kept: a function that keeps a result for itself alone is none of these.
    """
    own, module, reads = function(step[0]), tree(step[0].co_filename), function(reader[0])
    name = getattr(own, "name", "")
    if module is None or not name:
        return []
    kept = [
        node
        for definition in ast.walk(module)
        if isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
        and definition not in {own, reads}
        for node in own_nodes(definition)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in flat_targets(node))
        and any(isinstance(c, ast.Call) and called(c) == name for c in ast.walk(node))
    ]
    return statements_of(step[0].co_filename, kept)


def kept_after(step: Step) -> list[Statement]:
    """Return where a function puts the name that it gives a value into a container: `losses.append(loss)`."""
    inside, place = function(step[0]), span(step)
    nodes = [] if inside is None or place is None else list(own_nodes(inside))
    lines = [n for n in nodes if isinstance(n, ast.Assign) and place and n.lineno <= place[0]]
    made = [n for n in lines if place and place[0] <= (n.end_lineno or n.lineno)]
    names = {last_name(target) for n in made for target in n.targets} - {""}
    fillers = [n for n in nodes if isinstance(n, ast.Call) and called(n) in FILLERS]
    kept = [n for n in fillers if names & {last_name(arg) for arg in n.args}]
    return statements_of(step[0].co_filename, kept)


def keeps_argument(found: Statement) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the method in which a statement keeps what the method is given as it is, if it does."""
    around = functions_around(tree(found.file), found.line)
    if not around:
        return None
    inside = around[-1]
    nodes = [n for n in own_nodes(inside) if getattr(n, "lineno", 0) == found.line]
    kept = [n for n in nodes if isinstance(n, ast.Assign)]
    values = [
        v for n in kept for v in (n.value.elts if isinstance(n.value, ast.Tuple) else [n.value])
    ]
    filling = [n for n in nodes if isinstance(n, ast.Call) and called(n) in FILLERS]
    values += [argument for call in filling for argument in call.args]
    given = {argument.arg for argument in inside.args.args[1:]}
    all_given = all(isinstance(v, ast.Name) and v.id in given for v in values)
    return inside if values and all_given else None


def handed_in(found: Statement) -> Statement | None:
    """Return the only call that hands in what a statement keeps: `Kernel(scale.exp())` of `self.scale = scale`."""
    module, inside = tree(found.file), keeps_argument(found)
    if module is None or inside is None:
        return None
    name = inside.name
    if name == "__init__":
        owners = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef) and inside in n.body]
        name = owners[0].name if owners else ""
    calls = [n for n in ast.walk(module) if isinstance(n, ast.Call) and called(n) == name]
    return statements_of(found.file, calls)[0] if len(calls) == 1 else None


def _given_names(read: ast.AST, definitions: Mapping[str, ast.AST]) -> set[str]:
    """Return the names of attributes and containers that an expression takes its operands from."""
    given: list[ast.AST] = [read]
    if isinstance(read, ast.Call):
        given = [*read.args, *(k.value for k in read.keywords)]
        if isinstance(read.func, ast.Attribute) and not isinstance(read.func.value, ast.Name):
            given.append(read.func.value)  # of `self.prior.log_prob(x)` the object is given too
    names: set[str] = set()
    # Of `self.prior.dist` the last name tells; of `self.memory.sum()` the one before the method.
    within = {
        id(inner.value)
        for value in given
        for inner in ast.walk(value)
        if isinstance(inner, ast.Attribute)
    } - {
        id(inner.func.value)
        for value in given
        for inner in ast.walk(value)
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
    }
    for inner in (node for value in given for node in ast.walk(value) if id(node) not in within):
        if isinstance(inner, ast.Call) and called(inner) in definitions:
            for returned in ast.walk(definitions[called(inner)]):
                if isinstance(returned, ast.Return) and returned.value is not None:
                    names |= {last_name(n) for n in ast.walk(returned.value)}
        names.add(last_name(inner))
    return names - {""}
