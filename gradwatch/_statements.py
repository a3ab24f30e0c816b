"""Which statements of the user's text do something: keep a value, freeze, empty gradients, switch a mode.

What this room knows that no other does: what such statements look like, and which of several tells most. They tell
what happened before a trace began, or out of its sight.

Limits: what is done by ``setattr``, ``exec``, or in a text that ``linecache`` cannot find is not known.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from gradwatch._source import (
    FILLERS,
    Statement,
    called,
    classes_in,
    definitions,
    file_of,
    flat_targets,
    last_name,
    own_nodes,
    root_of,
    span_of,
    statements_of,
    targets_of,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_DRAWS = frozenset(
    ["random", "randint", "randrange", "choice", "choices", "uniform", "shuffle", "gauss", "rand"]
)
"""Methods that draw from a generator of Python's or NumPy's, which a checkpoint does not set back."""


def keepings(cls: type, name: str) -> list[Statement]:
    """Return where a class, or one it inherits from, keeps values in an attribute, the tellest first.

    Filling the container that an attribute holds tells more than making it, and what runs in every step
    more than what runs once.
    """
    for base in cls.__mro__:
        file = file_of(base)
        module = None if file is None else tree(file)
        if file is None or module is None:
            continue
        found = [
            (rank, node)
            for definition in classes_in(module, base.__qualname__)
            for method in definition.body
            for node in ast.walk(method)
            if (rank := keeping_rank(node, name, getattr(method, "name", ""))) is not None
        ]
        found += [
            (0, node)
            for definition in classes_in(module, base.__qualname__)
            for method in definition.body
            if getattr(method, "name", None) == name  # a `cached_property` keeps what it returns
            for node in ast.walk(method)
            if isinstance(node, ast.Return)
        ]
        if found:
            return statements_of(
                file, [node for _, node in sorted(found, key=lambda pair: pair[0])]
            )
    return []


def changes_of_state(classes: Iterable[type]) -> list[Statement]:
    """Return where ``forward`` of some classes, and what it calls there, changes what outlives the call.

    Random numbers of Python's are one such change. What a condition asks about comes first.
    """
    found: list[tuple[str, ast.AST, str]] = []
    asked: set[str] = set()
    for cls in classes:
        file = file_of(cls)
        module = None if file is None else tree(file)
        if file is None or module is None or cls.__module__.startswith("torch."):
            continue
        for inside in _run_by_forward(module, cls):
            nodes = sorted(own_nodes(inside), key=lambda node: span_of(node) or ())
            outer = {
                name for n in nodes if isinstance(n, (ast.Global, ast.Nonlocal)) for name in n.names
            }
            for node in nodes:
                if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                    asked |= {last_name(n) for n in ast.walk(node.test)}
                whole = node if isinstance(node, ast.stmt) and not hasattr(node, "body") else None
                part = whole or getattr(node, "test", None) or getattr(node, "iter", None)
                if isinstance(part, ast.AST):
                    found += [(name, part, file) for name in _changed(part, outer)]
    found.sort(key=lambda each: each[0] not in asked)
    return [statements_of(file, [node])[0] for _, node, file in found]


def _run_by_forward(module: ast.Module, cls: type) -> Iterator[ast.AST]:
    """Yield ``forward`` of a class and the functions of its file that run inside, as far as names tell."""
    methods = {
        getattr(method, "name", ""): method
        for definition in classes_in(module, cls.__qualname__)
        for method in definition.body
    }
    others = {name: found[0] for name, found in definitions(module).items() if len(found) == 1}
    todo, seen = ["forward"], {"__init__"}
    while todo:
        name = todo.pop(0)
        inside = methods.get(name) or others.get(name)
        if name not in seen and isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inside
            calls = [node for node in own_nodes(inside) if isinstance(node, ast.Call)]
            todo += map(called, calls)
            todo += [last_name(c.args[0]) for c in calls if called(c) == "checkpoint" and c.args]
        seen.add(name)


def _changed(part: ast.AST, outer: set[str]) -> Iterator[str]:
    """Yield the names of attributes, variables of other functions and generators that a part of a function changes."""
    for node in ast.walk(part):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in flat_targets(node):
                held = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(held, ast.Attribute) or last_name(held) in outer:
                    yield last_name(held)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            held = node.func.value
            if node.func.attr in {*FILLERS, "pop", "popleft", "clear"} and isinstance(
                held, ast.Attribute
            ):
                yield held.attr
            elif node.func.attr in _DRAWS and root_of(held) != "torch":
                yield last_name(held)
            # A checkpoint rewinds the global generators alone.
            own = [k.value for k in node.keywords if k.arg == "generator"]
            yield from (last_name(generator) for generator in own if last_name(generator))


def mentions(file: str, name: str) -> list[Statement]:
    """Return where a file names a function: in a call, a decorator, or as an argument, but not to import it."""
    module = tree(file)
    nodes = () if module is None else ast.walk(module)
    named = [n for n in nodes if isinstance(n, (ast.Name, ast.Attribute)) and last_name(n) == name]
    return statements_of(file, named)


def method_calls(file: str, name: str) -> list[Statement]:
    """Return the calls of a method of this name in a file."""
    module = tree(file)
    nodes = () if module is None else ast.walk(module)
    methods = [n for n in nodes if is_call_of(n, name) and isinstance(n.func, ast.Attribute)]  # type: ignore[attr-defined]
    return statements_of(file, methods)


def constants(file: str, name: str, value: object) -> list[Statement]:
    """Return where a file gives a name a constant: as a keyword, a default, an assignment, or an entry of a dict."""
    module = tree(file)
    found: list[ast.AST] = []
    for node in () if module is None else ast.walk(module):
        for given, constant in _given_to_names(node):
            if isinstance(constant, ast.Constant) and constant.value == value:
                found += [constant] if given.endswith(name) else []
    return statements_of(file, found)


def _given_to_names(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield the names that a node gives a value to, with the values."""
    if isinstance(node, ast.Call):
        yield from ((keyword.arg or "", keyword.value) for keyword in node.keywords)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        yield from ((last_name(target), node.value) for target in targets_of(node))
    elif isinstance(node, ast.Dict):
        keys = (str(k.value) if isinstance(k, ast.Constant) else "" for k in node.keys)
        yield from zip(keys, node.values, strict=True)
    elif isinstance(node, ast.arguments):
        named = (*node.posonlyargs, *node.args)
        last = named[len(named) - len(node.defaults) :]
        yield from ((arg.arg, default) for arg, default in zip(last, node.defaults, strict=True))
        yield from zip((arg.arg for arg in node.kwonlyargs), node.kw_defaults, strict=True)


def casts_to_half(file: str) -> list[Statement]:
    """Return where a file casts something to float16: by ``.half()``, or by naming the type."""
    module = tree(file)
    nodes = () if module is None else ast.walk(module)
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return statements_of(
        file,
        [
            call
            for call in calls
            if called(call) == "half"
            or (called(call) == "to" and {"float16", "half"} & set(map(last_name, call.args)))
        ],
    )


def prunings(file: str) -> list[Statement]:
    """Return where a file replaces parameters by results: by pruning, or by the older norms of weights."""
    module = tree(file)
    nodes = () if module is None else ast.walk(module)
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    norms = {"weight_norm", "spectral_norm"}
    return statements_of(
        file, [c for c in calls if root_of(c.func) == "prune" or called(c) in norms]
    )


def _sets(call: ast.Call, name: str) -> bool:
    return any(
        k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in call.keywords
    )


def switches(cls: type) -> list[Statement]:
    """Return where the file of a class switches gradient mode by a bare call, its own methods first."""
    module = None if (file := file_of(cls)) is None else tree(file)
    nodes = () if module is None else ast.walk(module)
    around = {id(item.context_expr) for n in nodes if isinstance(n, ast.With) for item in n.items}

    def holds(node: ast.AST) -> bool:
        if not (isinstance(node, ast.Call) and called(node) == "set_grad_enabled"):
            return False
        on = [getattr(argument, "value", None) for argument in node.args] == [True]
        return not on and id(node) not in around

    return _where(cls, holds, elsewhere=True)


def reassignments(file: str, name: str) -> list[Statement]:
    """Return where a file assigns an attribute of this name, but for its ``__init__`` methods."""
    return statements_of(file, [node for _, node in _assigned_to(file, name)])


def set_from_outside(file: str, name: str) -> list[Statement]:
    """Return where a file sets an attribute of something else than ``self``, also by ``setattr``."""
    module = tree(file)
    found: list[ast.AST] = []
    for node in () if module is None else ast.walk(module):
        if isinstance(node, ast.Assign):
            owners = [
                t.value for t in node.targets if isinstance(t, ast.Attribute) and t.attr == name
            ]
            found += [node] if any(last_name(owner) != "self" for owner in owners) else []
        elif isinstance(node, ast.Call) and called(node) == "setattr":
            named = [n.value for n in node.args[1:2] if isinstance(n, ast.Constant)]
            found += [node] if named == [name] else []
    return statements_of(file, found)


def settings(file: str, name: str) -> list[Statement]:
    """Return the same, and before it the calls of the functions that assign what they are given."""
    found = list(_assigned_to(file, name))
    setters = {
        f.name
        for f, node in found
        if isinstance(node.value, ast.Name) and node.value.id in {a.arg for a in f.args.args}
    }
    calls = [call for setter in sorted(setters) for call in method_calls(file, setter)]
    return [*calls, *statements_of(file, [node for _, node in found])]


def _assigned_to(file: str, name: str) -> Iterator[tuple[ast.FunctionDef, ast.Assign]]:
    module = tree(file)
    for inside in () if module is None else ast.walk(module):
        if isinstance(inside, ast.FunctionDef) and inside.name != "__init__":
            for node in own_nodes(inside):
                if isinstance(node, ast.Assign) and _assigns(node, name):
                    yield inside, node


def keeping_rank(node: ast.AST, name: str, method: str) -> int | None:
    """Tell how much a statement says about what is kept under a name; less is more."""
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
        if isinstance(node.value, ast.Constant):
            return None
        # What is kept as it is tells more than what is made for the occasion.
        items = node.value.elts if isinstance(node.value, (ast.Tuple, ast.List)) else [node.value]
        new = not any(isinstance(item, (ast.Name, ast.Attribute)) for item in items)
        for target in flat_targets(node):
            if isinstance(target, ast.Subscript) and last_name(target.value) == name:
                return int(new)
            if isinstance(target, ast.Attribute) and target.attr == name:
                return (4 if method == "__init__" else 2) + new
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    filled = node.func.value
    while isinstance(filled, ast.Subscript):
        filled = filled.value
    fills = node.func.attr in FILLERS and last_name(filled) == name
    return 0 if fills and node.args else None


def _where(
    cls: type, holds: Callable[[ast.AST], bool], *, elsewhere: bool, init: bool = True
) -> list[Statement]:
    """Return where the methods of a class do something.

    Args:
        cls: The class.
        holds: Tells whether a node does it.
        elsewhere: Whether the rest of the file is looked at where the class does not do it.
        init: Whether ``__init__`` counts.
    """
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    own = [
        node
        for definition in classes_in(module, cls.__qualname__)
        for method in definition.body
        if init or getattr(method, "name", "") != "__init__"
        for node in ast.walk(method)
        if holds(node)
    ]
    return statements_of(file, own or [n for n in ast.walk(module) if elsewhere and holds(n)])


def freezings(cls: type) -> list[Statement]:
    """Return where the file of a class switches ``requires_grad`` off, its own methods first."""
    found = _where(cls, _freezes, elsewhere=True)
    return [s for s in found if "requires_grad" in s.text] or found


def freezings_in(file: str) -> list[Statement]:
    """Return where a file switches ``requires_grad`` off, or sets it by a variable."""
    module = tree(file)
    nodes = () if module is None else ast.walk(module)
    return [s for s in statements_of(file, filter(_freezes, nodes)) if "requires_grad" in s.text]


def spoiled_leaves(cls: type) -> list[Statement]:
    """Return where the file of a class computes from a call with ``requires_grad=True`` at once: that is no leaf."""
    return _where(cls, _spoils, elsewhere=True)


def _spoils(node: ast.AST) -> bool:
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        parts = [node.func.value]
    return any(isinstance(part, ast.Call) and _sets(part, "requires_grad") for part in parts)


def clearings(cls: type) -> list[Statement]:
    """Return where the file of a class empties gradients, its own methods first."""
    return _where(cls, _clears, elsewhere=True)


def copies(cls: type) -> list[Statement]:
    """Return where the file of a class calls ``copy.deepcopy``, its own methods first."""
    return _where(cls, lambda node: is_call_of(node, "deepcopy"), elsewhere=True)


def calls_of(cls: type, name: str) -> list[Statement]:
    """Return where the methods of a class call a function of this name, also as ``module.name``."""
    return _where(cls, lambda node: is_call_of(node, name), elsewhere=False)


def dropped(cls: type, name: str) -> list[Statement]:
    """Return where a class cuts off what an attribute holds, by ``detach()`` or a function, and drops the result."""

    def is_dropped(node: ast.AST) -> bool:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call):
            return False
        given = call.func.value if is_call_of(call, "detach") else None  # type: ignore[attr-defined]
        read = call.args if isinstance(call.func, ast.Name) else [given] if given else []
        return name in {last_name(each) for each in read}

    return _where(cls, is_dropped, elsewhere=False)


def assignments(cls: type, name: str) -> list[Statement]:
    """Return where the methods of a class, but for ``__init__``, assign an attribute of this name."""
    return _where(cls, lambda node: _assigns(node, name), elsewhere=False, init=False)


def is_call_of(node: ast.AST, name: str) -> bool:
    """Tell whether a node calls a function or a method of some name."""
    return isinstance(node, ast.Call) and called(node) == name


def _assigns(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Attribute) and target.attr == name for target in node.targets
    )


def _clears(node: ast.AST) -> bool:
    if isinstance(node, (ast.Assign, ast.Delete)):
        grads = [t for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "grad"]
        emptied = node.value if isinstance(node, ast.Assign) else ast.Constant(None)
        return bool(grads) and isinstance(emptied, ast.Constant) and emptied.value is None
    return is_call_of(node, "zero_grad")


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


def derived_attributes(
    cls: type, parameter: str, child: str | None = None
) -> dict[str, tuple[Statement, frozenset[str]]]:
    """Return the attributes that a class computes from a parameter, with the functions in between.

    Args:
        cls: The class of the module that registers the parameter, or of one around it.
        parameter: The parameter's attribute.
        child: The attribute of the class through which it is reached, if not its own.
    """
    file = file_of(cls)
    module = None if file is None else tree(file)
    found: dict[str, tuple[Statement, frozenset[str]]] = {}
    if file is None or module is None:
        return found
    for definition in classes_in(module, cls.__qualname__):
        for node in ast.walk(definition):
            for name, value in _kept_values(node):
                read = {n.attr for n in ast.walk(value) if isinstance(n, ast.Attribute)}
                if {parameter, child or parameter} <= read:
                    calls = {called(n) for n in ast.walk(value) if isinstance(n, ast.Call)}
                    (statement,) = statements_of(file, [node])
                    found[name] = (statement, frozenset(read | calls))
    return found


def _kept_values(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the attributes and buffers that a statement sets, with their expressions."""
    if isinstance(node, ast.Assign):
        for target in flat_targets(node):
            if isinstance(target, ast.Attribute):
                yield target.attr, node.value
    elif isinstance(node, ast.Call) and called(node) == "register_buffer":
        name, value = [*node.args, None, None][:2]
        if isinstance(name, ast.Constant) and value is not None:
            yield str(name.value), value
