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
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Step = tuple[CodeType, int]
"""A code object and the instruction that was running."""

_INNER = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_MANY = 3
"""Functions of one name in a file beyond which a call is not followed: none of them is meant for sure."""
_FILLERS = {"append", "appendleft", "extend", "add", "insert", "update", "setdefault", "put"}
_WRITERS = {
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
_SAME_MEMORY = {"numpy", "detach", "cpu", "view", "reshape", "ravel", "data", "T"}
"""Methods and attributes whose result lies over the memory of the tensor or array."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Module


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


def _span_of(node: ast.AST) -> tuple[int, int, int, int] | None:
    if not hasattr(node, "lineno"):
        return None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def function(code: CodeType) -> _Function | None:
    """Return the syntax of the function that a code object was compiled from."""
    _fresh(code)
    return _function(code, tree(code.co_filename))


@lru_cache(maxsize=1024)
def _function(code: CodeType, module: ast.Module | None) -> _Function | None:
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
        self.shared = _MarkSets()
        self._functions: dict[ast.AST, _Marked] = {}
        self._answers: dict[Use, bool] = {}
        inner = next(iter(stack), None)
        returned = _Returned(data=True)
        for step in stack:
            if step[0].co_name in _INNER:
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
            if not (returned.data or returned.chosen):
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
            if marked.governs(found) or marked.chooses(found):
                return True
            operands = [found] if use.plain is None else _operands(found, use)
            if any(marked.depends(operand) for operand in operands):
                return True
        return use.plain != frozenset() and any(map(self._passes, use.callers))

    def _passes(self, caller: Step) -> bool:
        """Tell whether a call was handed the value."""
        marked = self._around(caller)
        call = None if marked is None else expression(caller, marked.node)
        if marked is None or not isinstance(call, ast.Call):
            return False
        if 0 < len(_definitions(tree(caller[0].co_filename)).get(_called(call), ())) <= _MANY:
            return False  # its text is known, and says which of its arguments go where
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if isinstance(call.func, ast.Name):
            given.append(call.func)  # a function that carries the value: a closure, a `partial`
        return any(marked.depends(argument) for argument in given)

    def _around(self, step: Step) -> _Marked | None:
        code = step[0]
        if code.co_name in _INNER:
            return next((m for m in self._functions.values() if m.covers(step)), None)
        node = function(code)
        return None if node is None else self._functions.get(node) or self._reached(code, node)

    def _reached(self, code: CodeType, node: _Function) -> _Marked | None:
        """Return the marks of a function that the value reaches through names outside of it."""
        outer = [m for m in self._functions.values() if m.names_among(code.co_freevars)]
        if not (outer or self.shared):
            return None
        marked = self._marked(code.co_filename, node)
        for around in outer:
            marked.take_up(around, code.co_freevars)
        marked.spread()
        return marked

    def _marked(self, file: str, node: _Function) -> _Marked:
        if node not in self._functions:
            self._functions[node] = _Marked(file, node, self.shared, self._marked)
        return self._functions[node]


def _only_chooses(node: ast.AST | None, through: str) -> bool:
    """Tell whether an expression in which a value was asked for hands on something else, by the answer."""
    if isinstance(node, ast.Subscript):
        return through == "__index__"
    if isinstance(node, ast.Call) and _called(node) in _CHOOSERS:
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
    return [node] if plain else []


Part = int | str
"""The position of an element of a tuple, the key of one of a mapping, the name of a field."""


@dataclass(slots=True)
class _Returned:
    """What a function hands to its caller of the value."""

    data: bool = False
    parts: frozenset[Part] | None = None
    """Of a returned tuple or mapping, the elements that hold data; None for all of them."""
    chosen: bool = False


Key = tuple[object, ...]
"""What can be marked: a name, an attribute, a module's name, or one item of a container."""


class _MarkSets:
    """Two sets of marks."""

    def __init__(self) -> None:
        self.data: set[Key] = set()
        self.chosen: set[Key] = set()

    def __len__(self) -> int:
        return len(self.data) + len(self.chosen)


class _Marked:
    """The marks inside one function."""

    def __init__(
        self,
        file: str,
        node: _Function,
        shared: _MarkSets,
        enter: Callable[[str, _Function], _Marked],
    ) -> None:
        self.node = node
        self._enter = enter
        self.returned = _Returned()
        self._shared = shared
        self._own = _MarkSets()
        self._file = file
        self._locals = set(_local_names(node))
        self._class = _classes_of_methods(tree(file)).get(node)
        self._seeds: dict[ast.AST, _Returned] = {}
        self._governed: set[ast.AST] = set()
        self._seen_shared = 0

    # What is asked --------------------------------------------------------------------------------

    def covers(self, step: Step) -> bool:
        """Tell whether a step lies in this function's text."""
        wanted, own = span(step), _span_of(self.node)
        return wanted is not None and own is not None and own[:2] <= wanted[:2] <= own[2:]

    def names_among(self, names: Iterable[str]) -> bool:
        """Tell whether any of these local names is marked."""
        return any(("name", n) in self._own.data | self._own.chosen for n in names)

    def depends(self, node: ast.AST) -> bool:
        """Tell whether an expression holds data of the value."""
        seed = self._seeds.get(node)
        if seed is not None and seed.data:
            return True
        if isinstance(node, ast.Call) and _called(node) in _ASK_FOR_THE_TYPE:
            return False
        read = _part_read(node)
        parts = None if read is None else self._parts(read[0])
        if read is not None and parts is not None and not _is_by_position(node, parts):
            return read[1] in parts
        return self._finds(node, self._own.data | self._shared.data, self.depends)

    def _parts(self, node: ast.AST) -> frozenset[Part] | None:
        """Return which parts of a container hold data of the value; None where its text does not tell."""
        seed = self._seeds.get(node)
        if seed is not None and seed.data:
            return seed.parts
        named = _named_parts(node)
        if named is not None:
            return frozenset(part for part, value in named if self.depends(value))
        key = self._key(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        marks = self._own.data | self._shared.data
        if key is None or key in marks or _any_class(key) in marks:
            return None
        parts = {mark[3] for mark in marks if mark[:3] == ("item", *key[:2])}
        return frozenset(part for part in parts if isinstance(part, (int, str))) or None

    def chooses(self, node: ast.AST) -> bool:
        """Tell whether an expression is what it is because of the value."""
        seed = self._seeds.get(node)
        if seed is not None and seed.chosen:
            return True
        if isinstance(node, ast.IfExp) and self.depends(node.test):
            return True
        if isinstance(node, ast.Subscript) and self.depends(node.slice):
            return True
        if isinstance(node, ast.Call) and self.depends(node.func) and _selects(node.func):
            return True
        if isinstance(node, ast.comprehension) and any(map(self.depends, node.ifs)):
            return True
        return self._finds(node, self._own.chosen | self._shared.chosen, self.chooses)

    def governs(self, node: ast.AST) -> bool:
        """Tell whether a node stands in a branch or a loop that the value chose."""
        return any(node in ast.walk(branch) for branch in self._governed)

    def _finds(self, node: ast.AST, marks: set[Key], again: Callable[[ast.AST], bool]) -> bool:
        key = self._key(node)
        if key is not None and (key in marks or _any_class(key) in marks):
            return True
        if isinstance(node, (ast.Name, ast.Attribute)) and any(
            mark[:3] == ("item", *(key or ())[:2]) for mark in marks
        ):
            return True  # the whole container, of which an item is marked
        if key is not None and key[0] == "item" and isinstance(node, ast.Subscript):
            base = self._key(node.value)
            return base is not None and base in marks
        return any(map(again, ast.iter_child_nodes(node)))

    def _key(self, node: ast.AST) -> Key | None:
        if isinstance(node, ast.Name):
            return ("name", node.id) if node.id in self._locals else ("global", node.id, self._file)
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            return "attribute", node.attr, self._class if own else None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = self._key(node.value)
            return None if base is None else ("item", *base[:2], node.slice.value)
        return None

    # How marks spread ---------------------------------------------------------------------------

    def seed(self, node: ast.AST | None, returned: _Returned) -> None:
        """Mark an expression, and all that follows from it."""
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            node = node.test  # some jumps bear the place of the whole statement
        if node is not None:
            self._seeds[node] = returned
            self.spread()

    def take_up(self, around: _Marked, names: Iterable[str]) -> None:
        """Take over the marks that a function around this one has on names that both know."""
        keys = {("name", name) for name in names}
        self.know(names)
        self._own.data |= around._own.data & keys
        self._own.chosen |= around._own.chosen & keys

    def know(self, names: Iterable[str]) -> None:
        """Take names of a function around this one for its own."""
        self._locals |= set(names)

    def spread(self) -> None:
        """Mark what follows from the marks until nothing is added."""
        size = -1
        while size != (size := len(self._own) + len(self._shared) + len(self._governed)):
            for node in _own_nodes(self.node):
                self._visit(node)
        if isinstance(self.node, ast.Lambda):
            self._return(self.node.body)

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
        elif isinstance(node, (ast.If, ast.While)):
            self._govern(node)
        elif isinstance(node, ast.Match):
            self._match(node)
        elif isinstance(node, ast.YieldFrom):
            self._return(node)
        elif isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:
            self._return(node.value)
        else:
            self._visit_expression(node)

    def _visit_expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            if not self._pass_on(node):
                self._fill(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and self._shared:
            self._read_property(node)

    def _govern(self, node: ast.If | ast.While) -> None:
        """Note what a marked condition chooses: its branches, and the loop that it may end."""
        if not (self.depends(node.test) or self.chooses(node.test)):
            return
        if all(isinstance(statement, ast.Raise) for statement in node.body):
            return
        self._governed.update((*node.body, *node.orelse))
        if any(isinstance(inner, (ast.Break, ast.Continue)) for inner in ast.walk(node)):
            for loop in _own_nodes(self.node):
                if isinstance(loop, (ast.For, ast.While)) and node in ast.walk(loop):
                    self._governed.update(loop.body)

    def _match(self, node: ast.Match) -> None:
        """Note what a marked subject chooses: a case, and the names that it is taken apart into."""
        data = self.depends(node.subject)
        if not (data or self.chooses(node.subject)):
            return
        for case in node.cases:
            self._governed.update(case.body)
            captured = {
                name
                for inner in ast.walk(case.pattern)
                for name in (getattr(inner, "name", None), getattr(inner, "rest", None))
                if name is not None
            }
            if data:
                self._own.data |= {("name", name) for name in captured}

    def _return(self, value: ast.expr) -> None:
        if isinstance(value, ast.Constant) and value.value is None:
            return
        if self.governs(value) or self.chooses(value):
            self.returned.chosen = True
        if self.depends(value):
            parts, known = self._parts(value), self.returned
            if parts is None or (known.data and known.parts is None):
                known.data, known.parts = True, None
            else:
                known.data, known.parts = True, parts | (known.parts or frozenset())

    def _assign(self, targets: Iterable[ast.AST], value: ast.AST) -> None:
        data, chosen = self.depends(value), self.chooses(value)
        if not data and (owner := _owner_of_memory(value)) is not None:
            # `array = tensor.numpy()`: what is written into the array later is in the tensor.
            written = [t for t in targets if _writes_into(self.node, t)]
            self._mark(owner, data=False, chosen=any(map(self.depends, written)))
        parts = self._parts(value) if data else None
        for target in targets:
            taken = target.elts if isinstance(target, (ast.Tuple, ast.List)) else None
            texts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else None
            key = None if parts is None else self._key(target)
            if taken is not None and texts is not None and len(taken) == len(texts):
                for one, other in zip(taken, texts, strict=True):
                    self._assign([one], other)
            elif taken is not None and parts is not None:
                for position, one in enumerate(taken):
                    self._mark(one, data=position in parts, chosen=chosen)
            elif parts is not None and key is not None and key[0] != "item":
                sets = self._own if key[0] == "name" else self._shared
                sets.data |= {("item", *key[:2], part) for part in parts}
                self._mark(target, data=False, chosen=chosen or self.governs(target))
            else:
                self._mark(target, data=data, chosen=chosen or self.governs(target))

    def _mark(self, target: ast.AST, *, data: bool, chosen: bool) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._mark(element, data=data, chosen=chosen)
        elif isinstance(target, ast.Starred):
            self._mark(target.value, data=data, chosen=chosen)
        elif (owner := _owner_of_memory(target)) is not None:
            # A tensor holds no Python data, but what Python wrote into it decides what it is.
            self._mark(owner, data=data, chosen=data or chosen)
        else:
            key = self._key(target)
            if key is None and isinstance(target, ast.Subscript):
                key = self._key(target.value)
            if key is not None:
                is_local = "name" in key[:2]
                sets = self._own if is_local else self._shared
                keys = _readings(key)
                if data:
                    sets.data |= keys
                if chosen:
                    sets.chosen |= keys

    def _pass_on(self, call: ast.Call) -> bool:
        """Follow the value into functions of the same file that a call hands it to."""
        called = _definitions(tree(self._file)).get(_called(call), ())
        if not called or len(called) > _MANY:
            return False
        for node in called:
            given = _parameters_given(call, node, self.depends)
            chosen = _parameters_given(call, node, self.chooses)
            governed = self.governs(call)
            if not (given or chosen or governed or self._shared):
                continue
            inner = self._enter(self._file, node)
            if inner.receive(given, chosen, governed=governed):
                self._seeds[call] = inner.returned
        return True

    def _read_property(self, node: ast.Attribute) -> None:
        """Follow the value out of a property that reads what is marked."""
        for called in _definitions(tree(self._file)).get(node.attr, ())[:_MANY]:
            if any(_last_name(d).endswith("property") for d in called.decorator_list):
                inner = self._enter(self._file, called)
                if inner.receive():
                    self._seeds[node] = inner.returned

    def receive(
        self,
        names: frozenset[str] = frozenset(),
        chosen: frozenset[str] = frozenset(),
        *,
        governed: bool = False,
    ) -> bool:
        """Mark arguments of this function; return whether its caller gets anything of the value back.

        Args:
            names: The arguments that hold data.
            chosen: Those that were chosen.
            governed: Whether the call itself was chosen, and with it all that the function does.
        """
        keys = {("name", name) for name in names}
        chosen_keys = {("name", name) for name in chosen}
        news = not (keys <= self._own.data and chosen_keys <= self._own.chosen)
        news = news or self._seen_shared != len(self._shared)
        self._seen_shared = len(self._shared)
        self._own.data |= keys
        self._own.chosen |= chosen_keys
        if governed and isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            news = news or not self._governed.issuperset(self.node.body)
            self._governed.update(self.node.body)
        if news:
            self.spread()
        return self.returned.data or self.returned.chosen

    def _fill(self, call: ast.Call) -> None:
        """Mark a container into which a value was put, or that the value chose to fill."""
        method = call.func
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        data, chosen = any(map(self.depends, values)), any(map(self.chooses, values))
        name = _called(call)
        if isinstance(method, ast.Attribute) and method.attr in _FILLERS:
            self._mark(method.value, data=data, chosen=chosen or self.governs(call))
        elif isinstance(method, ast.Attribute) and method.attr == "sort":
            self._mark(method.value, data=False, chosen=data or self.depends(call))
        elif name == "tofile" and isinstance(method, ast.Attribute):
            self._write(call.args[:1], data=self.depends(method.value))
        elif name == "setattr" and call.args[1:]:
            self._set_attribute(call.args[0], call.args[1], data=data, chosen=chosen)
        elif name in _WRITERS:
            self._write(call.args[_WRITERS[name] :][:1], data=data)

    def _write(self, targets: Sequence[ast.AST], *, data: bool) -> None:
        for target in targets:
            self._mark(target, data=data, chosen=False)

    def _set_attribute(self, owner: ast.expr, name: ast.expr, *, data: bool, chosen: bool) -> None:
        if isinstance(name, ast.Constant):
            target = ast.Attribute(owner, str(name.value), ast.Store())
            self._mark(target, data=data, chosen=chosen)


def _writes_into(function_: ast.AST, target: ast.AST) -> bool:
    """Tell whether a function writes into what a name holds, and does not just give it a new value."""
    name = target.id if isinstance(target, ast.Name) else None
    for node in ast.walk(function_):
        into: Iterable[ast.AST] = ()
        if isinstance(node, ast.AugAssign):
            into = [node.target]
        elif isinstance(node, ast.Assign):
            into = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.Call) and _called(node) in _WRITERS:
            into = node.args[:1]
        if name is not None and any(isinstance(i, ast.Name) and i.id == name for i in into):
            return True
    return False


def _owner_of_memory(node: ast.AST) -> ast.AST | None:
    """Return the tensor whose memory an expression is a view of: ``h`` for ``h.numpy()[0]``."""
    inner, is_array = node, False
    while True:
        if isinstance(inner, ast.Subscript):
            inner = inner.value
        elif isinstance(inner, ast.Call) and _called(inner) in _SAME_MEMORY:
            is_array = is_array or _called(inner) == "numpy"
            inner = inner.func
        elif isinstance(inner, ast.Attribute) and inner.attr in _SAME_MEMORY:
            inner = inner.value
        else:
            return inner if is_array and inner is not node else None


@lru_cache(maxsize=256)
def _definitions(
    module: ast.Module | None,
) -> dict[str, tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]]:
    """Return the functions of a file by their names; methods of several classes may share one."""
    found: dict[str, tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]] = {}
    for node in () if module is None else ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = (*found.get(node.name, ()), node)
    return found


def _parameters_given(
    call: ast.Call,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    depends: Callable[[ast.AST], bool],
) -> frozenset[str]:
    """Return the names under which a function gets the arguments of a call that hold the value."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    given: set[str | None] = {
        name for name, value in zip(names, call.args, strict=False) if depends(value)
    }
    known = {*names, *(argument.arg for argument in node.args.kwonlyargs)}
    for keyword in call.keywords:
        if depends(keyword.value):
            rest = None if node.args.kwarg is None else node.args.kwarg.arg
            given.add(keyword.arg if keyword.arg in known else rest)
    if node.args.vararg is not None and any(map(depends, call.args[len(names) :])):
        given.add(node.args.vararg.arg)
    return frozenset(name for name in given if name is not None)


@lru_cache(maxsize=1024)
def _local_names(node: _Function) -> frozenset[str]:
    """Return the names that belong to a function: its arguments, and what it assigns."""
    if isinstance(node, ast.Module):
        return frozenset()
    names: set[str] = set()
    shared: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            names.add(inner.arg)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, ast.Global):
            shared.update(inner.names)
    return frozenset(names - shared)


def _readings(key: Key) -> set[Key]:
    """Return the keys under which a marked thing may be read: an attribute also of an unknown object."""
    if key[0] != "attribute":
        return {key}
    return {key, (*key[:2], None)} if key[2] is not None else {key, (*key[:2], "any")}


def _any_class(key: Key) -> Key | None:
    """Return the key of an attribute that was marked on an object of unknown class."""
    return (*key[:2], "any") if key[0] == "attribute" else None


@lru_cache(maxsize=256)
def _classes_of_methods(module: ast.Module | None) -> dict[ast.AST, str]:
    return {
        method: cls.name
        for cls in (() if module is None else ast.walk(module))
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
    }


_ASK_FOR_THE_TYPE = frozenset(["isinstance", "issubclass", "hasattr", "callable", "type", "id"])
"""Functions whose answer does not depend on what a number is."""


def _named_parts(node: ast.AST) -> list[tuple[Part, ast.expr]] | None:
    """Return the parts of a container that is written out: a tuple, a mapping, an object made by keywords."""
    if isinstance(node, (ast.Tuple, ast.List)):
        starred = any(isinstance(part, ast.Starred) for part in node.elts)
        return None if starred else list(enumerate(node.elts))
    if isinstance(node, ast.Dict):
        pairs = [
            (key.value, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, (int, str))
        ]
        return pairs if len(pairs) == len(node.keys) else None
    if isinstance(node, ast.Call) and not node.args and node.keywords:
        made = _called(node)
        pairs = [(k.arg, k.value) for k in node.keywords if k.arg is not None]
        is_object = made == "dict" or made[:1].isupper()
        return pairs if is_object and len(pairs) == len(node.keywords) else None
    return None


def _part_read(node: ast.AST) -> tuple[ast.expr, Part] | None:
    """Return the container and the part that an expression reads: `out["loss"]`, `out.loss`."""
    if isinstance(node, ast.Attribute) and node.attr not in _OF_CONTAINERS:
        return node.value, node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        part = node.slice.value
        return (node.value, part) if isinstance(part, (int, str)) else None
    return None


def _is_by_position(node: ast.AST, parts: frozenset[Part]) -> bool:
    """Tell whether an attribute is read of what is known by position alone: a named tuple's."""
    return isinstance(node, ast.Attribute) and any(isinstance(part, int) for part in parts)


_OF_CONTAINERS = frozenset([*dir(dict), *dir(tuple), *dir(list)])
"""Attributes that every container has: their use is one of the whole."""


def _selects(node: ast.AST) -> bool:
    """Tell whether an expression picks what is called: `self.experts[k]`."""
    return any(isinstance(inner, ast.Subscript) for inner in ast.walk(node))


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
            for definition in _classes(module, base.__qualname__)
            for method in definition.body
            for node in ast.walk(method)
            if (rank := _keeps(node, name, getattr(method, "name", ""))) is not None
        ]
        found += [
            (0, node)
            for definition in _classes(module, base.__qualname__)
            for method in definition.body
            if getattr(method, "name", None) == name  # a `cached_property` keeps what it returns
            for node in ast.walk(method)
            if isinstance(node, ast.Return)
        ]
        if found:
            return _statements(file, [node for _, node in sorted(found, key=lambda pair: pair[0])])
    return []


def stores(step: Step) -> list[Statement]:
    """Return where a file keeps what an expression is given, the tellest statement first.

    Args:
        step: The place of the expression.
    """
    code = step[0]
    node = function(code)
    read = None if node is None else expression(step, node)
    module = tree(code.co_filename)
    if read is None or module is None:
        return []
    definitions = {
        n.name: n
        for n in ast.walk(module)
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    names = _given_names(read, definitions)
    found = [
        (rank, kept)
        for definition in [*definitions.values(), module]
        for kept in _own_nodes(definition)
        for name in names
        if (rank := _keeps(kept, name, getattr(definition, "name", ""))) is not None
    ]
    return _statements(code.co_filename, [kept for _, kept in sorted(found, key=lambda p: p[0])])


def _given_names(read: ast.AST, definitions: Mapping[str, ast.AST]) -> set[str]:
    """Return the names of attributes and containers that an expression takes its operands from."""
    given = (
        [*read.args, *(k.value for k in read.keywords)] if isinstance(read, ast.Call) else [read]
    )
    names: set[str] = set()
    for inner in (node for value in given for node in ast.walk(value)):
        if isinstance(inner, ast.Call) and _called(inner) in definitions:
            for returned in ast.walk(definitions[_called(inner)]):
                if isinstance(returned, ast.Return) and returned.value is not None:
                    names |= {_last_name(n) for n in ast.walk(returned.value)}
        names.add(_last_name(inner))
    return names - {""}


def _keeps(node: ast.AST, name: str, method: str) -> int | None:
    """Tell how much a statement says about what is kept under a name; less is more."""
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
        for target in _flat_targets(node):
            if isinstance(target, ast.Subscript) and _last_name(target.value) == name:
                return 0
            if isinstance(target, ast.Attribute) and target.attr == name:
                return 2 if method == "__init__" else 1
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    fills = node.func.attr in _FILLERS and _last_name(node.func.value) == name
    return 0 if fills and node.args else None


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def freezings(cls: type) -> list[Statement]:
    """Return where the file of a class switches ``requires_grad`` off, its own methods first."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    own = [n for c in _classes(module, cls.__qualname__) for n in ast.walk(c) if _freezes(n)]
    return _statements(file, own or [n for n in ast.walk(module) if _freezes(n)])


def assignments(cls: type, name: str) -> list[Statement]:
    """Return where the methods of a class, but for ``__init__``, assign an attribute of this name."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    return _statements(
        file,
        [
            node
            for definition in _classes(module, cls.__qualname__)
            for method in definition.body
            if getattr(method, "name", "") != "__init__"
            for node in ast.walk(method)
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Attribute) and t.attr == name for t in node.targets)
        ],
    )


def clearings(cls: type) -> list[Statement]:
    """Return where the file of a class empties gradients, its own methods first."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    own = [n for c in _classes(module, cls.__qualname__) for n in ast.walk(c) if _clears(n)]
    return _statements(file, own or [n for n in ast.walk(module) if _clears(n)])


def _clears(node: ast.AST) -> bool:
    if isinstance(node, (ast.Assign, ast.Delete)):
        grads = [t for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "grad"]
        emptied = node.value if isinstance(node, ast.Assign) else ast.Constant(None)
        return bool(grads) and isinstance(emptied, ast.Constant) and emptied.value is None
    return isinstance(node, ast.Call) and _called(node) == "zero_grad"


def copies(cls: type) -> list[Statement]:
    """Return where the file of a class calls ``copy.deepcopy``."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    calls = (node for node in ast.walk(module) if isinstance(node, ast.Call))
    return _statements(file, [node for node in calls if _called(node) == "deepcopy"])


def calls_of(cls: type, name: str) -> list[Statement]:
    """Return where the methods of a class call a function of this name, also as ``module.name``."""
    file = file_of(cls)
    module = None if file is None else tree(file)
    if file is None or module is None:
        return []
    return _statements(
        file,
        [
            node
            for definition in _classes(module, cls.__qualname__)
            for node in ast.walk(definition)
            if isinstance(node, ast.Call) and _last_name(node.func) == name
        ],
    )


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


def _flat_targets(
    node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr,
) -> Iterator[ast.expr]:
    for target in _targets(node):
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
    """Return the wrap in whose argument an expression stands: ``nn.Parameter(w + noise)``."""
    node = function(step[0])
    inner = None if node is None else expression(step, node)
    if node is None or inner is None:
        return None
    calls = [c for c in _wraps_in(node) if any(part is inner for part in ast.walk(c))]
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
        and any(isinstance(t, ast.Name) and t.id in names for t in _flat_targets(statement))
    ]
    for call in (c for maker in makers for c in _wraps_in(maker)):
        return _text(code, call)
    module = tree(code.co_filename)
    for maker in (m for m in (*makers, used) if isinstance(m, ast.Call)):
        helpers = _definitions(module).get(_called(maker), ())
        calls = [call for helper in helpers for call in _wraps_in(helper)]
        if len(calls) == 1:
            owner = _classes_of_methods(module).get(helpers[0])
            name = f"{owner}.{helpers[0].name}" if owner else helpers[0].name
            return _text(code, calls[0], name)
    return None


def _wraps_in(node: ast.AST) -> list[ast.Call]:
    calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
    return [call for call in calls if _called(call) in {"Parameter", "Variable"}]


def _text(code: CodeType, node: ast.AST, name: str | None = None) -> Text | None:
    place = _span_of(node)
    return None if place is None else Text(code.co_filename, place, name or code.co_qualname)


def _called(call: ast.Call) -> str:
    function_ = call.func
    if isinstance(function_, ast.Attribute):
        return function_.attr
    return function_.id if isinstance(function_, ast.Name) else ""


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
    for definition in _classes(module, cls.__qualname__):
        for node in ast.walk(definition):
            for name, value in _kept_values(node):
                read = {n.attr for n in ast.walk(value) if isinstance(n, ast.Attribute)}
                if {parameter, child or parameter} <= read:
                    calls = {_called(n) for n in ast.walk(value) if isinstance(n, ast.Call)}
                    (statement,) = _statements(file, [node])
                    found[name] = (statement, frozenset(read | calls))
    return found


def _kept_values(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the attributes and buffers that a statement sets, with their expressions."""
    if isinstance(node, ast.Assign):
        for target in _flat_targets(node):
            if isinstance(target, ast.Attribute):
                yield target.attr, node.value
    elif isinstance(node, ast.Call) and _called(node) == "register_buffer":
        name, value = [*node.args, None, None][:2]
        if isinstance(name, ast.Constant) and value is not None:
            yield str(name.value), value
