"""What stands near a place in the user's text: in the function around it, and where that takes its values from.

What this room knows that no other does: how to get from an instruction to the statements that made what it reads,
that call its function, or that it leads to.

Limits: as in ``_statements``; a name that several functions of a file have is taken for one.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from gradwatch._bindings import parameters_given
from gradwatch._shapes import NOWHERE, WHOLE, Shape
from gradwatch._source import (
    Statement,
    Step,
    called,
    class_nodes,
    definitions,
    expression,
    file_of,
    flat_targets,
    function,
    last_name,
    own_nodes,
    root_of,
    span,
    statements_of,
    targets_of,
    tree,
)
from gradwatch._statements import is_call_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from types import CodeType


def only_call(code: CodeType, besides: Step | None = None) -> Statement | None:
    """Return the call of a function in its file, where there is one alone outside of the function around a place."""
    module = tree(code.co_filename)
    line = None if besides is None else span(besides)
    around = [] if line is None else functions_around(module, line[0])
    left_out = frozenset(ast.walk(around[-1])) if around else frozenset()
    calls = [
        node
        for node in (() if module is None else ast.walk(module))
        if isinstance(node, ast.Call)
        and called(node) == code.co_name
        and node not in left_out
        and _may_call(node, function(code))
    ]
    return statements_of(code.co_filename, calls)[0] if len(calls) == 1 else None


def _may_call(call: ast.Call, definition: ast.AST | None) -> bool:
    """Tell whether a call hands over as much as a function needs: a method of another class may have its name."""
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return True
    given = [*call.args, *call.keywords]
    is_open = any(isinstance(each, ast.Starred) for each in call.args)
    is_open = is_open or any(keyword.arg is None for keyword in call.keywords)
    names = [argument.arg for argument in definition.args.args]
    needed = len(names) - (names[:1] in (["self"], ["cls"])) - len(definition.args.defaults)
    return is_open or len(given) >= needed


def is_in_line(node: ast.expr | ast.stmt, line: tuple[int, ...] | None) -> bool:
    """Tell whether a node stands on the first line of a place, or around it."""
    return line is not None and node.lineno <= line[0] <= (node.end_lineno or node.lineno)


def calls_before(step: Step, name: str) -> list[Statement]:
    """Return the statements of a function that call another one by name before an expression, in their order."""
    inside, place = function(step[0]), span(step)
    if inside is None or place is None:
        return []
    simple = [n for n in own_nodes(inside) if isinstance(n, (ast.Assign, ast.Expr, ast.Return))]
    calls = [n for n in simple if any(is_call_of(inner, name) for inner in ast.walk(n))]
    found = sorted(statements_of(step[0].co_filename, calls), key=lambda call: call.line)
    return [call for call in found if call.line <= place[0]]


def other_calls(name: str, known: Sequence[Statement], step: Step | None) -> list[Statement]:
    """Return the other call of a function where its file has two, and what it is handed there that is kept elsewhere.

    Args:
        name: The name of the function.
        known: The one call, where that is known.
        step: A place; without a known call the one behind it, in its function, is meant.
    """
    file = known[0].file if known else step[0].co_filename if step is not None else ""
    module = tree(file)
    simple = [
        n
        for n in (() if module is None else ast.walk(module))
        if isinstance(n, (ast.Assign, ast.Expr, ast.Return))
        and any(is_call_of(inner, name) for inner in ast.walk(n))
    ]
    place = None if step is None else span(step)
    inside = None if step is None else function(step[0])
    mine = frozenset() if inside is None else frozenset(own_nodes(inside))
    behind = [n for n in simple if n in mine and place is not None and n.lineno > place[0]]
    lines = {found.line for found in known}
    others = [n for n in simple if n.lineno not in lines]
    chosen = behind[:1] or (others if known and len(others) == 1 else [])
    return [
        found
        for n in chosen
        for found in statements_of(file, [*_kept_arguments(module, n, name), n])
    ]


def _kept_arguments(module: ast.Module | None, statement: ast.stmt, name: str) -> list[ast.AST]:
    """Return what assigned the names that a call is handed, where that only takes something kept elsewhere."""
    around = functions_around(module, statement.lineno)
    nodes = list(own_nodes(around[-1])) if around else []
    calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and is_call_of(n, name)]
    names = [arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)]
    last = [found[-1] for each in names if (found := assigned(each, nodes, statement.lineno))]
    return [n for n in last if isinstance(n.value, (ast.Attribute, ast.Subscript))]


def returned_after(made: Step, step: Step) -> Statement | None:
    """Return the ``return`` behind a place that hands out the name which another line of the function assigns."""
    inside, first, last = function(made[0]), span(made), span(step)
    if inside is None or first is None or last is None:
        return None
    nodes = list(own_nodes(inside))
    lines = [n for n in nodes if isinstance(n, ast.Assign) and is_in_line(n, first)]
    names = {last_name(target) for n in lines for target in flat_targets(n)} - {""}
    returns = [n for n in nodes if isinstance(n, ast.Return) and n.value and n.lineno > last[0]]
    handing = [n for n in returns if names & {i.id for i in ast.walk(n) if isinstance(i, ast.Name)}]
    found = statements_of(made[0].co_filename, handing[:1])
    return found[0] if found else None


def groups_of(step: Step) -> list[Statement]:
    """Return what assigned the lists of an optimizer's groups: `decayed = [...]` of `SGD([{"params": decayed}])`."""
    home = function(step[0]) or tree(step[0].co_filename)
    read = None if home is None else expression(step, home)
    if not isinstance(read, ast.Call) or not read.args or home is None:
        return []
    nodes, given = list(own_nodes(home)), read.args[0]
    if isinstance(given, ast.Name):
        made = assigned(given.id, nodes, read.lineno)[-1:]
        given = made[0].value if made else given
    values = [
        value
        for group in ast.walk(given)
        if isinstance(group, ast.Dict)
        for key, value in zip(group.keys, group.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "params"
    ]
    names = {n.id for value in values for n in ast.walk(value) if isinstance(n, ast.Name)}
    assigns = [n for name in sorted(names) for n in assigned(name, nodes, read.lineno)[-1:]]
    found = dict.fromkeys(statements_of(step[0].co_filename, assigns))
    return sorted(found, key=lambda each: each.line)


def made_for(step: Step) -> list[Statement]:
    """Return what assigned the name that a call is given first: `params = [...]` of `Adam(params, lr=lr)`."""
    home = function(step[0]) or tree(step[0].co_filename)
    read = None if home is None else expression(step, home)
    given = read.args[0] if isinstance(read, ast.Call) and read.args else None
    if home is None or not isinstance(given, ast.Name) or not isinstance(read, ast.Call):
        return []
    made = assigned(given.id, own_nodes(home), read.lineno)
    return statements_of(step[0].co_filename, made[-1:])


def element_of(found: Statement, path: Iterable[str]) -> Statement:
    """Return the line of an element in a call that a statement assigns: `ReLU()` of `Sequential(Linear(1, 1), ReLU())`."""
    module = tree(found.file)
    nodes = () if module is None else ast.walk(module)
    node: ast.AST | None = next(
        (n.value for n in nodes if isinstance(n, ast.Assign) and n.lineno == found.line), None
    )
    for name in path:
        given = node.args if isinstance(node, ast.Call) else []
        if len(given) == 1 and isinstance(given[0], (ast.List, ast.Tuple)):
            given = given[0].elts
        if not name.isdecimal() or int(name) >= len(given) or _has_stars(given):
            return found
        node = given[int(name)]
    return found if node is None else statements_of(found.file, [node])[0]


def made_within(found: Statement, name: str) -> Statement | None:
    """Return the only call of a class in the functions of the same file that a statement calls, and in theirs."""
    module = tree(found.file)
    nodes = [] if module is None else list(ast.walk(module))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    todo = {called(n) for n in nodes if isinstance(n, ast.Call) and n.lineno == found.line}
    seen, made = set[str](), list[ast.AST]()
    while todo:
        seen |= todo
        inside = [n for f in functions if f.name in todo for n in own_nodes(f)]
        calls = [n for n in inside if isinstance(n, ast.Call)]
        made += [n for n in calls if called(n) == name]
        todo = {called(n) for n in calls} - seen
    statements = statements_of(found.file, made)
    return statements[0] if len(statements) == 1 else None


def _has_stars(given: Iterable[ast.expr]) -> bool:
    return any(isinstance(each, ast.Starred) for each in given)


def returned_by(found: Statement) -> list[Statement]:
    """Return the last ``return`` of the function of the same file that a statement calls for its value."""
    module = tree(found.file)
    nodes = [] if module is None else list(ast.walk(module))
    values = [n.value for n in nodes if isinstance(n, ast.Assign) and n.lineno == found.line]
    names = {called(value) for value in values if isinstance(value, ast.Call)}
    definitions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in names]
    if len(definitions) != 1:
        return []
    returns = [n for n in own_nodes(definitions[0]) if isinstance(n, ast.Return) and n.value]
    return statements_of(found.file, sorted(returns, key=lambda node: node.lineno)[-1:])


def returned_by_name(found: Statement, count: int) -> list[Statement]:
    """Return what a function returns that a call is given first, those of so many values before all others."""
    module = tree(found.file)
    calls = [n for n in (ast.walk(module) if module else ()) if isinstance(n, ast.Call)]
    given = [c.args[0] for c in calls if c.lineno == found.line and c.args]
    names = {node.id for node in given if isinstance(node, ast.Name)}
    returns = [
        node
        for name in sorted(names)
        for definition in definitions(module).get(name, ())
        for node in own_nodes(definition)
        if isinstance(node, ast.Return) and node.value is not None
    ]
    fits = [n for n in returns if isinstance(n.value, ast.Tuple) and len(n.value.elts) == count]
    return statements_of(found.file, fits or returns)


def assigned_before(found: Statement) -> list[Statement]:
    """Return what assigned the local name that a statement keeps: `centers = ...` of `self.centers = centers`."""
    module = tree(found.file)
    for inside in () if module is None else ast.walk(module):
        nodes = list(own_nodes(inside)) if isinstance(inside, ast.FunctionDef) else []
        for node in nodes:
            if isinstance(node, ast.Assign) and node.lineno == found.line:
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                names = [value.id for value in values if isinstance(value, ast.Name)]
                made = [assigned(name, nodes, found.line)[-1:] for name in names]
                return statements_of(found.file, dict.fromkeys(n for each in made for n in each))
    return []


def owner_of_call(step: Step, method: str) -> list[str]:
    """Return the names of the chain whose method a line calls: `model`, `head` of `model.head.parameters()`."""
    inside, line = function(step[0]) or tree(step[0].co_filename), span(step)
    for node in () if inside is None or line is None else ast.walk(inside):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == method
            and is_in_line(node, line)
        ):
            names: list[str] = []
            held = node.func.value
            while isinstance(held, ast.Attribute):
                names.insert(0, held.attr)
                held = held.value
            return [held.id, *names] if isinstance(held, ast.Name) else []
    return []


def functions_around(
    module: ast.Module | None, line: int
) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions that a line is in, the innermost last."""
    found = [
        node
        for node in (() if module is None else ast.walk(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return sorted(found, key=lambda node: node.lineno)


def surrounding(step: Step, name: str) -> Statement | None:
    """Return the ``with``, or the decorator, by which a function of this name is in force around an expression."""
    inside = function(step[0])
    wanted = span(step)
    if inside is None or wanted is None:
        return None
    blocks = [n for n in own_nodes(inside) if isinstance(n, (ast.With, ast.AsyncWith))]
    found = [
        item.context_expr
        for block in blocks
        if block.lineno <= wanted[0] <= (block.end_lineno or block.lineno)
        for item in block.items
    ]
    found += getattr(inside, "decorator_list", [])
    named = [n for n in found if name in {last_name(i) for i in ast.walk(n)}]
    statements = statements_of(step[0].co_filename, named)
    return statements[0] if statements else None


def switch_in_helper(step: Step, names: Collection[str]) -> Statement | None:
    """Return what switches gradients off in a helper that makes the context of a ``with`` around an expression."""
    inside, wanted, module = function(step[0]), span(step), tree(step[0].co_filename)
    if inside is None or wanted is None:
        return None
    blocks = [n for n in own_nodes(inside) if isinstance(n, (ast.With, ast.AsyncWith))]
    helpers = [
        helper
        for block in blocks
        if block.lineno <= wanted[0] <= (block.end_lineno or block.lineno)
        for item in block.items
        if isinstance(item.context_expr, ast.Call)
        for helper in definitions(module).get(called(item.context_expr), ())
    ]
    nodes = [node for helper in helpers for node in own_nodes(helper)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and called(node) in names]
    return statements_of(step[0].co_filename, calls)[0] if calls else None


def switched_off_by(step: Step) -> Statement | None:
    """Return the only call that asks a function to switch gradients off, by what its `with` is given: `mode=False`."""
    inside, wanted, module = function(step[0]), span(step), tree(step[0].co_filename)
    if not isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef)) or module is None:
        return None
    given = {
        argument.id
        for node in own_nodes(inside)
        if isinstance(node, ast.Call)
        and called(node) == "set_grad_enabled"
        and wanted
        and node.lineno <= wanted[0] <= (node.end_lineno or node.lineno)
        for argument in node.args[:1]
        if isinstance(argument, ast.Name)
    }
    calls = [n for n in ast.walk(module) if isinstance(n, ast.Call) and called(n) == inside.name]
    off = [call for call in calls if given & parameters_given(call, inside, _falsehood).keys()]
    return statements_of(step[0].co_filename, off)[0] if len(off) == 1 else None


def _falsehood(value: ast.AST) -> Shape:
    return WHOLE if isinstance(value, ast.Constant) and value.value is False else NOWHERE


def returned(code: CodeType, index: int | None) -> list[Statement]:
    """Return the last ``return`` of a function that returns something, and where the value at an index is computed."""
    inside = function(code)
    nodes = [] if inside is None else list(own_nodes(inside))
    found = [n for n in nodes if isinstance(n, ast.Return) and n.value is not None]
    if not found:
        return []
    last = max(found, key=lambda node: node.lineno)
    several = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    named = several[index] if index is not None and index < len(several) else None
    name = named.id if isinstance(named, ast.Name) else ""
    return statements_of(code.co_filename, [last, *assigned(name, nodes, last.lineno)[-1:]])


def assigned(name: str, nodes: Iterable[ast.AST], before: int) -> list[ast.Assign]:
    """Return the statements that assign a name before some line, in their order."""
    found = [
        node
        for node in nodes
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == name for t in flat_targets(node))
        and node.lineno < before
    ]
    return sorted(found, key=lambda node: node.lineno)


def head(code: CodeType) -> Statement | None:
    """Return the first line of a function, below its decorators."""
    inside = function(code)
    named = isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef))
    found = statements_of(code.co_filename, [inside] if named and inside is not None else [])
    return found[0] if found else None


def heads(cls: type) -> list[Statement]:
    """Return the first line of a class, where its file has one of its name."""
    file = file_of(cls)
    return [] if file is None else statements_of(file, class_nodes(file, cls.__qualname__))


def decorator(code: CodeType, name: str) -> Statement | None:
    """Return the decorator of a name above a function."""
    inside = function(code)
    named = isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef))
    above = inside.decorator_list if named else []  # type: ignore[union-attr]
    found = statements_of(code.co_filename, [n for n in above if last_name(n) == name])
    return found[0] if found else None


def leaving_before(step: Step, name: str) -> list[Statement]:
    """Return where a function is left behind an expression, and before it calls a method of some name."""
    inside, place = function(step[0]), span(step)
    nodes = [] if inside is None or place is None else list(own_nodes(inside))
    last = max((n.lineno for n in nodes if is_call_of(n, name)), default=0)  # type: ignore[attr-defined]
    leaving = [n for n in nodes if isinstance(n, (ast.Return, ast.Continue))]
    return statements_of(
        step[0].co_filename, [n for n in leaving if place and place[0] < n.lineno < last]
    )


def written_into(step: Step) -> Statement | None:
    """Return the statement that made what a line writes an item of: `m = zeros(2)` of `m[0] = x`."""
    inside, place = function(step[0]), span(step)
    nodes = [] if inside is None or place is None else list(own_nodes(inside))
    line = place[0] if place else 0
    writes = [n for n in nodes if isinstance(n, (ast.Assign, ast.AugAssign)) and n.lineno == line]
    names = [root_of(target) for n in writes for target in targets_of(n)]
    made = [node for name in names if name for node in assigned(name, nodes, line)[-1:]]
    found = statements_of(step[0].co_filename, made)
    return found[0] if found else None


def registrations(code: CodeType) -> list[Statement]:
    """Return where the file of a hook registers full backward hooks, those under its own name first."""
    module = tree(code.co_filename)
    nodes = () if module is None else ast.walk(module)
    calls = [n for n in nodes if is_call_of(n, "register_full_backward_hook")]
    calls.sort(key=lambda n: code.co_name not in {last_name(part) for part in ast.walk(n)})
    return statements_of(code.co_filename, calls)


def first_argument(step: Step, outer: CodeType) -> Statement | None:
    """Return the statement that assigned the name which a call is given first, in its function or one around it."""
    homes = [home for home in (function(step[0]), function(outer)) if home is not None]
    read = expression(step, homes[0]) if homes else None
    if not isinstance(read, ast.Call) or not read.args:
        return None
    name = root_of(read.args[0])
    found = [n for home in homes for n in assigned(name, own_nodes(home), read.lineno)]
    statements = statements_of(step[0].co_filename, found[:1])
    return statements[0] if statements else None


def receiver(step: Step) -> Statement | None:
    """Return the statement that assigned the name whose method is called: `loss = ...` of `loss.backward()`."""
    home = function(step[0]) or tree(step[0].co_filename)
    read = None if home is None else expression(step, home)
    if not isinstance(read, ast.Call) or not isinstance(read.func, ast.Attribute) or home is None:
        return None
    name = root_of(read.func.value)
    found = statements_of(step[0].co_filename, assigned(name, own_nodes(home), read.lineno)[-1:])
    return found[0] if found else None


def read_before(step: Step) -> list[Statement]:
    """Return what assigned the name that a call is given first, and the first line that reads it before the call."""
    home = function(step[0]) or tree(step[0].co_filename)
    read = None if home is None else expression(step, home)
    if not isinstance(read, ast.Call) or not read.args or home is None:
        return []
    given, nodes = read.args[0], list(own_nodes(home))
    name = given.id if isinstance(given, ast.Name) else ""
    before = assigned(name, nodes, read.lineno)[-1:]
    between = [
        n
        for made in before
        for n in nodes
        if isinstance(n, ast.Name) and n.id == name and made.lineno < n.lineno < read.lineno
    ]
    readers = sorted(between, key=lambda node: node.lineno)[:1]
    return statements_of(step[0].co_filename, [*before, *readers])


def last_argument(step: Step, keyword: str) -> Statement | None:
    """Return the statement that assigned what a call is given last, or by a keyword that begins so."""
    home = function(step[0])
    read = None if home is None else expression(step, home)
    if not isinstance(read, ast.Call) or home is None:
        return None
    named = [k.value for k in read.keywords if (k.arg or "").startswith(keyword)]
    given = named or read.args[-1:]
    name = root_of(given[0]) if given else ""
    found = statements_of(step[0].co_filename, assigned(name, own_nodes(home), read.lineno)[-1:])
    return found[0] if found else None
