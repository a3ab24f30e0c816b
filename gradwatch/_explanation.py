"""Why a parameter got no gradient, or one of zeros or NaN: the explanations in the order they are tried.

What this room knows that no other does: what each explanation must show before it is named. What the autograd
graph says wins over what the trace makes likely; where nothing can be shown the cause is ``undetermined``, with
what was ruled out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from gradwatch import _frames, _words
from gradwatch._calls import Kind, Wrapper
from gradwatch._evidence import Evidence, line_of
from gradwatch._flow import Cut, Flow, follow
from gradwatch._grouping import NO_OTHER_USE, Finding
from gradwatch._marks import Marks, Use
from gradwatch._record import Backward, Op, hooks_of
from gradwatch._replaced import StandIns
from gradwatch._statements import clearings, keepings
from gradwatch._unread import readings
from gradwatch.report import Cause, Site, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch._graph import Origin


class Explanation(Evidence):
    """What is found for each parameter of a traced step."""

    _followed: dict[tuple[int, ...], dict[str, list[Cut]]]
    """What was followed from some of the losses alone, while parameters are explained."""

    def missing(self, missing: list[str]) -> dict[str, Finding]:
        """Return why each of these parameters got no gradient."""
        if not missing:
            return {}
        if not self.trace.backwards and self.trace.broken is None:
            notes = (_words.NO_BACKWARD,)
            return dict.fromkeys(missing, Finding(Cause.UNDETERMINED, notes=notes))
        flow = follow(self.trace, missing, self._starts())
        if self._link_exits(flow, missing):
            flow = follow(self.trace, missing, self._starts())
        self._followed = {}
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
                return self.at(cause, self.op(node.tag))
        if any(passed.delivered(leaf) for passed in self.passes):
            # Only a hook can have emptied it before the pass was over.
            return Finding(Cause.CLEARED, self.only(clearings), None, (_words.CLEARED_IN_BACKWARD,))
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
            return replace(self.at(Cause.NOT_IN_LOSS, last), notes=(_words.DROPS_OUT,))
        others = [number for number in last.outputs if number not in flow.reaching]
        dropped = len(last.outputs) > 1 and any(self.trace.values[n].tracked for n in others)
        return self.at(Cause.NOT_IN_LOSS if dropped else Cause.NON_DIFFERENTIABLE, last)

    def _cut(self, name: str, flow: Flow) -> Finding | None:
        cuts = self._cuts(name, flow)
        if not cuts:
            return None
        first = self.judge(cuts[0])
        others = []
        for cut in cuts[1:]:
            other = self.judge(cut)
            if line_of(other) != line_of(first) and other not in others:
                others.append(other)
        notes = tuple(_words.another_path(other.cause, other.site) for other in others[:3])
        notes = notes or (NO_OTHER_USE,)
        return Finding(first.cause, first.site, first.operation, (*first.notes, *notes))

    def _without_path(self, name: str, flow: Flow) -> Finding:
        reads = [op for op in flow.reads.get(name, ()) if self._is_use(op, name)]
        broke = self.trace.broken is not None
        hidden = _words.TRACE_BROKE if broke else self._in_transforms(flow)
        if hidden is None and reads and name in flow.dropped:
            return self.at(Cause.NOT_IN_LOSS, flow.dropped[name])
        cut = (
            self._cut_before_transforms(name, flow) if hidden == _words.INSIDE_TRANSFORMS else None
        )
        if cut is not None:
            return self.at(Cause.DETACHED, cut)
        hidden = hidden or self._hidden(name)
        if hidden is not None:
            return Finding(Cause.UNDETERMINED, notes=(hidden, _words.RULED_OUT))
        stand_ins = StandIns(self, flow)
        for look in (stand_ins.made_before, stand_ins.replaced):
            finding = look(name)
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
        holds_only = isinstance(self.modules.get(path), (nn.ParameterDict, nn.ParameterList))
        if path and path in self.modules and path not in self.trace.modules_run and not holds_only:
            whole = self.whole_module_that_did_not_run(path)
            return (_words.did_not_run(whole), *self._read_in_text(whole))
        unread = path if holds_only else name
        ran = path.rpartition(".")[0] if holds_only else path
        return (_words.ran_without_it(ran), *self._read_in_text(unread))

    def _read_in_text(self, path: str) -> tuple[str, ...]:
        """Return what the text tells of the reading of a parameter or a module, if it explains anything."""
        owner, _, name = path.rpartition(".")
        module = self.modules.get(owner)
        found = None if module is None else readings(type(module), name)
        if module is None or found is None:
            return ()
        parts = [(r.method, Site(r.file, r.line), r.conditions) for r in found]
        made = [Site(s.file, s.line, source=s.text) for s in keepings(type(module), name)]
        made_at = made[-1] if made else None
        return (_words.read_in_text(type(module).__name__, name, parts, made_at),)

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
        readers = [reader for op in reads if (reader := self.first_reader(op)) is not None]
        values = self.trace.values
        # What is detached for a log is read by something that is seen.
        if all(any(values[n].wrapped for n in reader.outputs) for reader in readers):
            return reads[-1]
        return None

    # Zero and not finite --------------------------------------------------------------------------

    def origin(self, name: str, status: Status) -> Finding:
        """Return where the gradient of a parameter first became zero, or not finite."""
        zero = status is Status.ZERO
        cause = Cause.ZERO_GRADIENT if zero else Cause.NONFINITE_GRADIENT
        for passed in reversed(self.passes):
            origin = passed.origin(id(self.parameters[name]), zero=zero)
            if origin is not None:
                return self._of_origin(cause, origin)
        written = self.trace.gradient_writes.get(name)
        if written is not None:
            return self.at(cause, written)
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
        op = self.op(origin.tag)
        places = [self.trace.hooks.get(number) for number in (() if op is None else op.outputs)]
        hooks = [place for place in places if place is not None]
        if origin.hooked and hooks:
            return Finding(cause, _frames.site_of(hooks[-1]), "torch.Tensor.register_hook")
        found = self.at(cause, op)
        return replace(found, notes=(_words.CANCELLING,)) if origin.cancelled else found


def _marks(leaving: Op) -> Marks:
    return Marks(leaving.stack, leaving.name.rpartition(".")[2])
