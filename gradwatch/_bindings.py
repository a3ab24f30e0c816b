"""What the text of a single function says without following it: its names, and what functions of others do.

What this room knows that no other does: which names are local, read by inner functions, or changed, which arguments
a call fills, and which functions of Python's, NumPy's and torch's hand on, write into, or only count what they get.

Limits: functions of others are known by their names alone.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from gradwatch._shapes import NOWHERE, Shape, element_of, held_at, part_of, unordered
from gradwatch._source import Function, called, own_nodes, root_of, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Key = tuple[object, ...]
"""What can be marked: a name, an attribute, a module's name; for what was chosen also one item of a container."""
WRITERS = {
    "copyto": 0,
    "at": 0,
    "put": 0,
    "place": 0,
    "putmask": 0,
    "fill_diagonal": 0,
    "save": 0,
    "savez": 0,
    "savetxt": 0,
    "dump": 1,
    "heappush": 0,
    "heapreplace": 0,
    "heappushpop": 0,
    "insort": 0,
    "insort_left": 0,
    "insort_right": 0,
}
"""Functions of NumPy and of the standard library that write into one of their arguments, with its position."""
SAME_MEMORY = {"numpy", "detach", "cpu", "view", "reshape", "ravel", "data", "T"}
"""Methods and attributes whose result lies over the memory of the tensor or array."""

# What functions of others do --------------------------------------------------------------------------------

ASK_FOR_THE_TYPE = frozenset(["isinstance", "issubclass", "hasattr", "callable", "type", "id"])
"""Functions whose answer does not depend on what a number is."""
ABOUT_THE_FORM = frozenset(["len", "shape", "size", "ndim", "dtype", "device", "numel", "nbytes"])
"""Functions and attributes that tell how many numbers there are, and not which."""
LIKE = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn"))
"""Functions that read of their first argument how large it is."""
OF_MAPPINGS = frozenset(["keys", "items", "values", "copy", "get", "pop", "setdefault"])
"""Methods that hand out parts of a container."""
CONTAINERS = frozenset(
    ["Counter", "OrderedDict", "defaultdict", "Series", "DataFrame", "UserList", "UserDict"]
)
"""Classes of containers whose elements are those of what they are made from."""
OF_TENSORS = frozenset(dir(torch.Tensor))
FINITE = frozenset(["isnan", "isfinite", "isinf", "isclose"])
"""Functions that ask whether a number is one."""
COUNTING = frozenset(["range", "arange", "trange", "islice", "repeat"])
"""Functions that are asked for a number of elements."""
SAYING = frozenset(
    [
        "add_scalar",
        "add_scalars",
        "add_text",
        "add_histogram",
        "log",
        "log_dict",
        "log_metrics",
        "log_metric",
        "debug",
        "info",
        "warning",
        "error",
        "critical",
        "exception",
        "print",
        "write",
        "writelines",
        "writerow",
        "set_postfix",
        "set_postfix_str",
        "set_description",
        "backward",
        "step",
        "zero_grad",
        "train",
        "eval",
        "to",
        "register_buffer",
        "register_hook",
        "sort",
    ]
)
"""Methods that tell a person, or change nothing of their object that a number can be read from."""


def arguments_of(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def deciding(node: ast.AST) -> Sequence[ast.AST]:
    """Return the parts of an expression that decide which of the others it is."""
    found: Sequence[ast.AST] = ()
    if isinstance(node, ast.IfExp):
        found = [node.test]
    elif isinstance(node, ast.BoolOp):
        found = node.values[:-1]
    elif isinstance(node, ast.Subscript):
        found = [node.slice]
    elif isinstance(node, ast.comprehension):
        found = node.ifs
    elif isinstance(node, ast.Call) and any(
        isinstance(inner, ast.Subscript) for inner in ast.walk(node.func)
    ):
        found = [node.func]  # `self.experts[k](h)`
    return found


def writes_into(function_: ast.AST, target: ast.AST) -> bool:
    """Tell whether a function writes into what a name holds, and does not just give it a new value."""
    name = target.id if isinstance(target, ast.Name) else None
    for node in ast.walk(function_):
        into: Iterable[ast.AST] = ()
        if isinstance(node, ast.AugAssign):
            into = [node.target]
        elif isinstance(node, ast.Assign):
            into = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.Call) and called(node) in WRITERS:
            into = node.args[:1]
        if name is not None and any(isinstance(i, ast.Name) and i.id == name for i in into):
            return True
    return False


def owner_of_memory(node: ast.AST) -> ast.AST | None:
    """Return the tensor whose memory an expression is a view of: ``h`` for ``h.numpy()[0]``."""
    inner, is_array = node, False
    while True:
        if isinstance(inner, ast.Subscript):
            inner = inner.value
        elif isinstance(inner, ast.Call) and called(inner) in SAME_MEMORY:
            is_array = is_array or called(inner) == "numpy"
            inner = inner.func
        elif isinstance(inner, ast.Attribute) and inner.attr in SAME_MEMORY:
            inner = inner.value
        else:
            return inner if is_array and inner is not node else None


def parameters_given(
    call: ast.Call,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    shape: Callable[[ast.AST], Shape],
) -> dict[str, Shape]:
    """Return the names under which a function gets the arguments of a call that hold the value."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    known = {*names, *(argument.arg for argument in node.args.kwonlyargs)}
    rest = None if node.args.kwarg is None else node.args.kwarg.arg
    more = None if node.args.vararg is None else node.args.vararg.arg
    given: list[tuple[str | None, Shape]] = []
    for position, value in enumerate(call.args):
        if isinstance(value, ast.Starred):
            given += [(name, element_of(shape(value.value))) for name in names[position:]]
            given.append((more, unordered(shape(value.value))))
            break
        if position < len(names):
            given.append((names[position], shape(value)))
        else:
            given.append((more, held_at(position - len(names), shape(value))))
    for keyword in call.keywords:
        if keyword.arg is None:
            given += [(name, part_of(shape(keyword.value), name)) for name in known]
            given.append((rest, shape(keyword.value)))
        elif keyword.arg in known:
            given.append((keyword.arg, shape(keyword.value)))
        else:
            given.append((rest, held_at(keyword.arg, shape(keyword.value))))
    found: dict[str, Shape] = {}
    for name, held in given:
        if name is not None and held:
            found[name] = found.get(name, NOWHERE) | held
    return found


# Names --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def local_names(node: Function) -> frozenset[str]:
    """Return the names that belong to a function alone: its arguments, and what it assigns."""
    if isinstance(node, ast.Module):
        return frozenset()
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            names.add(inner.arg)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, ast.FunctionDef) and inner is not node:
            names.add(inner.name)
    return frozenset(names - declared_in(node))


@lru_cache(maxsize=1024)
def declared_in(node: Function) -> frozenset[str]:
    """Return the names that a function, or one inside of it, shares with others: `global`, `nonlocal`."""
    found = (inner for inner in ast.walk(node) if isinstance(inner, (ast.Global, ast.Nonlocal)))
    return frozenset(name for inner in found for name in inner.names)


def readings_of(key: Key) -> set[Key]:
    """Return the keys under which a marked thing may be read: an attribute also of an unknown object."""
    if key[0] != "attribute":
        return {key}
    return {key, (*key[:2], None)} if key[2] is not None else {key, (*key[:2], "any")}


def any_class(key: Key) -> Key | None:
    """Return the key of an attribute that was marked on an object of unknown class."""
    return (*key[:2], "any") if key[0] == "attribute" else None


@lru_cache(maxsize=1024)
def values_of(function_: Function) -> dict[str, list[ast.AST]]:
    """Return what each name of a function is assigned, a node for each time; loops and the like count too."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(function_):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in targets_of(node):
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.arg):
            found.setdefault(node.arg, []).append(node)
    stores = [
        node.id
        for node in ast.walk(function_)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return {name: values for name, values in found.items() if stores.count(name) <= len(values)}


@lru_cache(maxsize=1024)
def nodes_of(function_: Function) -> tuple[ast.AST, ...]:
    return tuple(own_nodes(function_))


@lru_cache(maxsize=1024)
def read_by_inner(function_: Function) -> dict[str, frozenset[str]]:
    """Return the functions that are defined inside of one, with the names that they read from around them."""
    found = {}
    for inner in nodes_of(function_):
        if isinstance(inner, ast.FunctionDef):
            taken = {node.arg for node in ast.walk(inner) if isinstance(node, ast.arg)}
            names = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name)}
            found[inner.name] = frozenset(names - taken - {inner.name})
    return found


@lru_cache(maxsize=1024)
def mutated_in(function_: Function) -> frozenset[str]:
    """Return the names of a function whose objects are changed by something else than an assignment."""
    changed: set[str] = set()
    for node in ast.walk(function_):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            changed.add(root_of(node))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                changed.add(root_of(node.func))
            if called(node) in WRITERS or any(k.arg == "out" for k in node.keywords):
                changed.update(map(root_of, arguments_of(node)))
        elif isinstance(node, ast.AugAssign):
            changed.add(root_of(node.target))
    return frozenset(changed)


@lru_cache(maxsize=1024)
def homes_in(function_: Function) -> dict[ast.AST, tuple[tuple[list[ast.stmt], int, ast.AST], ...]]:
    """Return for each name that is read the blocks around it, the innermost first, with its place in them."""
    found: dict[ast.AST, tuple[tuple[list[ast.stmt], int, ast.AST], ...]] = {}

    def walk(node: ast.AST, around: tuple[tuple[list[ast.stmt], int, ast.AST], ...]) -> None:
        if isinstance(node, ast.Name):
            found[node] = around
        for _, value in ast.iter_fields(node):
            is_block = isinstance(value, list) and bool(value) and isinstance(value[0], ast.stmt)
            for position, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(
                    child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
                ):
                    continue  # what is read in there is read at another time
                if isinstance(child, ast.AST):
                    walk(child, ((value, position, node), *around) if is_block else around)

    walk(function_, ())
    return found


def stores_name(node: ast.AST, name: str) -> bool:
    return name in stored_in(node)


@lru_cache(maxsize=4096)
def stored_in(node: ast.AST) -> frozenset[str]:
    """Return the names that are given something anywhere in a statement."""
    return frozenset(
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load)
    )
