"""How marks spread inside one function: through assignments, loops, branches, containers and calls.

What this room knows that no other does: which statement hands a value on to which names, what a condition
chooses, and what a call writes into the things that it is given.

Limits: what a call means is known by the name of a function in the same file; of those with a common name, by few.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from gradwatch._bindings import (
    COUNTING,
    FINITE,
    SAYING,
    WRITERS,
    arguments_of,
    declared_in,
    nodes_of,
    owner_of_memory,
    parameters_given,
    readings_of,
    writes_into,
)
from gradwatch._held import MANY, Held, MarkSets, Returned, known_functions
from gradwatch._shapes import (
    EACH,
    NOWHERE,
    WHOLE,
    Shape,
    held_at,
    iterated,
    part_of,
    unordered,
)
from gradwatch._source import (
    FILLERS,
    Function,
    called,
    definitions,
    last_name,
    targets_of,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_ROUNDS = 100
"""Times that a function is read: no text needs so many, and no mistake of ours may keep a user waiting."""


class Marked(Held):
    """The marks inside one function.

    Args:
        file: The file that the function stands in.
        node: Its text.
        shared: The marks on what several functions can read: attributes and global names.
        enter: Returns the marks of another function, given its file and its text.
    """

    def __init__(
        self,
        file: str,
        node: Function,
        shared: MarkSets,
        enter: Callable[[str, Function], Marked],
    ) -> None:
        super().__init__(file, node, shared)
        self._enter = enter
        self._seen_shared = 0
        self.returned = Returned()

    def seed(self, node: ast.AST | None, returned: Returned) -> None:
        """Mark an expression, and all that follows from it."""
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            node = node.test  # some jumps bear the place of the whole statement
        if node is not None:
            self._seed(node, returned)
            self.spread()

    def _seed(self, node: ast.AST, returned: Returned) -> None:
        known = self._seeds.setdefault(node, [])
        if not any(seed is returned for seed in known):
            known.append(returned)
            self._news.count += 1

    def take_up(self, around: Marked, names: Iterable[str]) -> None:
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
        for node in known_functions(self._file, call):
            given = parameters_given(call, node, self.shape)
            chosen = parameters_given(call, node, lambda a: WHOLE if self.chooses(a) else NOWHERE)
            governed = self.governs(call)
            if not (given or chosen or governed or self._shared):
                continue
            inner = self._enter(self._file, node)
            if inner.receive(given, frozenset(chosen), governed=governed):
                self._seed(call, inner.returned)
        return bool(known_functions(self._file, call))

    def _read_property(self, node: ast.Attribute) -> None:
        """Follow the value out of a property that reads what is marked."""
        for known in definitions(tree(self._file)).get(node.attr, ())[:MANY]:
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

    def _write(self, targets: Sequence[ast.AST], shape: Shape) -> None:
        for target in targets:
            self._mark(target, shape, chosen=False)

    def _change(self, call: ast.Call) -> None:
        """Mark an object of a library's on which a method was called for what it does: `kmeans.fit(x)`."""
        method = call.func
        if not isinstance(method, ast.Attribute) or known_functions(self._file, call):
            return
        held = method.value
        is_own = isinstance(held, ast.Name) and held.id in self._locals - {"self", "cls"}
        is_kept = isinstance(held, ast.Attribute) and last_name(held.value) == "self"
        if (is_own or is_kept) and method.attr not in FILLERS | SAYING:
            self._write([held], self._any(arguments_of(call)))
