"""What a traced step shows: its operations, cuts and places as findings.

What this room knows that no other does: what cause an operation that cuts stands for, and which line is its place:
where it ran, where what it made is first used, or where the text says that a value is wrapped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch import _frames, _words
from gradwatch._calls import Kind, Wrapper
from gradwatch._grouping import Finding
from gradwatch._nearby import surrounding, switch_in_helper, switched_off_by
from gradwatch._source import Statement, wrapping
from gradwatch._stores import calls_kept
from gradwatch.report import Cause, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from gradwatch._flow import Cut
    from gradwatch._graph import Passed
    from gradwatch._record import Op
    from gradwatch._sensor import Sensor
    from gradwatch._trace import Trace

MODES = ("no_grad", "inference_mode", "set_grad_enabled")
"""What switches gradients off."""
_WRAPPED = {
    Wrapper.CUSTOM_FUNCTION: Cause.CUSTOM_FUNCTION,
    Wrapper.REENTRANT_CHECKPOINT: Cause.REENTRANT_CHECKPOINT,
    Wrapper.SAMPLE: Cause.NON_DIFFERENTIABLE,
    Wrapper.DEEPCOPY: Cause.REPLACED,
    Wrapper.DEEPCOPY_TENSOR: Cause.DETACHED,
    Wrapper.LOAD: Cause.REPLACED,
}

_BY_KIND = {
    Kind.SEVER: Cause.DETACHED,
    Kind.REWRAP: Cause.DETACHED,
    Kind.SET_DATA: Cause.DETACHED,
    Kind.EXIT: Cause.LEFT_TORCH,
    Kind.COPY_VALUES: Cause.LEFT_TORCH,
}


class Evidence:
    """What a traced step has recorded, and what its operations say of a cause.

    Args:
        trace: The record of the step.
        parameters: The parameters by name.
        modules: The model's modules by path.
        passes: What was seen of each backward pass.
        sensor: What gradients have arrived.
    """

    def __init__(
        self,
        trace: Trace,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        passes: Sequence[Passed],
        sensor: Sensor,
    ) -> None:
        self.trace = trace
        self.parameters = parameters
        self.modules = modules
        self.passes = passes
        self.sensor = sensor
        self._kept: dict[int, Site | None] = {}

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each leaf that the losses' graphs lead to."""
        return set[int]().union(*(passed.reached for passed in self.passes))

    def judge(self, cut: Cut) -> Finding:
        """Return the cause that a cut stands for, and its place."""
        op = cut.op
        cause = _cause(op)
        if cause is Cause.UNDETERMINED:
            notes = (_words.inside_script(_frames.site_of(op.place)), _words.RULED_OUT)
            return Finding(cause, notes=notes)
        leaves = cut.left_through
        if leaves is not None and (
            cause in {Cause.DETACHED, Cause.NO_GRAD} or leaves.name == "torch.Tensor.__bool__"
        ):
            return self.at(Cause.LEFT_TORCH, leaves)
        if op.kind is Kind.REWRAP and op.place is None:
            return self._wrapped(cause, op)
        loaded = self._loaded_by(op) if op.kind is Kind.SEVER else None
        if loaded is not None:
            return self.at(Cause.REPLACED, loaded)  # `state_dict()` detaches what it hands out
        return self.at(cause, op)

    def _loaded_by(self, op: Op) -> Op | None:
        """Return what loads the values of a detached tensor, or of some that were taken from it, into others."""
        behind = set(op.outputs)
        for later in self.trace.ops[op.index + 1 :]:
            if not behind.isdisjoint(later.inputs):
                if later.wrapper is Wrapper.LOAD:
                    return later
                if later.name != "torch.Tensor.__getitem__":
                    return None
                behind.update(later.outputs)
        return None

    def _wrapped(self, cause: Cause, op: Op) -> Finding:
        """Return where a value was wrapped as a new leaf, else where the leaf was first used."""
        reader = self.first_reader(op) or op
        maker = self.trace.values[op.inputs[0]].producer if op.inputs else None
        made = None if maker is None else self.trace.ops[maker].place
        text = (
            None
            if reader.place is None
            else wrapping(reader.place[:2], None if made is None else made[:2])
        )
        if text is None:
            return Finding(cause, _frames.site_of(reader.place, reader.module), op.name)
        site = _frames.site_in(text.file, text.span, text.function, reader.module)
        return Finding(cause, site, op.name)

    def first_reader(self, op: Op) -> Op | None:
        """Return the operation that first takes what another one made."""
        made = set(op.outputs)
        return next(
            (o for o in self.trace.ops[op.index + 1 :] if not made.isdisjoint(o.inputs)), None
        )

    def only(self, look: Callable[[type], list[Statement]]) -> Site | None:
        """Return the one statement that is found in the text of the model's own classes."""
        found = {
            statement
            for cls in {type(module) for module in self.modules.values()}
            if not cls.__module__.startswith("torch.")
            for statement in look(cls)
        }
        if len(found) != 1:
            return None
        (statement,) = found
        return Site(statement.file, statement.line, source=statement.text)

    def switched_at(self, op: Op) -> Site | None:
        """Return where gradients were off for an operation: the call that switched them, or an inference mode."""
        switch = self.trace.switch_before(op)
        around = inference_around(op) if switch is None else None
        if around is not None:
            return Site(around.file, around.line, source=around.text)
        return _frames.site_of(switch)

    def whole_module_that_did_not_run(self, path: str) -> str:
        """Return the largest module around one that did not run, no part of which ran."""
        ran = self.trace.modules_run
        above = path.rpartition(".")[0]
        while above and not any(p == above or p.startswith(f"{above}.") for p in ran):
            path, above = above, above.rpartition(".")[0]
        return path

    def op(self, tag: int) -> Op | None:
        """Return the operation that an autograd node is tagged with."""
        return self.trace.ops[tag] if 0 <= tag < len(self.trace.ops) else None

    def at(self, cause: Cause, op: Op | None) -> Finding:
        """Return a cause with an operation for its place."""
        if op is None:
            return Finding(cause)
        if op.kind is Kind.LINK and op.place is None and (reader := self.first_reader(op)):
            # It ran out of sight, in TorchScript or a transform: its result was used first there.
            return Finding(cause, _frames.site_of(reader.place, reader.module))
        site = _frames.site_of(op.place, op.module)
        found = Finding(cause, site, op.name)
        switched = None if op.grad_mode else self.switched_at(op)
        if cause is Cause.NO_GRAD and switched and (switched.file, switched.line) != line_of(found):
            kept, helper = self._kept_meanwhile(op), self._helper_of(op)
            notes = [_words.switched_off(switched)]
            notes += [_words.switched_by(helper)] if helper else []
            asked = self._asked_to(op)
            notes += [_words.asked_to_switch(asked)] if asked else []
            notes += [_words.kept_meanwhile(kept)] if kept else []
            found = replace(found, notes=tuple(notes))
        return found

    def _asked_to(self, op: Op) -> Site | None:
        """Return the call that asked the function around an operation to switch gradients off."""
        switch = self.trace.switch_before(op)
        found = None if switch is None else switched_off_by(switch[:2])
        return None if found is None else Site(found.file, found.line, source=found.text)

    def _helper_of(self, op: Op) -> Site | None:
        """Return the line of a helper that makes the context by which gradients were switched off."""
        switch = self.trace.switch_before(op)
        found = None if switch is None else switch_in_helper(switch[:2], MODES)
        return None if found is None else Site(found.file, found.line, source=found.text)

    def _kept_meanwhile(self, op: Op) -> Site | None:
        """Return where a value made with gradients off is kept, for functions that run with gradients on to use it."""
        if op.index not in self._kept:
            reader = None if op.place is None else self._reader_with_gradients(op)
            used = None if reader is None else reader.place
            stores = calls_kept(op.place[:2], used[:2]) if op.place and used else []
            one = stores[0] if len(stores) == 1 else None
            site = None if one is None else Site(one.file, one.line, source=one.text)
            self._kept[op.index] = site
        return self._kept[op.index]

    def _reader_with_gradients(self, op: Op) -> Op | None:
        """Return the first operation with gradients on that takes what follows from one with gradients off."""
        behind = set(op.outputs)
        for later in self.trace.ops[op.index + 1 :]:
            if not behind.isdisjoint(later.inputs):
                if later.grad_mode:
                    return later
                behind.update(later.outputs)
        return None


def inference_around(op: Op) -> Statement | None:
    """Return the inference mode in whose block or function an operation ran, which no mode of ours sees."""
    found = (surrounding(step, "inference_mode") for step in op.stack)
    return next((statement for statement in found if statement is not None), None)


def line_of(finding: Finding) -> tuple[str, int] | None:
    """Return the file and the line of a finding."""
    return None if finding.site is None else (finding.site.file, finding.site.line)


def _cause(op: Op) -> Cause:
    if op.wrapper is not None:
        return _WRAPPED[op.wrapper]
    if op.kind in _BY_KIND:
        return _BY_KIND[op.kind]
    if op.kind is Kind.GRAD or not op.grad_mode:
        return Cause.NO_GRAD
    if op.kind is Kind.OPAQUE:
        return Cause.UNDETERMINED
    if op.kept and not op.into_integers:
        return Cause.DETACHED  # written into `.data`, or through another alias without history
    return Cause.NON_DIFFERENTIABLE
