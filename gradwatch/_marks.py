"""Where a value goes after it left tensors for Python, by the text of the user's functions.

What this room knows that no other does: how a number travels through names, containers, attributes, calls and
branches. What Python computed with it has no identity to follow, so the text is read: starting from the expression
at which the value left, all that holds it is marked, function by function up the stack, and an operation whose
expression holds a mark was computed from it. Of tuples, mappings and objects that are written out the parts are
told apart: a metric that is returned beside a loss is not in the loss.

Limits: the order of statements counts for names that are assigned anew in the same block alone. Code whose text
``linecache`` cannot find is not followed.
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
    COUNTING,
    FINITE,
    LIKE,
    OF_MAPPINGS,
    OF_TENSORS,
    SAYING,
    WRITERS,
    Key,
    any_class,
    arguments_of,
    deciding,
    declared_in,
    homes_in,
    local_names,
    mutated_in,
    nodes_of,
    owner_of_memory,
    parameters_given,
    read_by_inner,
    readings_of,
    stores_name,
    values_of,
    writes_into,
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
    FILLERS,
    Function,
    Step,
    called,
    definitions,
    expression,
    function,
    last_name,
    owner_of,
    span,
    span_of,
    targets_of,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_INNER = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_MANY = 3
"""Functions of one name in a file beyond which a call is not followed: none of them is meant for sure."""

_ROUNDS = 100
"""Times that a function is read: no text needs so many, and no mistake of ours may keep a user waiting."""
_MOST = 100
"""Parts beyond which a thing counts as a whole."""

# What is asked ------------------------------------------------------------------------------------------------


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
        self.shared = _MarkSets(_News())
        self._functions: dict[ast.AST, _Marked] = {}
        self._answers: dict[Use, bool] = {}
        inner = next(iter(stack), None)
        returned = _Returned(WHOLE)
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
            marked.seed(expr, _Returned(chosen=True) if _only_chooses(expr, through) else returned)
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
        if _known(caller[0].co_filename, call):
            return False  # its text is known, and says which of its arguments go where
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        # A function or an object may carry the value: a closure, a `partial`, a module that was set up.
        given.append(call.func)
        return any(marked.depends(argument) for argument in given)

    def _around(self, step: Step) -> _Marked | None:
        code = step[0]
        if code.co_name in _INNER:
            return next((m for m in self._functions.values() if m.covers(step)), None)
        node = function(code)
        return None if node is None else self._functions.get(node) or self._reached(step, node)

    def _reached(self, step: Step, node: Function) -> _Marked | None:
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

    def _marked(self, file: str, node: Function) -> _Marked:
        if node not in self._functions:
            self._functions[node] = _Marked(file, node, self.shared, self._marked)
        return self._functions[node]


def _known(file: str, call: ast.Call) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
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
    return found if len(found) <= _MANY else ()


@lru_cache(maxsize=256)
def _imported(module: ast.Module | None) -> frozenset[str]:
    """Return the names under which a file imports modules and what is in them."""
    return frozenset(
        (alias.asname or alias.name).partition(".")[0]
        for node in (() if module is None else ast.walk(module))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    )


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


# The marks of one function ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Returned:
    """What a function hands to its caller of the value."""

    shape: Shape = NOWHERE
    chosen: bool = False


@dataclass(slots=True)
class _News:
    """Counts what was learnt, so that what was worked out before can be told from what still holds."""

    count: int = 0


@dataclass(slots=True)
class _MarkSets:
    """Marks of both kinds."""

    news: _News
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


class _Marked:
    """The marks inside one function."""

    def __init__(
        self,
        file: str,
        node: Function,
        shared: _MarkSets,
        enter: Callable[[str, Function], _Marked],
    ) -> None:
        self.node = node
        self._enter = enter
        self.returned = _Returned()
        self._shared = shared
        self._news = shared.news
        self._own = _MarkSets(self._news)
        self._file = file
        self._locals = set(local_names(node))
        self._class = owner_of(tree(file)).get(node)
        self._seeds: dict[ast.AST, list[_Returned]] = {}
        """What expressions get of the value from elsewhere; from each of the functions that a call may mean."""
        self._governed: set[ast.AST] = set()
        self._seen_shared = 0
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
        if name in ABOUT_THE_FORM | ASK_FOR_THE_TYPE or _known(self._file, node):
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
        if isinstance(node, ast.Call) and _known(self._file, node):
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

    # How marks spread ---------------------------------------------------------------------------

    def seed(self, node: ast.AST | None, returned: _Returned) -> None:
        """Mark an expression, and all that follows from it."""
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            node = node.test  # some jumps bear the place of the whole statement
        if node is not None:
            self._seed(node, returned)
            self.spread()

    def _seed(self, node: ast.AST, returned: _Returned) -> None:
        known = self._seeds.setdefault(node, [])
        if not any(seed is returned for seed in known):
            known.append(returned)
            self._news.count += 1

    def take_up(self, around: _Marked, names: Iterable[str]) -> None:
        """Take over the marks that a function around this one has on names that both know."""
        self.know(names)
        for key in (("name", name) for name in names):
            self._own.add(key, around._own.data.get(key, NOWHERE))
            self._own.chosen |= around._own.chosen & {key}

    def know(self, names: Iterable[str]) -> None:
        """Take names of a function around this one for its own."""
        self._locals |= set(names) - declared_in(self.node)

    def spread(self) -> None:
        """Mark what follows from the marks until nothing is added."""
        known: tuple[int, ...] = ()
        for _ in range(_ROUNDS):
            if known == (known := self._how_much()):
                break
            for node in nodes_of(self.node):
                self._visit(node)
        if isinstance(self.node, ast.Lambda):
            self._return(self.node.body, self.shape(self.node.body))

    def _how_much(self) -> tuple[int, ...]:
        chosen = len(self._own.chosen) + len(self._shared.chosen)
        return self._news.count, chosen, len(self._governed)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            if node.value is not None:
                self._assign(targets_of(node), node.value)
        elif isinstance(node, ast.AugAssign):
            self._add(node)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._loop(node)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._assign([node.optional_vars], node.context_expr)
        elif isinstance(node, (ast.If, ast.While)):
            self._govern(node)
        elif isinstance(node, ast.Match):
            self._match(node)
        elif isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)):
            if node.value is not None:
                shape = self.shape(node.value)
                one = isinstance(node, ast.Yield)
                self._return(node.value, held_at(EACH, shape) if one else shape)
        else:
            self._visit_expression(node)

    def _visit_expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._change(node.value)
        elif isinstance(node, ast.Call):
            if not self._pass_on(node):
                self._fill(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and self._shared:
            self._read_property(node)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> None:
        """Mark what a loop hands out, and what it runs as often as the value says."""
        shape, chosen = self.shape(node.iter), self.chooses(node.iter)
        self._unpack(node.target, iterated(shape), chosen=chosen)
        if not isinstance(node, ast.comprehension) and self._counts(node.iter):
            self._rule(node.body)

    def _counts(self, node: ast.AST) -> bool:
        """Tell whether a loop runs as often as the value says."""
        calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and called(c) in COUNTING]
        return any(map(self.depends, calls))

    def _govern(self, node: ast.If | ast.While) -> None:
        """Note what a marked condition chooses: its branches, and the loop that it may end."""
        if not (self.depends(node.test) or self.chooses(node.test)):
            return
        if all(isinstance(statement, ast.Raise) for statement in node.body):
            return
        leaves = isinstance(node.body[-1], (ast.Break, ast.Continue, ast.Return, ast.Raise))
        if leaves and any(
            isinstance(inner, ast.Call) and called(inner) in FINITE for inner in ast.walk(node.test)
        ):
            return  # a guard against NaN decides nothing while there is none
        self._rule((*node.body, *node.orelse))
        if any(isinstance(inner, (ast.Break, ast.Continue)) for inner in ast.walk(node)):
            for loop in nodes_of(self.node):
                if isinstance(loop, (ast.For, ast.While)) and node in ast.walk(loop):
                    self._rule(loop.body)

    def _match(self, node: ast.Match) -> None:
        """Note what a marked subject chooses: a case, and the names that it is taken apart into."""
        data = self.depends(node.subject)
        if not (data or self.chooses(node.subject)):
            return
        for case in node.cases:
            self._rule(case.body)
            captured = {
                name
                for inner in ast.walk(case.pattern)
                for name in (getattr(inner, "name", None), getattr(inner, "rest", None))
                if name is not None
            }
            for name in captured if data else ():
                self._own.add(("name", name), WHOLE)

    def _return(self, value: ast.expr, shape: Shape) -> None:
        if isinstance(value, ast.Constant) and value.value is None:
            return
        if self.governs(value) or self.chooses(value):
            self.returned.chosen = True
        if not shape <= self.returned.shape:
            self.returned.shape |= shape
            self._news.count += 1

    def _assign(self, targets: Iterable[ast.AST], value: ast.AST) -> None:
        shape, chosen = self.shape(value), self.chooses(value)
        if not shape and (owner := owner_of_memory(value)) is not None:
            # `array = tensor.numpy()`: what is written into the array later is in the tensor.
            written = [t for t in targets if writes_into(self.node, t)]
            self._mark(owner, NOWHERE, chosen=any(map(self.depends, written)))
        texts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else None
        for target in targets:
            taken = target.elts if isinstance(target, (ast.Tuple, ast.List)) else None
            if taken is not None and texts is not None and len(taken) == len(texts):
                for one, other in zip(taken, texts, strict=True):
                    self._assign([one], other)
            else:
                self._unpack(target, shape, chosen=chosen or self.governs(target))

    def _unpack(self, target: ast.AST, shape: Shape, *, chosen: bool) -> None:
        """Mark what a target is given, element by element where it is a tuple."""
        if isinstance(target, (ast.Tuple, ast.List)):
            for position, element in enumerate(target.elts):
                if isinstance(element, ast.Starred):
                    self._unpack(element.value, unordered(shape), chosen=chosen)
                else:
                    self._unpack(element, part_of(shape, position), chosen=chosen)
        else:
            self._mark(target, shape, chosen=chosen)

    def _add(self, node: ast.AugAssign) -> None:
        """Mark what something is added to; to a list, more elements."""
        shape = self.shape(node.value)
        grown = isinstance(node.value, (ast.List, ast.Tuple, ast.Dict))
        added = unordered(shape) if grown else WHOLE if shape else NOWHERE
        self._mark(node.target, added, chosen=self.chooses(node.value) or self.governs(node))

    def _mark(self, target: ast.AST, shape: Shape, *, chosen: bool) -> None:
        if (owner := owner_of_memory(target)) is not None:
            # A tensor holds no Python data, but what Python wrote into it decides what it is.
            self._mark(owner, NOWHERE, chosen=bool(shape) or chosen)
            return
        place = self._place(target)
        if place is None:
            return
        key, path = place
        marks = self._own if key[0] == "name" else self._shared
        for part in reversed(path):
            shape = held_at(part, shape)
        for reading in readings_of(key):
            marks.add(reading, shape)
        if chosen:
            item = self._chosen_key(target)
            marks.chosen |= readings_of(item if item is not None else key)

    def _pass_on(self, call: ast.Call) -> bool:
        """Follow the value into functions of the same file that a call hands it to."""
        for node in _known(self._file, call):
            given = parameters_given(call, node, self.shape)
            chosen = parameters_given(call, node, lambda a: WHOLE if self.chooses(a) else NOWHERE)
            governed = self.governs(call)
            if not (given or chosen or governed or self._shared):
                continue
            inner = self._enter(self._file, node)
            if inner.receive(given, frozenset(chosen), governed=governed):
                self._seed(call, inner.returned)
        return bool(_known(self._file, call))

    def _read_property(self, node: ast.Attribute) -> None:
        """Follow the value out of a property that reads what is marked."""
        for known in definitions(tree(self._file)).get(node.attr, ())[:_MANY]:
            if any(last_name(d).endswith("property") for d in known.decorator_list):
                inner = self._enter(self._file, known)
                if inner.receive():
                    self._seed(node, inner.returned)

    def receive(
        self,
        given: Mapping[str, Shape] | None = None,
        chosen: frozenset[str] = frozenset(),
        *,
        governed: bool = False,
    ) -> bool:
        """Mark arguments of this function; return whether its caller gets anything of the value back.

        Args:
            given: The arguments that hold data, with its shape.
            chosen: Those that were chosen.
            governed: Whether the call itself was chosen, and with it all that the function does.
        """
        before = len(self._own)
        for name, shape in (given or {}).items():
            self._own.add(("name", name), shape)
        self._own.chosen |= {("name", name) for name in chosen}
        news = before != len(self._own) or self._seen_shared != len(self._shared)
        self._seen_shared = len(self._shared)
        if governed and isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            news = news or not self._governed.issuperset(self.node.body)
            self._rule(self.node.body)
        if news:
            self.spread()
        return bool(self.returned.shape) or self.returned.chosen

    def _fill(self, call: ast.Call) -> None:
        """Mark a container into which a value was put, or that the value chose to fill."""
        method, arguments = call.func, arguments_of(call)
        chosen = any(map(self.chooses, arguments))
        name = called(call)
        if isinstance(method, ast.Attribute) and method.attr in FILLERS:
            shape = self._put(method.attr, call)
            self._mark(method.value, shape, chosen=chosen or self.governs(call))
        elif isinstance(method, ast.Attribute) and method.attr == "sort":
            sorted_by = any(map(self.depends, (*arguments, method.value, call)))
            self._mark(method.value, NOWHERE, chosen=sorted_by)
        elif name == "tofile" and isinstance(method, ast.Attribute):
            self._write(call.args[:1], self.shape(method.value))
        elif name == "setattr" and len(call.args) == 3 and isinstance(call.args[1], ast.Constant):  # noqa: PLR2004
            target = ast.Attribute(call.args[0], str(call.args[1].value), ast.Store())
            self._mark(target, self.shape(call.args[2]), chosen=self.chooses(call.args[2]))
        elif name in WRITERS:
            self._write(call.args[WRITERS[name] :][:1], self._any(arguments))
        for keyword in call.keywords:
            if keyword.arg == "out":
                self._write([keyword.value], self._any(call.args))

    def _put(self, method: str, call: ast.Call) -> Shape:
        """Return what a method puts into its container."""
        shapes = [self.shape(argument) for argument in call.args]
        if method in {"extend", "update"}:
            return NOWHERE.union(*map(unordered, shapes), *self._keywords(call))
        if method == "setdefault" and call.args:
            return held_at(self._constant_of(call.args[0]), NOWHERE.union(*shapes[1:]))
        return held_at(EACH, NOWHERE.union(*shapes, *self._keywords(call)))

    def _any(self, arguments: Iterable[ast.AST]) -> Shape:
        return WHOLE if any(map(self.depends, arguments)) else NOWHERE

    def _write(self, targets: Sequence[ast.AST], shape: Shape) -> None:
        for target in targets:
            self._mark(target, shape, chosen=False)

    def _change(self, call: ast.Call) -> None:
        """Mark an object of a library's on which a method was called for what it does: `kmeans.fit(x)`."""
        method = call.func
        if not isinstance(method, ast.Attribute) or _known(self._file, call):
            return
        held = method.value
        is_own = isinstance(held, ast.Name) and held.id in self._locals - {"self", "cls"}
        is_kept = isinstance(held, ast.Attribute) and last_name(held.value) == "self"
        if (is_own or is_kept) and method.attr not in FILLERS | SAYING:
            self._write([held], self._any(arguments_of(call)))


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


def _latest(function_: Function, read: ast.Name) -> Callable[[_Marked], Shape] | None:
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


def _assigned(statement: ast.stmt, name: str) -> Callable[[_Marked], Shape] | None:
    """Return how to look up what a plain assignment gives a name."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return None
    value = statement.value
    for target in targets_of(statement):
        if isinstance(target, ast.Name) and target.id == name:
            return lambda marked: marked.shape(value)
    return None
