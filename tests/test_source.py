"""What the text of functions says about values that left torch, and about statements that explain errors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from gradwatch import diagnose
from gradwatch._frames import here, site_of, stack
from gradwatch._marks import Marks, Use
from gradwatch._statements import freezings, keepings

if TYPE_CHECKING:
    from gradwatch._source import Step

LEFT: list[tuple[Step, ...]] = []
USED: list[Step] = []


def leave(value=1.0):
    """Stand for `.item()`: remember who asked."""
    LEFT.append(stack(sys._getframe(1)))
    return value


def use(*_):
    """Stand for an operation: remember its place."""
    place = here(sys._getframe(1))
    assert place is not None
    USED.append((place.code, place.instruction))
    return 1.0


@pytest.fixture(autouse=True)
def _forget():
    LEFT.clear()
    USED.clear()


def held():
    """Return for each use whether it was computed from what left first."""
    marks = Marks(LEFT[0])
    return [marks.hold(Use(step)) for step in USED]


def test_a_name_carries_the_value():
    """What is assigned from the value, and what is computed from that, is marked; the rest is not."""
    a = leave()
    b = a * 2
    c = 3.0
    use(b)
    use(c)

    assert held() == [True, False]


def test_elements_of_a_tuple_are_told_apart():
    """In a tuple assignment only the element that holds the value is marked."""
    a, b = leave(), 2.0
    use(a)
    use(b)

    assert held() == [True, False]


def test_a_container_that_was_filled_carries_the_value():
    """A list into which the value was put, or a dict with it as an item, is marked."""
    rows, table, other = [], {}, []
    rows.append(leave())
    table["x"] = rows
    other.append(1.0)
    use(table)
    use(other)

    assert held() == [True, False]


def test_a_logger_carries_nothing():
    """An object whose method was handed the value is not marked by that."""

    class Logger:
        def log(self, name, value):
            pass

        def loss(self):
            return 1.0

    logger = Logger()
    logger.log("x", leave())
    use(logger.loss())

    assert held() == [False]


def test_a_branch_that_the_value_chose_carries_it():
    """What is assigned under a marked condition is marked."""
    h = 1.0
    if leave() > 0:
        h = 2.0
    use(h)
    use(1.0)

    assert held() == [True, False]


def returned():
    """Return the value that left."""
    return leave() + 1


def test_a_return_value_carries_it_to_the_caller():
    """A call whose function returns the value is marked in the caller."""
    a = returned()
    use(a)

    assert held() == [True]


def logged():
    """Let the value leave, and return something else."""
    leave()
    return 2.0


def test_a_function_that_keeps_the_value_to_itself_marks_nothing_outside():
    """A call whose function does not return the value stays unmarked."""
    a = logged()
    use(a)

    assert held() == [False]


class Holder:
    """Something with an attribute."""

    def fill(self):
        """Keep the value in an attribute."""
        self.kept = leave()

    def take(self):
        """Use the attribute."""
        use(self.kept)


def test_an_attribute_carries_it_to_other_functions():
    """What is read from an attribute that holds the value is marked in every function."""
    holder = Holder()
    holder.fill()
    holder.take()

    assert held() == [True]


def test_a_comprehension_belongs_to_the_function_around_it():
    """A value that leaves inside of a list comprehension marks the list."""
    rows = [leave(x) for x in (1.0, 2.0)]
    use(rows)

    assert held() == [True]


def test_a_use_inside_of_a_comprehension_is_found():
    """An operation inside of a comprehension that names a marked value is marked."""
    a = leave()
    [use(a) for _ in range(1)]

    assert held() == [True]


def test_code_without_text_marks_nothing():
    """Code that was typed into `exec` is not followed, and nothing fails."""
    exec("a = leave()\nuse(a)", {"leave": leave, "use": use})  # noqa: S102 -- what is tested

    assert held() == [False]


def test_the_site_of_an_expression_has_columns_in_characters():
    """Carets count characters, also behind text that takes more bytes."""
    _, place = "größe", here(sys._getframe())

    site = site_of(place)

    assert site is not None
    assert site.source is not None
    # Which of the two calls is running when the frame is looked at is Python's affair.
    assert site.source[site.column : site.end_column] in {
        "sys._getframe()",
        "here(sys._getframe())",
    }


class Frozen:
    """Switches things off."""

    def __init__(self, parameter):
        self.state = [1]
        parameter.requires_grad = False
        parameter.requires_grad_(False)


class Derived(Frozen):
    """Inherits the assignment."""


def test_statements_are_found_in_the_class_and_in_those_it_inherits_from():
    """Assignments to an attribute, and what freezes parameters, are found by reading the class."""
    assert [s.text for s in keepings(Derived, "state")] == ["self.state = [1]"]
    assert [s.text for s in freezings(Frozen)] == [
        "parameter.requires_grad = False",
        "parameter.requires_grad_(False)",
    ]
    assert keepings(int, "state") == []


BEFORE = """
def loss(model, x):
    size = model[0](x).sum().item()
    return model[1](x).sum()
"""
AFTER = """
import math
# Lines were added above.
def loss(model, x):
    size = model[0](x).sum().item()
    scale = math.exp(size) * 2
    return model[1](x).sum() * scale
"""


def test_a_file_loaded_again_is_read_again(tmp_path):
    """A file that was edited and loaded again in one process is judged by its new text."""
    path = tmp_path / "net.py"
    causes = []
    for text in (BEFORE, AFTER):
        path.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(path), "exec"), names)  # noqa: S102
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with diagnose(model) as diagnosis:
            names["loss"](model, torch.ones(1, 2)).backward()
        causes.append([str(found.cause) for found in diagnosis.report.diagnoses])

    assert causes == [["not_in_loss"], ["left_torch"]]
