"""Why each parameter has the status it has: trace, graph and statistics joined into diagnoses.

What this room knows that no other does: the order in which explanations are tried, and what each of
them must show before it is named. What the autograd graph says wins over what the trace makes likely;
where nothing can be shown the cause is ``undetermined``, with what was ruled out.

Limits: it speaks of the steps that were traced. Notes are facts about those.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradwatch import _frames, _words, explain
from gradwatch._calls import Kind, Wrapper
from gradwatch._flow import Cut, Flow, follow
from gradwatch._graph import Origin, Passed, walk, watched_backward
from gradwatch._marks import Marks, Use
from gradwatch._nearby import surrounding
from gradwatch._record import Backward, Op, Unregistered, hooks_of, label_of, unregistered
from gradwatch._source import Statement, wrapping
from gradwatch._statements import (
    assignments,
    clearings,
    copies,
    derived_attributes,
    keepings,
)
from gradwatch._stats import Sensor, is_lazy
from gradwatch._trace import BackwardListener, Trace
from gradwatch._unread import readings
from gradwatch.report import Cause, Diagnosis, Severity, Site, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_NO_OTHER_USE = "no other use"
"""Stands for a note whose words depend on how many parameters are grouped."""
_WRAPPED = {
    Wrapper.CUSTOM_FUNCTION: Cause.CUSTOM_FUNCTION,
    Wrapper.REENTRANT_CHECKPOINT: Cause.REENTRANT_CHECKPOINT,
    Wrapper.SAMPLE: Cause.NON_DIFFERENTIABLE,
    Wrapper.DEEPCOPY: Cause.REPLACED,
    Wrapper.DEEPCOPY_TENSOR: Cause.DETACHED,
    Wrapper.LOAD: Cause.REPLACED,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found for one parameter, before parameters are grouped."""

    cause: Cause
    site: Site | None = None
    operation: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a term of the loss reaches."""

    parameters: tuple[str, ...]
    """Those that its gradient leads to."""
    in_loss: bool
    """Whether a loss was computed from it."""
    cut: Finding | None = None
    """Where it was cut off, when it reaches none."""


class Inspection(BackwardListener):
    """One traced step: record it, then say why parameters got no gradient.

    Args:
        parameters: The parameters by name.
        modules: The model's modules by path.
        sizes: Whether to measure what each autograd node hands on, to find the origin of zeros and
            NaN.
        on_step: Called with the names of the parameters that an optimizer is about to write.

    Cost:
        About the time of three small operations for each one, and as much again with ``sizes``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        *,
        sizes: bool,
        on_step: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.trace = Trace(parameters, modules, self)
        self.passes: list[Passed] = []
        self._modules = dict(modules)
        self.sizes = sizes
        self.sensor = Sensor(self.parameters, each=True)
        self._on_step = on_step
        self.on_error: Callable[[Exception], None] | None = None
        """Called at once with an error of a backward pass, where nobody would tell of it later."""
        self._followed: dict[tuple[int, ...], dict[str, list[Cut]]] = {}
        """What was followed from some of the losses alone, while parameters are explained."""
        self.unseen: frozenset[str] = frozenset()
        """Names of those whose gradients an optimizer takes away before backward ends."""

    def adopt(self, parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        """Ask about these parameters and modules too, from the next operation on."""
        self.parameters.update(parameters)
        self._modules.update(modules)
        self.trace.adopt(parameters, modules)
        self.sensor.extend(parameters)

    def start(self) -> None:
        """Begin to record."""
        self.trace.start()

    def leave(self) -> None:
        """Take everything away that sees the user's program, until ``start()`` is called again."""
        self.trace.leave()

    def stop(self) -> None:
        """Stop recording for good."""
        self.trace.stop()

    @property
    def cleared(self) -> frozenset[str]:
        """Names of those whose gradient arrived and was emptied again."""
        return self.sensor.arrived.intersection(self.trace.clearings)

    @property
    def by_hand(self) -> frozenset[str]:
        """Names of those that the user's program wrote itself after a backward pass, where no optimizer stepped."""
        if self.trace.spans or not self.trace.backwards:
            return frozenset()
        values, later = self.trace.values, self.trace.ops[self.trace.backwards[0].after :]
        written = (values[old].parameter for op in later for old in op.kept.values())
        return frozenset(name for name in written if name is not None)

    @property
    def received(self) -> frozenset[str]:
        """Names of those that hold a gradient of this step, from a backward pass or by hand."""
        return (self.sensor.arrived | self.trace.assigned) - self.trace.clearings.keys()

    def module_at(self, path: str | None) -> nn.Module | None:
        """Return the module at a path, if there is one."""
        return None if path is None else self._modules.get(path)

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each leaf that the losses' graphs lead to."""
        return set[int]().union(*(passed.reached for passed in self.passes))

    @contextmanager
    def around_backward(self, roots: list[Tensor]) -> Iterator[None]:
        """Watch one backward pass."""
        self.sensor.before()
        try:
            hooked = bool(self.trace.hooks)
            with watched_backward(roots, self.trace.tag, sizes=self.sizes, hooked=hooked) as passed:
                self.passes.append(passed)
                yield
        finally:
            try:
                self.sensor.after()
            except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
                self.trace.give_up(error)
            for name in self.sensor.latest:
                self.trace.clearings.pop(name, None)

    def before_step(self, written: frozenset[str]) -> None:
        """Hand on that an optimizer is about to write."""
        if self.trace.in_backward:
            self.unseen |= written  # the optimizer steps and empties `.grad` inside of backward
        elif self._on_step is not None:
            self._on_step(written)

    def after_failure(self, error: Exception) -> None:
        """Hand on that a backward pass has raised."""
        if self.on_error is not None:
            self.on_error(error)

    def diagnose(self, statuses: Mapping[str, Status], step: int) -> tuple[Diagnosis, ...]:
        """Return one diagnosis per cause and site, the one that costs most parameters first.

        Args:
            statuses: The status of each parameter asked about.
            step: Number of the step.
        """
        missing = [name for name, status in statuses.items() if status is Status.MISSING]
        findings = self._explain_missing(missing)
        for status in (Status.ZERO, Status.NONFINITE):
            for name, found in statuses.items():
                if found is status:
                    findings[name] = self._explain_origin(name, status)
        sizes = {name: self.parameters[name].numel() for name in findings}
        diagnoses = grouped(findings, statuses, step, sizes, tuple(self.parameters))
        return tuple(
            replace(d, help=_words.CALL_BACKWARD) if _words.NO_BACKWARD in d.notes else d
            for d in diagnoses
        )

    def reach(self, term: Tensor) -> Reach:
        """Return which parameters a term of the loss leads to, and where it was cut off if to none."""
        nodes, _ = walk([term], self.trace.tag)
        leaves = {node.leaf for node in nodes}
        reached = tuple(name for name, leaf in self.parameters.items() if id(leaf) in leaves)
        number = self.trace.number_of(term)
        roots = [root for backward in self.trace.backwards for root in backward.roots]
        in_loss = number in follow(self.trace, (), roots).reaching
        if reached:
            return Reach(reached, in_loss)
        flow = follow(self.trace, tuple(self.parameters), [number])
        cut = next((self._judge(cuts[0]) for cuts in flow.cuts.values() if cuts), None)
        return Reach((), in_loss, cut)

    def cuts_between(
        self, values: Iterable[int], roots: Sequence[int]
    ) -> Iterator[tuple[Finding, Op]]:
        """Yield where values were cut off from others, and the operation; the trace is of no other use afterwards.

        Args:
            values: Numbers of the values that should have led on.
            roots: Numbers of the values that they should have led to.
        """
        for number in values:
            name = f"value {number}"
            self.trace.values[number].parameter, self.trace.values[number].producer = name, None
            for cut in follow(self.trace, [name], roots).cuts.get(name, ())[:1]:
                yield self._judge(cut), cut.op

    # Missing --------------------------------------------------------------------------------------

    def _explain_missing(self, missing: list[str]) -> dict[str, Finding]:
        if not missing:
            return {}
        if not self.trace.backwards and self.trace.broken is None:
            notes = (_words.NO_BACKWARD,)
            return dict.fromkeys(missing, Finding(Cause.UNDETERMINED, notes=notes))
        flow = follow(self.trace, missing, self._starts())
        if self._link_exits(flow, missing):
            flow = follow(self.trace, missing, self._starts())
        self._followed.clear()
        arrived = self.sensor.arrived
        reached = self.reached
        return {
            name: self._cleared(name)
            if name in arrived
            else self._frozen_when_read(name)
            or self._connected(name, flow, reached)
            or self._cut(name, flow)
            or self._without_path(name, flow)
            for name in missing
        }

    def _starts(self) -> list[int]:
        """Return the values that the backward passes started from, those that fill ``.grad`` where there are any."""
        passes = [backward for backward in self.trace.backwards if backward.accumulates]
        return [root for backward in passes or self.trace.backwards for root in backward.roots]

    def _own_backwards(self, name: str) -> list[Backward]:
        """Return the backward passes between the step of another optimizer and that of its own, or those before."""
        begin, own = 0, list[Backward]()
        for written, end in (*self.trace.spans, (frozenset([name]), len(self.trace.backwards))):
            own = [p for p in self.trace.backwards[begin:end] if p.accumulates] or own
            if own and name in written:
                break
            begin = end
        return own

    def _cuts(self, name: str, flow: Flow) -> list[Cut]:
        """Return the cuts of a parameter: those from the loss that its optimizer lowers come first."""
        cuts = flow.cuts.get(name, [])
        own = self._own_backwards(name) if len(cuts) > 1 else []
        if not own:
            return cuts
        roots = tuple(root for backward in own for root in backward.roots)
        if roots not in self._followed:
            missing = tuple(flow.cuts)
            self._followed[roots] = follow(self.trace, missing, roots).cuts
        first = self._followed[roots].get(name, [])
        named = {cut.op.index for cut in first}
        return [*first, *(cut for cut in cuts if cut.op.index not in named)]

    def _link_exits(self, flow: Flow, missing: list[str]) -> bool:
        """Join operations to the values that came to them through Python, as the text shows."""
        lost = [name for name in missing if name not in flow.cuts and name not in flow.connected]
        # In a loop the same expression lets values out again and again: one of each is enough.
        exits: dict[object, Op] = {}
        for op in self.trace.ops:
            if op.kind is Kind.EXIT and flow.carries(op, lost):
                exits.setdefault((op.stack, flow.carried[op.index]), op)
        linked = self._link_roots(exits.values())
        for leaving in exits.values():
            marks = _marks(leaving)
            for op in self.trace.ops[leaving.index + 1 :]:
                if op.place is None or op.kind is Kind.EXIT or leaving.outputs[0] in op.inputs:
                    continue
                use = Use(op.place[:2], op.plain, op.arity, op.stack[1:])
                if not flow.reaching.isdisjoint(op.outputs) and marks.hold(use):
                    op.inputs = (*op.inputs, *leaving.outputs)
                    linked = True
        return linked

    def _link_roots(self, exits: Iterable[Op]) -> bool:
        """Join a loss to the exits that it came from, where it is nothing but a number, or was chosen by."""
        linked = False
        for backward in self.trace.backwards:
            if backward.place is None:
                continue
            step = backward.place[:2]
            of_numbers = [r for r in backward.roots if self.trace.values[r].producer is None]
            made = [e for e in exits if of_numbers and _marks(e).hold(Use(step))]
            for root in of_numbers if made else ():
                inputs = tuple(e.outputs[0] for e in made)
                self.trace.append_copy(inputs, root, backward.place)
            chose = tuple(e.outputs[0] for e in exits if e not in made and _marks(e).chose(step))
            if chose:
                backward.roots = tuple(
                    self.trace.append_choice((root, *chose), backward.place)
                    for root in backward.roots
                )
            linked = linked or bool(made or chose)
        return linked

    def _frozen_when_read(self, name: str) -> Finding | None:
        """Explain a parameter that required no grad whenever it was read, and does now."""
        if self.trace.read_flags.get(name, True):
            return None
        caller = _frames.site_of(self.trace.freezing_calls.get(name))
        notes = (_words.called_at(caller),) if caller else ()
        return Finding(Cause.FROZEN, _frames.site_of(self.trace.freezings.get(name)), notes=notes)

    def _cleared(self, name: str) -> Finding:
        place = self.trace.clearings.get(name)
        return Finding(Cause.CLEARED, _frames.site_of(place), None, ())

    def _connected(self, name: str, flow: Flow, reached: set[int]) -> Finding | None:
        """Explain a parameter to which the graph leads, or should lead."""
        leaf = id(self.parameters[name])
        if leaf not in reached and name not in flow.connected:
            return None
        asked = self._not_requested(name, reached=leaf in reached)
        if asked is not None:
            return asked
        for passed in self.passes:
            for node in passed.withholders(leaf):
                cause = Cause.CUSTOM_FUNCTION if node.custom else Cause.NON_DIFFERENTIABLE
                return self._at(cause, self._op(node.tag))
        if any(passed.delivered(leaf) for passed in self.passes):
            # Only a hook can have emptied it before the pass was over.
            return Finding(
                Cause.CLEARED, self._only(clearings), None, (_words.CLEARED_IN_BACKWARD,)
            )
        if leaf in reached:
            return Finding(Cause.UNDETERMINED, notes=(_words.IN_THE_GRAPH, _words.TAKEN))
        return self._cut(name, flow) or self._broken(name, flow)

    def _not_requested(self, name: str, *, reached: bool) -> Finding | None:
        leaf = id(self.parameters[name])
        if any(backward.accumulates for backward in self.trace.backwards):
            asked = [
                backward
                for backward in self.trace.backwards
                if backward.inputs is not None
                and leaf not in backward.inputs
                and reached
                and backward.accumulates
            ]
            site = self._that_leads_to(name, asked)
            return None if site is None else self._asked_others(site, "torch.Tensor.backward")
        # Of several calls the last one is the step's own; those before it made a part of its loss.
        site = self._that_leads_to(name, self.trace.backwards[::-1])
        notes = (_words.GRAD_FILLS_NOTHING,)
        return None if site is None else self._asked_others(site, "torch.autograd.grad", notes)

    def _that_leads_to(self, name: str, backwards: Sequence[Backward]) -> Backward | None:
        """Return the backward pass from which a parameter can be reached, of several."""
        for backward in backwards if len(backwards) > 1 else ():
            if name in follow(self.trace, [name], backward.roots).connected:
                return backward
        return backwards[0] if backwards else None

    @staticmethod
    def _asked_others(backward: Backward, call: str, notes: tuple[str, ...] = ()) -> Finding:
        return Finding(Cause.NOT_REQUESTED, _frames.site_of(backward.place), call, notes)

    def _broken(self, name: str, flow: Flow) -> Finding:
        """Name the operation at which the autograd graph ends though its inputs were tracked.

        Where it made something else too, which was not used, the gradient would have come from there.
        """
        tags = set[int]().union(*(passed.tags for passed in self.passes))
        behind: set[int] = set()
        last: Op | None = None
        for op in self.trace.ops:
            reads = any(
                number in behind or self.trace.values[number].parameter == name
                for number in op.inputs
            )
            if not reads:
                continue
            if op.index in tags:
                last = op
                break
            behind.update(op.outputs)
        if last is None:
            notes = (_words.NOT_IN_THE_GRAPH, _words.RULED_OUT)
            return Finding(Cause.UNDETERMINED, notes=notes)
        if last.kind is Kind.GRAD and any(self.trace.values[n].tracked for n in last.outputs):
            return replace(self._at(Cause.NOT_IN_LOSS, last), notes=(_words.DROPS_OUT,))
        others = [number for number in last.outputs if number not in flow.reaching]
        dropped = len(last.outputs) > 1 and any(self.trace.values[n].tracked for n in others)
        return self._at(Cause.NOT_IN_LOSS if dropped else Cause.NON_DIFFERENTIABLE, last)

    def _cut(self, name: str, flow: Flow) -> Finding | None:
        cuts = self._cuts(name, flow)
        if not cuts:
            return None
        first = self._judge(cuts[0])
        others = []
        for cut in cuts[1:]:
            other = self._judge(cut)
            if _line(other) != _line(first) and other not in others:
                others.append(other)
        notes = tuple(_words.another_path(other.cause, other.site) for other in others[:3])
        notes = notes or (_NO_OTHER_USE,)
        return Finding(first.cause, first.site, first.operation, (*first.notes, *notes))

    def _judge(self, cut: Cut) -> Finding:
        op = cut.op
        cause = _cause(op)
        if cause is Cause.UNDETERMINED:
            notes = (_words.inside_script(_frames.site_of(op.place)), _words.RULED_OUT)
            return Finding(cause, notes=notes)
        leaves = cut.left_through
        if leaves is not None and (
            cause in {Cause.DETACHED, Cause.NO_GRAD} or leaves.name == "torch.Tensor.__bool__"
        ):
            return self._at(Cause.LEFT_TORCH, leaves)
        if op.kind is Kind.REWRAP and op.place is None:
            return self._wrapped(cause, op)
        reader = self._first_reader(op) if op.kind is Kind.SEVER else None
        if reader is not None and reader.wrapper is Wrapper.LOAD:
            return self._at(Cause.REPLACED, reader)  # `state_dict()` detaches what it hands out
        return self._at(cause, op)

    def _wrapped(self, cause: Cause, op: Op) -> Finding:
        """Return where a value was wrapped as a new leaf, else where the leaf was first used."""
        reader = self._first_reader(op) or op
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

    def _first_reader(self, op: Op) -> Op | None:
        made = set(op.outputs)
        return next(
            (o for o in self.trace.ops[op.index + 1 :] if not made.isdisjoint(o.inputs)), None
        )

    def _without_path(self, name: str, flow: Flow) -> Finding:
        reads = [op for op in flow.reads.get(name, ()) if self._is_use(op, name)]
        broke = self.trace.broken is not None
        hidden = _words.TRACE_BROKE if broke else self._in_transforms(flow)
        if hidden is None and reads and name in flow.dropped:
            return self._at(Cause.NOT_IN_LOSS, flow.dropped[name])
        cut = (
            self._cut_before_transforms(name, flow) if hidden == _words.INSIDE_TRANSFORMS else None
        )
        if cut is not None:
            return self._at(Cause.DETACHED, cut)
        hidden = hidden or self._hidden(name)
        if hidden is not None:
            return Finding(Cause.UNDETERMINED, notes=(hidden, _words.RULED_OUT))
        for look in (self._made_before, self._replaced):
            finding = look(name, flow)
            if finding is not None:
                return finding
        return Finding(Cause.UNUSED, notes=self._why_unused(name, flow))

    def _is_use(self, op: Op, name: str) -> bool:
        """Tell whether an operation computes with a parameter, and does not just copy or write it."""
        if op.kind in {Kind.SEVER, Kind.EXIT, Kind.SET_DATA}:
            return False
        if op.wrapper in {Wrapper.DEEPCOPY, Wrapper.DEEPCOPY_TENSOR}:
            return False
        written = any(self.trace.values[old].parameter == name for old in op.kept.values())
        return not written and (op.grad_mode or op.wrapper is not None)

    def _why_unused(self, name: str, flow: Flow) -> tuple[str, ...]:
        path = name.rpartition(".")[0]
        if reads := flow.reads.get(name):
            numbers = all(op.kind is Kind.EXIT for op in reads)
            return (_words.ONLY_AS_A_NUMBER if numbers else _words.ONLY_WITHOUT_GRADIENT,)
        holds_only = isinstance(self._modules.get(path), (nn.ParameterDict, nn.ParameterList))
        if path and path in self._modules and path not in self.trace.modules_run and not holds_only:
            whole = self._whole_module_that_did_not_run(path)
            return (_words.did_not_run(whole), *self._read_in_text(whole))
        unread = path if holds_only else name
        ran = path.rpartition(".")[0] if holds_only else path
        return (_words.ran_without_it(ran), *self._read_in_text(unread))

    def _read_in_text(self, path: str) -> tuple[str, ...]:
        """Return what the text tells of the reading of a parameter or a module, if it explains anything."""
        owner, _, name = path.rpartition(".")
        module = self._modules.get(owner)
        found = None if module is None else readings(type(module), name)
        if module is None or found is None:
            return ()
        parts = [(r.method, Site(r.file, r.line), r.conditions) for r in found]
        made = [Site(s.file, s.line, source=s.text) for s in keepings(type(module), name)]
        made_at = made[-1] if made else None
        return (_words.read_in_text(type(module).__name__, name, parts, made_at),)

    def _whole_module_that_did_not_run(self, path: str) -> str:
        """Return the largest module around one that did not run, no part of which ran."""
        ran = self.trace.modules_run
        above = path.rpartition(".")[0]
        while above and not any(p == above or p.startswith(f"{above}.") for p in ran):
            path, above = above, above.rpartition(".")[0]
        return path

    def _hidden(self, name: str) -> str | None:
        """Return why a parameter may have been read where nothing could be seen."""
        path = name.rpartition(".")[0]
        if path in self.trace.elsewhere:
            return _words.on_another_thread(path)
        return None

    def _in_transforms(self, flow: Flow) -> str | None:
        """Return what may have carried a value to the loss out of sight, where there is such a thing."""
        for number, place in self.trace.scripted.items():
            if number in flow.reaching:
                return _words.inside_script(_frames.site_of(place))
        return _words.INSIDE_TRANSFORMS if self.trace.opaque else None

    def _cut_before_transforms(self, name: str, flow: Flow) -> Op | None:
        """Return what detached a parameter before it went where nothing is seen, if nothing else read it."""
        reads = flow.reads.get(name, [])
        if not reads or any(op.kind is not Kind.SEVER for op in reads):
            return None
        readers = [reader for op in reads if (reader := self._first_reader(op)) is not None]
        values = self.trace.values
        # What is detached for a log is read by something that is seen.
        if all(any(values[n].wrapped for n in reader.outputs) for reader in readers):
            return reads[-1]
        return None

    def _made_before(self, name: str, flow: Flow) -> Finding | None:
        """Look for an attribute that was computed from the parameter before the pass began."""
        path, _, short = name.rpartition(".")
        parts = path.split(".") if path else []
        # The module of the parameter, then those around it, whose text reads `self.child.weight`.
        for depth in range(len(parts), -1, -1):
            owner, child = ".".join(parts[:depth]), next(iter(parts[depth:]), None)
            module = self._modules.get(owner)
            if module is None or type(module).__module__.startswith("torch."):
                continue
            derived = derived_attributes(type(module), short, child)
            for number, value in enumerate(self.trace.values):
                if value.attribute is None or number not in flow.reaching:
                    continue
                if value.attribute[0] == owner and value.attribute[1] in derived:
                    statement, functions = derived[value.attribute[1]]
                    site = Site(statement.file, statement.line, module=owner, source=statement.text)
                    return Finding(_cause_in(functions), site, None, (_words.COMPUTED_EARLIER,))
        return None

    def _replaced(self, name: str, flow: Flow) -> Finding | None:
        """Look for a leaf that the loss was computed with in this parameter's place."""
        found = self._taken_out(name)
        if found is not None:
            return found
        label = label_of(self.parameters[name])
        for number, value in enumerate(self.trace.values):
            if value.label != label or number not in flow.reaching:
                continue
            users = [op for op in self.trace.ops if number in op.inputs]
            if users and self._stands_in(number, users, self.parameters[name]):
                is_copy = value.producer is None and self._equals(number, self.parameters[name])
                copied = self._only(copies) if is_copy else None
                if copied is not None:
                    return Finding(Cause.REPLACED, copied, _DEEPCOPY)
                return self._at(Cause.REPLACED, users[0])
        copied = self._copied(name)
        return None if copied is None else Finding(Cause.REPLACED, copied, _DEEPCOPY)

    def _copied(self, name: str) -> Site | None:
        """Return where a module that did not run was copied to one that did: it still has the same weights."""
        path = self._whole_module_that_did_not_run(name.rpartition(".")[0])
        module = self._modules.get(path)
        if module is None or path in self.trace.modules_run:
            return None
        mine = dict(module.named_parameters())
        for other, twin in self._modules.items():
            if other not in self.trace.modules_run or type(twin) is not type(module):
                continue
            theirs = dict(twin.named_parameters())
            if (
                mine.keys() == theirs.keys()
                and all(map(_are_equal, mine.values(), theirs.values()))
                and any(p.numel() and bool((p != p.flatten()[0]).any()) for p in mine.values())
            ):
                into = set(other.split("."))
                return self._only(lambda cls: [s for s in copies(cls) if s.attribute in into])  # noqa: B023
        return None

    def _taken_out(self, name: str) -> Finding | None:
        """Look for another tensor that the model now holds under the parameter's name."""
        held: Any = self._modules.get("")
        for part in name.split("."):
            held = None if held is None else _attributes(held).get(part)
        if not isinstance(held, Tensor) or held is self.parameters[name]:
            return None
        place = self.trace.registrations.get(id(held))
        if place is not None:
            return Finding(Cause.REPLACED, _frames.site_of(place), "torch.nn.Parameter")
        above = [name, *(name[:at] for at in range(len(name) - 1, 0, -1) if name[at] == ".")]
        put = next((self.trace.put_in[path] for path in above if path in self.trace.put_in), None)
        if put is not None:
            return Finding(Cause.REPLACED, _frames.site_of(put))
        short = name.rpartition(".")[2]
        return Finding(Cause.REPLACED, self._only(lambda cls: assignments(cls, short)))

    def _stands_in(self, number: int, users: list[Op], parameter: Tensor) -> bool:
        """Tell whether a leaf of the same shape is a stand-in, and not just another model's."""
        if users[0].name.endswith("_"):
            return True  # filled in this very pass: its module was made anew
        if self.trace.values[number].producer is not None:
            return not self._comes_from_parameters(number)
        if users[0].module is not None:
            return True  # used by a module of this model
        return self._equals(number, parameter)

    def _equals(self, number: int, parameter: Tensor) -> bool:
        """Tell whether a leaf of another's holds the same numbers as a parameter."""
        ref = self.trace.values[number].alien
        alien = None if ref is None else ref()
        return alien is not None and bool(torch.equal(alien, parameter))

    def _comes_from_parameters(self, number: int) -> bool:
        """Tell whether a value was computed from parameters of the model."""
        seen, todo = set(), [number]
        while todo:
            number = todo.pop()
            value = self.trace.values[number]
            if value.parameter is not None:
                return True
            if number not in seen and value.producer is not None:
                seen.add(number)
                todo.extend(self.trace.ops[value.producer].inputs)
        return False

    # Zero and not finite --------------------------------------------------------------------------

    def _explain_origin(self, name: str, status: Status) -> Finding:
        zero = status is Status.ZERO
        cause = Cause.ZERO_GRADIENT if zero else Cause.NONFINITE_GRADIENT
        for passed in reversed(self.passes):
            origin = passed.origin(id(self.parameters[name]), zero=zero)
            if origin is not None:
                return self._of_origin(cause, origin)
        written = self.trace.gradient_writes.get(name)
        if written is not None:
            return self._at(cause, written)
        hooks = hooks_of(self.parameters[name])
        if hooks and any(passed.delivered(id(self.parameters[name])) for passed in self.passes):
            site = _frames.site_of_function(hooks[-1])
            return Finding(cause, site, "torch.Tensor.register_hook")
        for op in self.trace.ops:
            # What a reentrant checkpoint computes in backward has a graph that is never seen.
            if op.around is not None and any(
                self.trace.values[number].parameter == name for number in op.inputs
            ):
                site = _frames.site_of(op.around)
                return Finding(cause, site, Wrapper.REENTRANT_CHECKPOINT.public_name)
        return Finding(cause)

    def _of_origin(self, cause: Cause, origin: Origin) -> Finding:
        op = self._op(origin.tag)
        places = [self.trace.hooks.get(number) for number in (() if op is None else op.outputs)]
        hooks = [place for place in places if place is not None]
        if origin.hooked and hooks:
            return Finding(cause, _frames.site_of(hooks[-1]), "torch.Tensor.register_hook")
        found = self._at(cause, op)
        return replace(found, notes=(_words.CANCELLING,)) if origin.cancelled else found

    def _only(self, look: Callable[[type], list[Statement]]) -> Site | None:
        """Return the one statement that is found in the text of the model's own classes."""
        found = {
            statement
            for cls in {type(module) for module in self._modules.values()}
            if not cls.__module__.startswith("torch.")
            for statement in look(cls)
        }
        if len(found) != 1:
            return None
        (statement,) = found
        return Site(statement.file, statement.line, source=statement.text)

    # Small things ---------------------------------------------------------------------------------

    def _switched_at(self, op: Op) -> Site | None:
        """Return where gradients were off for an operation: the call that switched them, or an inference mode."""
        switch = self.trace.switch_before(op)
        around = self.inference_around(op) if switch is None else None
        if around is not None:
            return Site(around.file, around.line, source=around.text)
        return _frames.site_of(switch)

    @staticmethod
    def inference_around(op: Op) -> Statement | None:
        """Return the inference mode in whose block or function an operation ran, which no mode of ours sees."""
        found = (surrounding(step, "inference_mode") for step in op.stack)
        return next((statement for statement in found if statement is not None), None)

    def _op(self, tag: int) -> Op | None:
        return self.trace.ops[tag] if 0 <= tag < len(self.trace.ops) else None

    def _at(self, cause: Cause, op: Op | None) -> Finding:
        if op is None:
            return Finding(cause)
        if op.kind is Kind.LINK and op.place is None and (reader := self._first_reader(op)):
            # It ran out of sight, in TorchScript or a transform: its result was used first there.
            return Finding(cause, _frames.site_of(reader.place, reader.module))
        site = _frames.site_of(op.place, op.module)
        found = Finding(cause, site, op.name)
        switched = None if op.grad_mode else self._switched_at(op)
        if cause is Cause.NO_GRAD and switched and (switched.file, switched.line) != _line(found):
            found = replace(found, notes=(_words.switched_off(switched),))
        return found


_DEEPCOPY = Wrapper.DEEPCOPY.public_name


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if is_lazy(one) or is_lazy(other) or one.device != other.device:
        return False
    return label_of(one) == label_of(other) and torch.equal(one, other)


def _marks(leaving: Op) -> Marks:
    return Marks(leaving.stack, leaving.name.rpartition(".")[2])


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


_BY_KIND = {
    Kind.SEVER: Cause.DETACHED,
    Kind.REWRAP: Cause.DETACHED,
    Kind.SET_DATA: Cause.DETACHED,
    Kind.EXIT: Cause.LEFT_TORCH,
    Kind.COPY_VALUES: Cause.LEFT_TORCH,
}


def _line(finding: Finding) -> tuple[str, int] | None:
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


def not_in_optimizer(
    names: Iterable[str],
    statuses: Mapping[str, Status],
    step: int,
    *,
    strangers: int = 0,
    maker: Any = None,
) -> tuple[Diagnosis, ...]:
    """Return the diagnosis of parameters that no optimizer steps, if there are any.

    Args:
        names: Those parameters.
        statuses: The status of each.
        step: Number of the step.
        strangers: Tensors like these that the optimizers hold, and that the model does not have.
        maker: The function of the user's that makes the optimizers, where it is known.
    """
    notes = []
    if strangers:
        notes.append(_words.strangers(strangers))
    code = getattr(maker, "__code__", None)
    if code is not None and _frames.owner(code) is _frames.Owner.USER:
        site = Site(code.co_filename, code.co_firstlineno)
        notes.append(_words.made_in(code.co_name, site))
    findings = {name: Finding(Cause.NOT_IN_OPTIMIZER, notes=tuple(notes)) for name in names}
    return grouped(findings, statuses, step, {}, tuple(statuses))


def not_registered(
    model: nn.Module, chosen: Callable[[Tensor], bool], step: int
) -> tuple[Diagnosis, ...]:
    """Return a diagnosis for each attribute that keeps parameters out of the sight of ``parameters()``.

    Args:
        model: The model.
        chosen: Whether a parameter is meant, of those that the model does not register.
        step: Number of the step.
    """
    held: dict[tuple[type, str], list[Unregistered]] = {}
    for found in unregistered(model):
        if chosen(found.parameter):
            held.setdefault((found.holder, found.attribute), []).append(found)
    return tuple(
        Diagnosis(
            severity=Severity.WARNING,
            cause=Cause.NOT_IN_OPTIMIZER,
            status=Status.OK,
            parameters=tuple(found.path for found in several),
            notes=(not_looked_into(several[0]),),
            help=_words.register(several[0].kind.__name__),
            step=step,
        )
        for several in held.values()
    )


def not_looked_into(found: Unregistered) -> str:
    """Say which attribute hides a parameter from ``parameters()``, and where it is set."""
    kept = keepings(found.holder, found.attribute)
    site = Site(kept[0].file, kept[0].line, source=kept[0].text) if kept else None
    return _words.not_registered(f"{found.holder.__name__}.{found.attribute}", site)


def undetermined(statuses: Mapping[str, Status], step: int) -> tuple[Diagnosis, ...]:
    """Return the diagnosis of parameters in a step that was not traced.

    Args:
        statuses: The parameters and their statuses.
        step: Number of the step.
    """
    named = {Status.ZERO: Cause.ZERO_GRADIENT, Status.NONFINITE: Cause.NONFINITE_GRADIENT}
    findings = {
        name: Finding(named.get(status, Cause.UNDETERMINED), notes=(_words.NOT_TRACED,))
        for name, status in statuses.items()
    }
    return grouped(findings, statuses, step, {}, tuple(statuses))


def _grouped_at(found: Finding) -> tuple[object, ...] | None:
    """Return the place that parameters have to share: of a library that runs without gradients, the user's call."""
    site = found.site
    if site is not None and site.caller is not None and found.cause is Cause.NO_GRAD:
        site = site.caller
    return None if site is None else (site.file, site.line, site.column, site.end_column)


def grouped(
    findings: Mapping[str, Finding],
    statuses: Mapping[str, Status],
    step: int,
    sizes: Mapping[str, int],
    all_names: tuple[str, ...] = (),
) -> tuple[Diagnosis, ...]:
    """Join what was found into one diagnosis per cause and site.

    Args:
        findings: What was found, by parameter.
        statuses: The status of each parameter.
        step: Number of the step.
        sizes: Elements of each parameter: the diagnosis that costs most comes first.
        all_names: All parameter names of the model.
    """
    groups: dict[object, list[str]] = {}
    for name, found in findings.items():
        groups.setdefault((found.cause, _grouped_at(found)), []).append(name)
    made = []
    for names in groups.values():
        found = findings[names[0]]
        notes = tuple(
            _words.no_other_use(len(names)) if note == _NO_OTHER_USE else note
            for note in dict.fromkeys(note for name in names for note in findings[name].notes)
        )
        made.append(
            Diagnosis(
                severity=Severity.NOTE if found.cause is Cause.ZERO_GRADIENT else Severity.WARNING,
                cause=found.cause,
                status=statuses[names[0]],
                parameters=tuple(names),
                site=found.site,
                operation=found.operation,
                notes=notes[:4],
                help=_words.COMPUTE_ANEW
                if _words.COMPUTED_EARLIER in found.notes
                else explain.help_for(found.cause, found.operation, names, found.site, all_names),
                step=step,
            )
        )
    cost = {id(d): sum(sizes.get(name, 0) for name in d.parameters) for d in made}
    made.sort(key=lambda d: (d.severity is Severity.NOTE, -cost[id(d)], d.parameters))
    return tuple(made)
