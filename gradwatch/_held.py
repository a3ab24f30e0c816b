"""What an expression holds of a value that left torch, by its text and what is marked around it.

What this room knows that no other does: which parts of a tuple, a mapping, an object, or a call's result are
data of the value, and which expressions the value only chose. Nothing is marked here but what is told.

Limits: calls of functions whose text is known are answered by what was learnt of them, elsewhere. The order of
statements counts for names that are assigned anew in the same block alone.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from gradwatch._bindings import (
    ABOUT_THE_FORM,
    ASK_FOR_THE_TYPE,
    CONTAINERS,
    LIKE,
    OF_MAPPINGS,
    OF_TENSORS,
    Key,
    any_class,
    arguments_of,
    deciding,
    homes_in,
    local_names,
    mutated_in,
    read_by_inner,
    stores_name,
    values_of,
)
from gradwatch._shapes import (
    ANY_KEY,
    EACH,
    NOWHERE,
    WHOLE,
    Part,
    Path,
    Shape,
    constant_of,
    element_of,
    held_at,
    iterated,
    key_of,
    part_of,
    positions_in,
    unordered,
)
from gradwatch._source import (
    Function,
    Step,
    called,
    definitions,
    owner_of,
    span,
    span_of,
    targets_of,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MANY = 3
"""Functions of one name in a file beyond which a call is not followed: none of them is meant for sure."""

_MOST = 100
"""Parts beyond which a thing counts as a whole."""


@dataclass(slots=True)
class Returned:
    """What a function hands to its caller of the value."""

    shape: Shape = NOWHERE
    chosen: bool = False


@dataclass(slots=True)
class News:
    """Counts what was learnt, so that what was worked out before can be told from what still holds."""

    count: int = 0


@dataclass(slots=True)
class MarkSets:
    """Marks of both kinds."""

    news: News
    data: dict[Key, Shape] = field(default_factory=dict)
    chosen: set[Key] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(map(len, self.data.values())) + len(self.chosen)

    def add(self, key: Key, shape: Shape) -> None:
        known = self.data.get(key, NOWHERE)
        if not shape <= known and known != WHOLE:
            together = known | shape
            self.data[key] = together if len(together) <= _MOST else WHOLE
            self.news.count += 1


class Held:
    """What the expressions of one function hold, by its marks."""

    def __init__(
        self,
        file: str,
        node: Function,
        shared: MarkSets,
    ) -> None:
        self.node = node
        self._shared = shared
        self._news = shared.news
        self._own = MarkSets(self._news)
        self._file = file
        self._locals = set(local_names(node))
        self._class = owner_of(tree(file)).get(node)
        self._seeds: dict[ast.AST, list[Returned]] = {}
        """What expressions get of the value from elsewhere; from each of the functions that a call may mean."""
        self._governed: set[ast.AST] = set()
        self._worked_out: tuple[int, dict[ast.AST, Shape]] = 0, {}

    def covers(self, step: Step) -> bool:
        """Tell whether a step lies in this function's text."""
        wanted, own = span(step), span_of(self.node)
        return wanted is not None and own is not None and own[:2] <= wanted[:2] <= own[2:]

    def names_among(self, names: Iterable[str]) -> bool:
        """Tell whether any of these local names is marked."""
        return any(("name", n) in self._own.data or ("name", n) in self._own.chosen for n in names)

    # Data -----------------------------------------------------------------------------------------

    def depends(self, node: ast.AST) -> bool:
        """Tell whether an expression holds data of the value."""
        return bool(self.shape(node))

    def shape(self, node: ast.AST) -> Shape:
        """Return which parts of an expression's result hold data of the value."""
        if self._worked_out[0] != self._news.count:
            self._worked_out = self._news.count, {}
        known = self._worked_out[1]
        if node not in known:
            known[node] = self._work_out(node)
        return known[node]

    def _any(self, arguments: Iterable[ast.AST]) -> Shape:
        return WHOLE if any(map(self.depends, arguments)) else NOWHERE

    def _work_out(self, node: ast.AST) -> Shape:
        seeded = NOWHERE.union(*(seed.shape for seed in self._seeds.get(node, ())))
        if seeded:
            return seeded
        how = _SHAPES.get(type(node))
        if how is not None:
            found: Shape = getattr(self, how)(node)
            return found
        return WHOLE if any(map(self.depends, ast.iter_child_nodes(node))) else NOWHERE

    def _of_name(self, node: ast.Name) -> Shape:
        key = self._key(node)
        if key[0] == "name" and (value := _latest(self.node, node)) is not None:
            return value(self)
        stored = self._stored(key)
        if key[0] == "name" and not stored and self._carries(node.id):
            return WHOLE
        return stored

    def _stored(self, key: Key) -> Shape:
        keys = (key, (*key[:2], "any")) if key[0] == "attribute" else (key,)
        sets = (self._own, self._shared)
        return NOWHERE.union(*(marks.data.get(k, NOWHERE) for marks in sets for k in keys))

    def _carries(self, name: str) -> bool:
        """Tell whether a name is that of a function defined here whose text reads what is marked."""
        read = read_by_inner(self.node).get(name, frozenset())
        return any(("name", each) in self._own.data for each in read)

    def _of_attribute(self, node: ast.Attribute) -> Shape:
        stored = self._stored(self._key(node))
        if stored or node.attr in ABOUT_THE_FORM:
            return stored
        held = self.shape(node.value)
        return part_of(held, node.attr, *positions_in(held))

    def _of_subscript(self, node: ast.Subscript) -> Shape:
        held = self.shape(node.value)
        if isinstance(node.slice, ast.Slice):
            return unordered(held)
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, (int, str)):
            return part_of(held, node.slice.value)
        return element_of(held)

    def _of_sequence(self, node: ast.Tuple | ast.List | ast.Set) -> Shape:
        moved = any(isinstance(part, ast.Starred) for part in node.elts)
        shapes = [
            unordered(self.shape(part.value))
            if isinstance(part, ast.Starred)
            else held_at(EACH if moved else position, self.shape(part))
            for position, part in enumerate(node.elts)
        ]
        return NOWHERE.union(*shapes)

    def _of_dict(self, node: ast.Dict) -> Shape:
        return NOWHERE.union(
            *(
                self.shape(value) if key is None else held_at(key_of(key), self.shape(value))
                for key, value in zip(node.keys, node.values, strict=True)
            )
        )

    def _of_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Shape:
        return held_at(EACH, self.shape(node.elt))

    def _of_dict_comprehension(self, node: ast.DictComp) -> Shape:
        return held_at(ANY_KEY, self.shape(node.value))

    def _of_choice(self, node: ast.IfExp) -> Shape:
        return self.shape(node.body) | self.shape(node.orelse)

    def _of_either(self, node: ast.BoolOp) -> Shape:
        return NOWHERE.union(*map(self.shape, node.values))

    def _of_value(self, node: ast.NamedExpr | ast.Starred | ast.Await | ast.keyword) -> Shape:
        return self.shape(node.value)

    def _of_call(self, node: ast.Call) -> Shape:
        name = called(node)
        if name in ABOUT_THE_FORM | ASK_FOR_THE_TYPE or known_functions(self._file, node):
            return NOWHERE  # what a known function returns of the value is a seed
        if name in LIKE:
            return self._any(arguments_of(node)[1:])
        for how in (self._of_builtin, self._of_method, self._of_class):
            made = how(node, name)
            if made is not None:
                return made
        # A method of a tensor's may bear the name of an attribute that is marked: `x.sum()`, `meter.sum`.
        function_ = node.func
        if isinstance(function_, ast.Attribute) and name in OF_TENSORS:
            function_ = function_.value
        return self._any([*arguments_of(node), function_])

    def _of_class(self, node: ast.Call, name: str) -> Shape | None:
        """Return the shape of an object that is made."""
        if not name[:1].isupper():
            return None
        shapes = [self.shape(argument) for argument in node.args]
        if name in CONTAINERS:
            return NOWHERE.union(*map(unordered, shapes), *self._keywords(node))
        places = [held_at(position, shape) for position, shape in enumerate(shapes)]
        return NOWHERE.union(*places, *self._keywords(node))

    def _keywords(self, node: ast.Call) -> list[Shape]:
        return [
            self.shape(k.value) if k.arg is None else held_at(k.arg, self.shape(k.value))
            for k in node.keywords
        ]

    def _of_builtin(self, node: ast.Call, name: str) -> Shape | None:
        if not isinstance(node.func, ast.Name) or any(
            isinstance(a, ast.Starred) for a in node.args
        ):
            return None
        arguments = [self.shape(argument) for argument in node.args]
        first = NOWHERE.union(*arguments[:1])
        found: Shape | None = None
        if name == "zip":
            pairs = [held_at(i, iterated(shape)) for i, shape in enumerate(arguments)]
            found = held_at(EACH, NOWHERE.union(*pairs))
        elif name == "enumerate":
            found = held_at(EACH, held_at(1, iterated(first)))
        elif name in {"list", "tuple", "reversed", "set", "iter", "deque", "frozenset"}:
            found = unordered(first)
        elif name == "dict":
            found = NOWHERE.union(first, *self._keywords(node))
        elif name == "next":
            found = iterated(first)
        return found

    def _of_method(self, node: ast.Call, name: str) -> Shape | None:
        if not isinstance(node.func, ast.Attribute) or name not in OF_MAPPINGS:
            return None
        held = self.shape(node.func.value)
        if name == "keys":
            found = held & WHOLE
        elif name == "items":
            found = held_at(EACH, held_at(1, element_of(held)))
        elif name == "values":
            found = held_at(EACH, element_of(held))
        elif name == "copy":
            found = held
        else:
            key = constant_of(node.args[0]) if node.args else EACH
            default = NOWHERE.union(*map(self.shape, node.args[1:]))
            found = (element_of(held) if key == EACH else part_of(held, key)) | default
        return found

    # Choice -----------------------------------------------------------------------------------------

    def chooses(self, node: ast.AST) -> bool:
        """Tell whether an expression is what it is because of the value."""
        if any(seed.chosen for seed in self._seeds.get(node, ())):
            return True
        if isinstance(node, ast.Call) and known_functions(self._file, node):
            return False  # what it returns of the value is a seed
        return any(map(self.depends, deciding(node))) or self._finds_chosen(node)

    def _finds_chosen(self, node: ast.AST) -> bool:
        marks = self._own.chosen | self._shared.chosen
        key = self._chosen_key(node)
        if key is not None and (key in marks or any_class(key) in marks):
            return True
        if isinstance(node, (ast.Name, ast.Attribute)) and any(
            mark[:3] == ("item", *(key or ())[:2]) for mark in marks
        ):
            return True  # the whole container, of which an item is marked
        if key is not None and key[0] == "item" and isinstance(node, ast.Subscript):
            base = self._chosen_key(node.value)
            return base is not None and base in marks
        return any(map(self.chooses, ast.iter_child_nodes(node)))

    def governs(self, node: ast.AST) -> bool:
        """Tell whether a node stands in a branch or a loop that the value chose."""
        return node in self._governed

    def _rule(self, statements: Iterable[ast.stmt]) -> None:
        """Note that the value chose whether some statements run."""
        for statement in statements:
            if statement not in self._governed:
                self._governed.update(ast.walk(statement))

    # Keys -------------------------------------------------------------------------------------------

    def _key(self, node: ast.Name | ast.Attribute) -> Key:
        if isinstance(node, ast.Name):
            return ("name", node.id) if node.id in self._locals else ("global", node.id, self._file)
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        return "attribute", node.attr, self._class if own else None

    def _chosen_key(self, node: ast.AST) -> Key | None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._key(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = self._chosen_key(node.value)
            return None if base is None else ("item", *base[:2], node.slice.value)
        return None

    def _place(self, target: ast.AST) -> tuple[Key, Path] | None:
        """Return what a target belongs to, and the part of it that is meant."""
        if isinstance(target, (ast.Name, ast.Attribute)):
            return self._key(target), ()
        if isinstance(target, ast.Subscript):
            base = self._place(target.value)
            part = self._constant_of(target.slice)
            return None if base is None else (base[0], (*base[1], part))
        return None

    def _constant_of(self, node: ast.AST) -> Part:
        """Return the key that an expression stands for: a constant, or a name that is one constant for all."""
        if isinstance(node, ast.Name) and node.id in self._locals:
            values = values_of(self.node).get(node.id, [])
            if len(values) == 1:
                node = values[0]
        return constant_of(node)


_SHAPES = {
    ast.Name: "_of_name",
    ast.Attribute: "_of_attribute",
    ast.Subscript: "_of_subscript",
    ast.Tuple: "_of_sequence",
    ast.List: "_of_sequence",
    ast.Set: "_of_sequence",
    ast.Dict: "_of_dict",
    ast.ListComp: "_of_comprehension",
    ast.SetComp: "_of_comprehension",
    ast.GeneratorExp: "_of_comprehension",
    ast.DictComp: "_of_dict_comprehension",
    ast.IfExp: "_of_choice",
    ast.BoolOp: "_of_either",
    ast.NamedExpr: "_of_value",
    ast.Starred: "_of_value",
    ast.Await: "_of_value",
    ast.keyword: "_of_value",
    ast.Call: "_of_call",
}
"""The method that knows how an expression of a kind holds what it is made of."""


def _latest(function_: Function, read: ast.Name) -> Callable[[Held], Shape] | None:
    """Return what a name holds where it is read, when it was assigned before in a block around; else None."""
    if isinstance(function_, ast.Module) or read.id in mutated_in(function_):
        return None
    for block, position, owner in homes_in(function_).get(read, ()):
        for statement in reversed(block[:position]):
            found = _assigned(statement, read.id)
            if found is not None:
                return found
            if stores_name(statement, read.id):
                return None
        if isinstance(owner, (ast.For, ast.While, ast.AsyncFor)) and stores_name(owner, read.id):
            return None  # it may come from the round before
    return None


def _assigned(statement: ast.stmt, name: str) -> Callable[[Held], Shape] | None:
    """Return how to look up what a plain assignment gives a name."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return None
    value = statement.value
    for target in targets_of(statement):
        if isinstance(target, ast.Name) and target.id == name:
            return lambda marked: marked.shape(value)
    return None


def known_functions(
    file: str, call: ast.Call
) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
    """Return the functions of the same file that a call may mean, where they are few enough."""
    root: ast.AST = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    module, is_method = tree(file), isinstance(call.func, ast.Attribute)
    if is_method and isinstance(root, ast.Name) and root.id in _imported(module):
        return ()  # `np.mean` is none of the user's, whatever these are called
    owners = owner_of(module)
    found = definitions(module).get(called(call), ())
    found = tuple(node for node in found if (node in owners) == is_method)
    return found if len(found) <= MANY else ()


@lru_cache(maxsize=256)
def _imported(module: ast.Module | None) -> frozenset[str]:
    """Return the names under which a file imports modules and what is in them."""
    return frozenset(
        (alias.asname or alias.name).partition(".")[0]
        for node in (() if module is None else ast.walk(module))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    )
