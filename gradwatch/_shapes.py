"""Where in a tuple, a mapping or an object a value is: which parts of a thing hold it.

What this room knows that no other does: how a part is taken out of a thing and put into another, so that a metric
returned beside a loss is told from it.

Limits: parts of parts are told apart to a depth of four.
"""

from __future__ import annotations

import ast

Part = int | str
"""The position of an element, the key of one, the name of a field; ``EACH`` for any element of a sequence, and
``ANY_KEY`` for what is under any key of a mapping."""
EACH = "*"
ANY_KEY = "**"
Path = tuple[Part, ...]
Shape = frozenset[Path]
"""Where in a thing the value is: ``()`` for the thing itself, ``("aux",)`` for one item, nothing for nowhere."""
NOWHERE: Shape = frozenset()
WHOLE: Shape = frozenset({()})
_DEEPEST = 4
"""Parts of parts beyond which a thing counts as a whole, so that loops come to an end."""


def held_at(part: Part, shape: Shape) -> Shape:
    """Return the shape of a container that holds a thing at one place."""
    return frozenset((part, *path) if len(path) < _DEEPEST else () for path in shape)


def part_of(shape: Shape, *parts: Part) -> Shape:
    """Return the shape of one part of a container; of a whole, a part is the whole again."""
    wanted = {*parts, EACH, ANY_KEY}
    return frozenset(path[1:] for path in shape if not path or path[0] in wanted)


def element_of(shape: Shape) -> Shape:
    """Return the shape of any one element, whatever its place or key."""
    return frozenset(path[1:] for path in shape)


def iterated(shape: Shape) -> Shape:
    """Return the shape of what a loop over a container hands out: of a mapping only the keys."""
    elements = (path for path in shape if not path or path[0] == EACH or isinstance(path[0], int))
    return frozenset(path[1:] for path in elements)


def unordered(shape: Shape) -> Shape:
    """Return the shape of a container whose elements may have changed their places."""
    return frozenset(
        (EACH, *path[1:]) if path and isinstance(path[0], int) else path for path in shape
    )


def positions_in(shape: Shape) -> list[Part]:
    """Return the positions in a shape: an attribute may be any element of a named tuple."""
    return [path[0] for path in shape if path and isinstance(path[0], int)]


def constant_of(node: ast.AST) -> Part:
    """Return the part that a key stands for, ``EACH`` where the text does not tell."""
    known = isinstance(node, ast.Constant) and isinstance(node.value, (int, str))
    return node.value if known else EACH  # type: ignore[attr-defined]


def key_of(node: ast.AST) -> Part:
    """Return the part that a key of a mapping stands for."""
    key = constant_of(node)
    return ANY_KEY if key == EACH else key
