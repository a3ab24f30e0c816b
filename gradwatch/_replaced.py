"""Which other tensor the loss was computed with, in a parameter's place.

What this room knows that no other does: how to tell a parameter's copy, a tensor that was computed from it before
the step, or a new one under its name, from the tensors of another model.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradwatch import _frames, _words
from gradwatch._calls import Wrapper
from gradwatch._grouping import Finding
from gradwatch._record import Op, label_of
from gradwatch._statements import assignments, copies, derived_attributes
from gradwatch._stats import is_lazy
from gradwatch.report import Cause, Site

if TYPE_CHECKING:
    from gradwatch._evidence import Evidence
    from gradwatch._flow import Flow
    from gradwatch._source import Statement

_DEEPCOPY = Wrapper.DEEPCOPY.public_name


class StandIns:
    """The tensors that the loss of a traced step was computed with, beside the model's own parameters.

    Args:
        evidence: What the step has recorded.
        flow: What reached the loss.
    """

    def __init__(self, evidence: Evidence, flow: Flow) -> None:
        self._evidence = evidence
        self._flow = flow
        self._trace = evidence.trace

    def made_before(self, name: str) -> Finding | None:
        """Look for an attribute that was computed from the parameter before the pass began."""
        path, _, short = name.rpartition(".")
        parts = path.split(".") if path else []
        # The module of the parameter, then those around it, whose text reads `self.child.weight`.
        for depth in range(len(parts), -1, -1):
            owner, child = ".".join(parts[:depth]), next(iter(parts[depth:]), None)
            module = self._evidence.modules.get(owner)
            if module is None or type(module).__module__.startswith("torch."):
                continue
            derived = derived_attributes(type(module), short, child)
            for number, value in enumerate(self._trace.values):
                if value.attribute is None or number not in self._flow.reaching:
                    continue
                if value.attribute[0] == owner and value.attribute[1] in derived:
                    statement, functions = derived[value.attribute[1]]
                    site = Site(statement.file, statement.line, module=owner, source=statement.text)
                    return Finding(_cause_in(functions), site, None, (_words.COMPUTED_EARLIER,))
        return None

    def replaced(self, name: str) -> Finding | None:
        """Look for a leaf that the loss was computed with in this parameter's place."""
        found = self._taken_out(name)
        if found is not None:
            return found
        label = label_of(self._evidence.parameters[name])
        for number, value in enumerate(self._trace.values):
            if value.label != label or number not in self._flow.reaching:
                continue
            users = [op for op in self._trace.ops if number in op.inputs]
            if users and self._stands_in(number, users, self._evidence.parameters[name]):
                is_copy = value.producer is None and self._equals(
                    number, self._evidence.parameters[name]
                )
                copied = self._evidence.only(copies) if is_copy else None
                if copied is not None:
                    return Finding(Cause.REPLACED, copied, _DEEPCOPY)
                return self._evidence.at(Cause.REPLACED, users[0])
        copied = self._copied(name)
        return None if copied is None else Finding(Cause.REPLACED, copied, _DEEPCOPY)

    def _copied(self, name: str) -> Site | None:
        """Return where a module that did not run was copied to one that did: it still has the same weights."""
        path = self._evidence.whole_module_that_did_not_run(name.rpartition(".")[0])
        module = self._evidence.modules.get(path)
        if module is None or path in self._trace.modules_run:
            return None
        mine = dict(module.named_parameters())
        for other, twin in self._evidence.modules.items():
            if other not in self._trace.modules_run or type(twin) is not type(module):
                continue
            theirs = dict(twin.named_parameters())
            if (
                mine.keys() == theirs.keys()
                and all(map(_are_equal, mine.values(), theirs.values()))
                and any(p.numel() and bool((p != p.flatten()[0]).any()) for p in mine.values())
            ):
                into = set(other.split("."))
                return self._evidence.only(partial(_copies_into, into))
        return None

    def _taken_out(self, name: str) -> Finding | None:
        """Look for another tensor that the model now holds under the parameter's name."""
        held: Any = self._evidence.modules.get("")
        for part in name.split("."):
            held = None if held is None else _attributes(held).get(part)
        if not isinstance(held, Tensor) or held is self._evidence.parameters[name]:
            return None
        place = self._trace.registrations.get(id(held))
        if place is not None:
            return Finding(Cause.REPLACED, _frames.site_of(place), "torch.nn.Parameter")
        above = [name, *(name[:at] for at in range(len(name) - 1, 0, -1) if name[at] == ".")]
        put = next((self._trace.put_in[path] for path in above if path in self._trace.put_in), None)
        if put is not None:
            return Finding(Cause.REPLACED, _frames.site_of(put))
        short = name.rpartition(".")[2]
        return Finding(Cause.REPLACED, self._evidence.only(lambda cls: assignments(cls, short)))

    def _stands_in(self, number: int, users: list[Op], parameter: Tensor) -> bool:
        """Tell whether a leaf of the same shape is a stand-in, and not just another model's."""
        if users[0].name.endswith("_"):
            return True  # filled in this very pass: its module was made anew
        if self._trace.values[number].producer is not None:
            return not self._comes_from_parameters(number)
        if users[0].module is not None:
            return True  # used by a module of this model
        return self._equals(number, parameter)

    def _equals(self, number: int, parameter: Tensor) -> bool:
        """Tell whether a leaf of another's holds the same numbers as a parameter."""
        ref = self._trace.values[number].alien
        alien = None if ref is None else ref()
        return alien is not None and bool(torch.equal(alien, parameter))

    def _comes_from_parameters(self, number: int) -> bool:
        """Tell whether a value was computed from parameters of the model."""
        seen, todo = set(), [number]
        while todo:
            number = todo.pop()
            value = self._trace.values[number]
            if value.parameter is not None:
                return True
            if number not in seen and value.producer is not None:
                seen.add(number)
                todo.extend(self._trace.ops[value.producer].inputs)
        return False


def _copies_into(attributes: set[str], cls: type) -> list[Statement]:
    return [statement for statement in copies(cls) if statement.attribute in attributes]


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if is_lazy(one) or is_lazy(other) or one.device != other.device:
        return False
    return label_of(one) == label_of(other) and torch.equal(one, other)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds, without running a property of the user's."""
    return {
        **vars(module),
        **dict(module.named_children()),
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
    }


def _cause_in(functions: frozenset[str]) -> Cause:
    """Return what cuts a value, by the names of what an expression calls and reads."""
    if "deepcopy" in functions:
        return Cause.REPLACED
    if not functions.isdisjoint({"item", "tolist", "numpy", "tensor", "float", "int"}):
        return Cause.LEFT_TORCH
    return Cause.DETACHED
