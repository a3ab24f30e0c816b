"""Where every value of one forward pass came from: the operations, their order, and their places.

What this room knows that no other does: which operation of the user's program read which value, in
which gradient mode, and at which instruction of which frame, also where autograd sees nothing (under
``no_grad``, behind ``.detach()``, through ``argmax``). It follows values, not gradients: an edge stands
for "was computed from". Whether a gradient would flow along it is noted beside it.

How: a ``TorchFunctionMode`` sees each call that Python makes. It stores numbers only; tensors are held
weakly, so that nothing lives longer than it would without a trace. Each operation's ``grad_fn`` carries
the operation's number in its ``metadata``, which dies with the node: that leads from the autograd graph
back to the source.

What number a tensor's content has, and from which others an unseen one was made, is the knowledge of ``_numbering``.

Limits: operations that C++ makes on its own are seen through their ``grad_fn`` alone; code on other
threads is not seen; a value that passes through a Python number is followed by ``_source``, not here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode

from gradwatch import _calls, _frames
from gradwatch._calls import (
    ONE_BY_ONE,
    Kind,
    Traits,
    dynamo_is_loaded,
    find_wrapper,
    traits_of,
)
from gradwatch._numbering import Entry, Numbering
from gradwatch._record import (
    IN_BRIEF,
    MADE,
    Backward,
    Failed,
    Op,
    Value,
    Write,
    is_telling,
    node_of,
    plain_numbers_in,
    read_by,
    shape_of,
    tensors_in,
    version_of,
)
from gradwatch._warned import shown_without_the_trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gradwatch._frames import Place

_eager = 0
_stance = ExitStack()
_log = logging.getLogger("gradwatch")
_is_grad_enabled, _places = torch.is_grad_enabled, _frames.PLACES
_entered: weakref.WeakSet[_Mode] = weakref.WeakSet()
"""The modes that record in this process."""
_TAKEN_OUT = frozenset(
    [
        "__iter__",
        "__getitem__",
        "unbind",
        "select",
        "squeeze",
        "unsqueeze",
        "view",
        "chunk",
        "split",
    ]
)
_NO_KEYWORDS: dict[str, Any] = {}
_UNTRACKED = Value()
"""Stands for the result of any operation that is not tracked."""
_IGNORED = Traits(Kind.IGNORED)


@dataclass(slots=True)
class _Closed:
    """A module that runs as one operation."""

    read: list[Tensor]
    without_mode: bool


class _Call:
    """A call between its beginning and its end."""

    targets: frozenset[tuple[tuple[int, ...], str | None]] = frozenset()
    plain: frozenset[int | str] | None = None

    def __init__(
        self,
        func: Any,
        traits: Traits,
        args: tuple[Any, ...],
        read: list[Tensor],
    ) -> None:
        self.func, self.traits, self.args, self.read = func, traits, args, read
        self.numbers: list[int] = []


class BackwardListener:
    """Whoever wants to be told of each backward pass that fills ``.grad``."""

    def around_backward(self, roots: list[Tensor]) -> AbstractContextManager[None]:
        """Surround a backward pass that starts from ``roots``."""
        del roots
        return nullcontext()

    def before_step(self, written: frozenset[str]) -> None:
        """Hear that an optimizer is about to write these parameters."""

    def after_failure(self, error: Exception) -> None:
        """Hear that a backward pass has raised."""


class Trace(Numbering):
    """Record the operations of everything that runs between ``start()`` and ``stop()``.

    Nothing it does can end the user's program: when its own bookkeeping fails it stops recording, and
    says why in ``broken``.

    Args:
        parameters: The tensors whose gradients are asked about, by name.
        modules: The model's modules by path, for the names of the places.
        listener: Told of each backward pass.

    Cost:
        About the time of two or three small operations for each one. No kernel, no synchronization, no random
        number.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        listener: BackwardListener | None = None,
    ) -> None:
        super().__init__()
        self.recording = True
        self.broken: Exception | None = None
        self._listener = listener or BackwardListener()
        self._floats: dict[float, int] = {}
        """The values of which equal numbers left torch, for numbers that are hardly equal by chance."""
        self._left: dict[int, tuple[float, int]] = {}
        """Numbers that left torch, by their ``id``, with their values: where one comes back, it is the same."""
        self._exited = False
        self._gradients: dict[int, str] = {}
        self._outermost: tuple[int, Place | None] = 0, None
        """Operations before the call of the module around all others, and where it was called."""
        self._grad_off_depth: int | None = None
        self._was_recording = True
        self._thread = threading.get_ident()
        self._closures = 0
        self._mode = _Mode(self)
        self._inside = ExitStack()
        self.adopt(parameters, modules)

    # Life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to record; the mode is the innermost one from here on."""
        self.batches.append(len(self.ops))
        _entered.add(self._mode)
        self._inside.callback(_entered.discard, self._mode)
        self._inside.enter_context(_eager_regions())
        self._inside.enter_context(shown_without_the_trace())
        self._inside.enter_context(self._mode)
        leave = self._inside.callback  # one by one: Ctrl-C may come between
        leave(register_module_forward_pre_hook(self._enter_module).remove)
        leave(register_module_forward_hook(self._leave_module, always_call=True).remove)
        leave(register_module_parameter_registration_hook(self._note_registration).remove)
        leave(register_module_module_registration_hook(self._note_module).remove)
        leave(register_optimizer_step_pre_hook(self._before_step).remove)
        leave(register_optimizer_step_post_hook(self._after_step).remove)

    def leave(self) -> None:
        """Take the mode and the hooks away until ``start()`` is called again."""
        self._inside.close()
        self._running.clear()

    def stop(self) -> None:
        """Stop for good, and let go of every tensor; what was recorded can still be read."""
        self.leave()
        self.recording = False
        self._leave_places()
        self._known.clear()
        self._storages.clear()
        self._parameters.clear()
        self._listener = BackwardListener()

    def _leave_places(self) -> None:
        """Leave the place on the nodes of what outlives the pass, for an error in a later one."""
        for entry in self._known.values():
            tensor = entry()
            node = None if tensor is None or entry.open is not None else node_of(tensor)
            if node is not None:
                place = self._origin_of(entry.value)
                if place is not None:
                    node.metadata[MADE] = place

    def _origin_of(self, number: int) -> Place | None:
        """Return where a value was computed: that it was taken out of another one tells nothing."""
        place: Place | None = None
        producer = self.values[number].producer
        while producer is not None:
            op = self.ops[producer]
            place = op.place or place
            if len(op.inputs) != 1 or op.name.rpartition(".")[2] not in _TAKEN_OUT:
                break
            producer = self.values[op.inputs[0]].producer
        return place

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording and self.broken is None

    def give_up(self, error: Exception) -> None:
        """Stop recording for good because of a failure of our own."""
        self.recording = False
        self.broken = error
        if _frames.is_of_a_signal(error):
            raise error
        _log.warning("this step could not be traced to its end", exc_info=error)

    # Modules and optimizers ---------------------------------------------------------------------

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        running: tuple[str | None, _Closed | None, nn.Module]
        if threading.get_ident() != self._thread:
            self._note_elsewhere(module)
            return
        try:
            fast = _has_fast_path(module) and _is_innermost(self._mode)
            if not self._running:
                self._outermost = self.count, _frames.here(sys._getframe(1))
            running = self._noted(module, args, fast=fast)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
            fast = _is_innermost(self._mode)  # nothing is recorded any more: no harm without it
            running = ("", _Closed([], without_mode=fast), module)
        self._running.append(running)
        if fast:
            # NOTE [Fast path] Any active function mode makes these modules take another way through
            # C++ in eval mode, with other rounding: they run without the mode, as one operation.
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _note_elsewhere(self, module: nn.Module) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self.elsewhere.add(path)

    def _noted(
        self, module: nn.Module, args: Any, *, fast: bool
    ) -> tuple[str | None, _Closed | None, nn.Module]:
        """Note that a module runs; return its path, what to do at its end, and itself."""
        path = self._paths.get(id(module))
        around = self._running[-1][0] if self._running else ""
        if path is not None:
            self.modules_run.add(path)
            if self.in_backward:
                self.rerun[path] = self.rerun.pop(path, None)
            if type(module).__module__.startswith("torch."):
                path = around
        elif next(module.parameters(), None) is None:
            path = around  # a loss or an activation, made on the spot
        closed = fast or isinstance(module, torch.jit.ScriptModule)
        inside = _Closed(list(tensors_in((args,))), without_mode=fast) if closed else None
        return path, inside, module

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        if threading.get_ident() != self._thread:
            return
        closed = self._running.pop()[1] if self._running else None
        try:
            if closed is not None and self.recording:
                read = [*closed.read, *module.parameters()]
                scripted = isinstance(module, torch.jit.ScriptModule)
                kind = Kind.OPAQUE if scripted else Kind.PLAIN
                func = torch.jit.ScriptModule if scripted else type(module).forward
                call = _Call(func, Traits(kind), (), read)
                with self.paused():  # what is done here to tensors is no operation of the user's
                    call.numbers = [self._read(tensor) for tensor in read]
                    self._finish(call, output, sys._getframe(1))
            if not self._running and self.recording:
                begin, place = self._outermost
                self.calls.append((begin, self.count, place))
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
        if closed is not None and closed.without_mode:
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _note_module(self, module: nn.Module, name: str, part: Any) -> None:
        del part
        try:
            self._note_put_in(module, name)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)

    def _note_put_in(self, module: nn.Module, name: str) -> None:
        path = self._paths.get(id(module))
        if self.recording and path is not None:
            self.put_in[f"{path}.{name}" if path else name] = _frames.here(sys._getframe(2))

    def _note_registration(self, module: nn.Module, name: str, parameter: Any) -> None:
        try:
            self._note_put_in(module, name)
            entry = self._known.get(id(parameter))
            is_new = entry is None or entry() is not parameter
            if self.recording and isinstance(parameter, Tensor) and is_new:
                self.registrations[id(parameter)] = _frames.here(sys._getframe(1))
                with self.paused():
                    if not parameter.requires_grad:
                        self._read(parameter)  # what it was put over may die before it is used
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._was_recording, self.recording = self.recording, False
        try:
            if has_closure(args, kwargs):
                # The closure runs forward and backward inside of the step; what the optimizer does
                # around it is told by its frames (``called``).
                self.recording = self._was_recording
                self._closures += 1
            else:
                self._note_step(optimizer)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)

    def _note_step(self, optimizer: Any) -> None:
        written = self._written_by(optimizer)
        self.steps.append((_frames.here(sys._getframe(2)), written))
        self.spans.append((written, len(self.backwards)))
        self._listener.before_step(written)

    def _written_by(self, optimizer: Any) -> frozenset[str]:
        return frozenset(
            self._names[id(tensor)]
            for group in optimizer.param_groups
            for tensor in group["params"]
            if id(tensor) in self._names
        )

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            if has_closure(args, kwargs):
                self._closures -= 1
                self.spans.append((self._written_by(optimizer), len(self.backwards)))
            else:
                self.recording = self._was_recording and self.broken is None
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    entry = self._known.get(id(tensor))
                    if entry is not None:
                        entry.version = version_of(tensor)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)

    # Operations -----------------------------------------------------------------------------------

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the user's program, and note what it read and made."""
        __tracebackhide__ = True  # pytest leaves this out of the traceback of a user's error
        frame = sys._getframe(2)
        traits, simple = _IGNORED, False
        call: _Call | None = None
        numbers: list[int] = []
        try:
            is_step = self._closures and _frames.is_optimizer(frame.f_code)
            traits = _IGNORED if is_step else traits_of(func)
            simple = traits.simple and not self._exited
            if simple:
                numbers = self._numbers(args, kwargs)
            elif not (traits.ignored or traits.backward):
                call = _Call(func, traits, args, read_by(args, kwargs))
                self._begin(call, kwargs)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
            traits = _IGNORED
        if traits.ignored:
            return func(*args, **kwargs)
        if traits.backward:
            return self._backward(func, traits, args, kwargs)
        try:
            result = func(*args, **kwargs) if kwargs else func(*args)
        except Exception:
            self._note_failed(frame, args, kwargs)
            raise
        try:
            if simple and self._finish_simple(func, numbers, result, frame):
                return result
            if call is None:
                call = _Call(func, traits, args, read_by(args, kwargs))
                call.numbers = numbers
            self._finish(call, result, frame)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
        return result

    def _note_failed(self, frame: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            read = sorted(read_by(args, kwargs), key=lambda tensor: not tensor.is_inference())
            self.failed = Failed(_frames.here(frame), tuple(map(self._read, read)))
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)

    # NOTE [Hot path] Most calls read tensors and make one new one. For them ``_numbers``, of ``_numbering``, and
    # ``_finish_simple`` do in two pieces what ``_begin``, ``_finish``, ``_append``, ``_produce`` and
    # ``_register`` do in many: a call of a Python function costs as much as the rest of the work.

    def _finish_simple(self, func: Any, numbers: list[int], result: Any, frame: Any) -> bool:
        """Note an operation that made one new tensor, with gradients on; return whether it did."""
        if not isinstance(result, Tensor) or not _is_grad_enabled():
            return False
        key = id(result)
        entry = self._known.get(key)
        if entry is not None and entry() is result:
            return False
        try:
            node: Any = result.grad_fn
            version, memory = result._version, result.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError, ValueError):  # rare kinds of tensors
            return False
        tracked = node is not None
        if not tracked and numbers and _frames.is_distribution(frame.f_code):
            return False
        brief = self._brief
        made = len(brief) // IN_BRIEF
        module = self._running[-1][0] if self._running else ""
        inputs = numbers[0] if len(numbers) == 1 else tuple(numbers)
        place = _places.get((id(frame.f_code), frame.f_lasti, False)) or _frames.here(frame)
        brief += (func, inputs, place, module, tracked)
        if tracked:
            node.metadata[self.tag] = len(self._ops) + made
        entry = self._known[key] = Entry(result)
        entry.value, entry.version = len(self._values) + made, version
        entry.open = None if tracked else _UNTRACKED
        if memory:
            sharing = self._storages.get(memory)
            if sharing is None or (type(sharing) is Entry and sharing() is None):
                self._storages[memory] = entry
            else:
                self._share(memory, key, entry)
        return True

    def _begin(self, call: _Call, kwargs: dict[str, Any]) -> None:
        kind, args = call.traits.kind, call.args
        if kind is Kind.SET_MODE:
            self._note_mode(enable=args[0])
        elif kind is Kind.SET_GRAD:
            self._note_gradient(args[0], args[1] if len(args) > 1 else None)
        elif kind is Kind.SET_FLAG:
            self._note_flag(args, kwargs)
        if kind is Kind.SET_GRAD or kind is Kind.SET_FLAG or kind is Kind.READ_GRAD:
            call.read = []
        elif kind is Kind.SET_DATA:
            call.read = call.read[1:]
        elif call.traits.reads is not None:
            call.read = call.read[call.traits.reads]
        call.numbers = [self._read(tensor) for tensor in call.read]
        if kind is Kind.HOOK:
            self.hooks[call.numbers[0]] = _frames.here(sys._getframe(3))
        if self._exited:
            call.numbers += self._came_back((*args, *kwargs.values()))
            call.plain = self._plain_arguments(args, kwargs)
        if call.traits.writes and call.read:
            sharing = [entry() for entry in self._sharing(call.read[0])]
            call.targets = frozenset(
                (shape_of(tensor), _node_name(tensor))
                for tensor in (call.read[0], *sharing)
                if tensor is not None
            )

    def _finish(self, call: _Call, result: Any, frame: Any) -> None:
        kind = call.traits.kind
        if kind is Kind.EXIT:
            self._leave_torch(call, result, frame)
            return
        if kind is Kind.SET_FLAG or self._finish_each(call, result, frame):
            return
        if kind is Kind.READ_GRAD:
            if result is None and not call.args[0].is_leaf:
                self.grad_reads.append((_frames.here(frame), self._read(call.args[0])))
            return
        if kind is Kind.CONVERT:
            kind = _converted(call, result)
        writes = call.traits.writes or kind is Kind.SET_DATA
        made = [result] if isinstance(result, Tensor) else _made(call, result)
        given = [any(tensor is other for other in call.read) for tensor in made]
        if not writes and any(given):
            kept = [not old or self._moved(t) for t, old in zip(made, given, strict=True)]
            made, given = list(compress(made, kept)), list(compress(given, kept))
        if not made:
            return
        numbers = () if kind is Kind.SHAPE_ONLY else tuple(call.numbers)
        op = self._append(call.func, kind, numbers, _frames.here(frame))
        self._complete(op, call, frame)
        for tensor, old in zip(made, given, strict=True):
            if writes or old:
                self._written(tensor, op, call)
            else:
                self._produce(tensor, op)

    def _finish_each(self, call: _Call, result: Any, frame: Any) -> bool:
        """Note a call that makes each result from the argument at its place as so many operations, if it does."""
        if call.func not in ONE_BY_ONE:
            return False
        for read, number, tensor in zip(
            call.read, call.numbers, tensors_in((result,)), strict=True
        ):
            if tensor is not read:
                op = self._append(call.func, call.traits.kind, (number,), _frames.here(frame))
                self._produce(tensor, op)
        return True

    def _complete(self, op: Op, call: _Call, frame: Any) -> None:
        """Add what only some operations have: a call that owns it, arguments from Python."""
        code = frame.f_code
        if not op.grad_mode or code.co_name == "__deepcopy__" or _frames.is_distribution(code):
            found = find_wrapper(frame, self._grad_off_depth)
            if found is not None:
                op.inner = op.place
                op.wrapper, op.place, op.call = found
        if not op.grad_mode and torch.is_inference_mode_enabled():
            op.stack = _frames.stack(frame)
        if call.plain is not None:
            direct = _frames.is_call_from(frame, call.func, op.place)
            op.plain = call.plain if direct or not call.plain else None
            op.arity = len(call.args)
            if call.plain:
                op.stack = _frames.stack(frame)

    def _plain_arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int | str]:
        """Return which arguments a Python value may have come through: no tensor of known making."""
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        return frozenset(
            key for key, arg in given.items() if arg is not None and not self._is_made(arg)
        )

    def _is_made(self, arg: Any) -> bool:
        if isinstance(arg, Tensor):
            entry = self._known.get(id(arg))
            value = None if entry is None else self.values[entry.value]
            return value is not None and not (value.producer is None and value.parameter is None)
        return isinstance(arg, (list, tuple)) and bool(arg) and all(map(self._is_made, arg))

    def _leave_torch(self, call: _Call, result: Any, frame: Any) -> None:
        place = _frames.here(frame)
        if isinstance(result, str) and call.args[0].dim():
            return  # text for a person; that of a single number may be read again
        if isinstance(result, bool) and not _frames.is_call_from(frame, call.func, place):
            return  # torch checks its own arguments: nothing is handed to the user
        self._exited = True
        op = self._append(call.func, Kind.EXIT, tuple(call.numbers), place)
        op.stack = _frames.stack(frame)
        op.outputs = (len(self.values),)
        self.values.append(Value(op.index))
        for number in plain_numbers_in([result]):
            self._left[id(number)] = number, op.outputs[0]
            if is_telling(number):
                self._floats[number] = op.outputs[0]

    def _came_back(self, args: tuple[Any, ...]) -> list[int]:
        """Return the values of the numbers among arguments that had left torch."""
        found = []
        for number in plain_numbers_in(args):
            left = self._left.get(id(number))
            if left is not None and left[0] is number:
                found.append(left[1])
            elif number in self._floats:
                found.append(self._floats[number])
        return found

    def _written(self, tensor: Tensor, op: Op, call: _Call) -> None:
        """Give a tensor that was written in place, and every live alias of it, a new value."""
        name = self._gradients.get(id(tensor))
        if name is not None and self._parameters[name].grad is tensor:
            self._note_written_gradient(name, op)
        targets, read = [tensor], []
        if not (tensor.is_floating_point() or tensor.is_complex()):
            op.into_integers = True
        if op.kind not in {Kind.SEVER, Kind.SET_DATA}:  # those change one tensor, not the memory
            for entry in self._sharing(tensor):
                alias = entry()
                if alias is not None and alias is not tensor:
                    targets.append(alias)
                    read.append(entry.value)
        op.inputs = (*op.inputs, *read)
        targets_before = call.targets or frozenset((shape_of(target), None) for target in targets)
        op.kept = dict(self._rewrite(target, op) for target in targets)
        inside = op.inner is not None  # of a Function, say, whose call is the operation's place
        operation = _calls.public_name(op.func) if inside else op.name
        write = Write(op.inner or op.place, targets_before, version_of(tensor), operation)
        write.around = op.place if inside else None
        write.before, write.made = tuple(op.kept.values()), tuple(op.kept)
        write.stack = _frames.stack(sys._getframe(1))
        write.module = self._paths.get(id(self._running[-1][2])) if self._running else None
        self.writes.append(write)

    # Calls with a meaning of their own ------------------------------------------------------------

    def _note_mode(self, *, enable: bool) -> None:
        if enable:
            self._grad_off_depth = None
            self.switches.append((len(self.ops), None))
        elif torch.is_grad_enabled():
            self._grad_off_depth = _frames.depth(_frames.switcher(sys._getframe(4)))
            self.switches.append((len(self.ops), _frames.switched_by(sys._getframe(4))))

    def _note_gradient(self, parameter: Tensor, gradient: Tensor | None) -> None:
        name = self._names.get(id(parameter))
        if name is None:
            return
        if gradient is not None:
            self.assigned.add(name)
            self.clearings.pop(name, None)
            self._gradients[id(gradient)] = name
        elif parameter.grad is not None:
            self.assigned.discard(name)
            self.clearings[name] = _frames.here(sys._getframe(4))

    def _note_written_gradient(self, name: str, op: Op) -> None:
        if op.name.endswith("zero_"):
            self.assigned.discard(name)
            self.clearings[name] = op.place
        else:
            self.assigned.add(name)
            self.clearings.pop(name, None)
            self.gradient_writes[name] = op

    def _note_flag(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = self._names.get(id(args[0]))
        wants = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if name is not None and not wants and args[0].requires_grad:
            self.freezings[name] = _frames.here(sys._getframe(4))
            call = _frames.call_of_function(sys._getframe(4))
            if call is not None:
                self.freezing_calls[name] = call

    def know_gradients(self) -> None:
        """Learn which tensors are gradients now, so that writes to them are told from others."""
        self._gradients = {
            id(parameter.grad): name
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }

    def backward_unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a backward pass after a failure of ours: who got a gradient is told all the same."""
        __tracebackhide__ = True
        if self.in_backward:
            return func(*args, **kwargs)
        return self._surrounded(func, args, kwargs, self._entered([]))

    def _backward(
        self, func: Any, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        __tracebackhide__ = True
        accumulates = traits.kind is Kind.BACKWARD
        place: Place | None = None
        numbers: tuple[int, ...] = ()
        around = ExitStack()
        try:
            place = _frames.here(sys._getframe(3))
            roots, inputs = _roots_and_inputs(func, args, kwargs)
            numbers = tuple(self._read(root) for root in roots)
            asked = None if inputs is None else frozenset(id(tensor) for tensor in inputs)
            wanted = tuple(map(self._number_of, inputs or ()))
            before = self.count
            self.backwards.append(Backward(numbers, place, accumulates, asked, wanted, before))
            if accumulates:
                around = self._entered(roots)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
        try:
            result = self._surrounded(func, args, kwargs, around)
        except Exception as error:
            self.failed = Failed(place, numbers)
            with self.paused():
                self._listener.after_failure(error)
            raise
        try:
            self.know_gradients()
            if not accumulates and self.recording:
                op = self._append(func, Kind.GRAD, numbers, place)
                for tensor in tensors_in((result,)):
                    self._produce(tensor, op)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
        return result

    def _entered(self, roots: list[Tensor]) -> ExitStack:
        """Tell the listener that a backward pass begins; what is returned tells it of the end."""
        around = ExitStack()
        try:
            around.enter_context(self._listener.around_backward(roots))
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.give_up(error)
        return around

    def _surrounded(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], around: ExitStack
    ) -> Any:
        """Run a backward pass of the user's unrecorded, and leave what is around it however it ends."""
        __tracebackhide__ = True
        recording, self.recording = self.recording, False
        self.in_backward = True
        failed: BaseException | None = None
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            failed = error
            raise
        finally:
            self.in_backward = False
            self.recording = recording and self.broken is None
            try:
                # With its own traceback: contextlib gives an error the one that it is handed here.
                traceback = None if failed is None else failed.__traceback__
                around.__exit__(None if failed is None else type(failed), failed, traceback)
            except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
                self.give_up(error)


def has_closure(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an optimizer's step was given a closure; the first argument is the optimizer."""
    return len(args) > 1 or kwargs.get("closure") is not None


def _converted(call: _Call, result: Any) -> Kind:
    """Return what a conversion did: the values of a list are copied, a tensor may keep its history."""
    if not (call.args and isinstance(call.args[0], Tensor)):
        return Kind.COPY_VALUES
    return Kind.PLAIN if getattr(result, "requires_grad", True) else Kind.SEVER


def _node_name(tensor: Tensor) -> str | None:
    node = node_of(tensor)
    return None if node is None else node.name()


def _made(call: _Call, result: Any) -> list[Tensor]:
    """Return the tensors that a call returned in a container, or wrote where it returns none."""
    kind = call.traits.kind
    if kind is Kind.SET_DATA:
        return [call.args[0]]
    if result is None:
        return list(tensors_in(call.args[:1])) if call.traits.writes else []
    return list(tensors_in((result,)))


class _Mode(TorchFunctionMode):
    """Hands each call to the trace; popped while a call runs, so that its inside is not seen."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = weakref.ref(trace)

    def forget(self) -> None:
        """Let the trace record no more."""
        trace = self._trace()
        if trace is not None:
            trace.recording = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        __tracebackhide__ = True
        trace = self._trace()
        if trace is None:
            return func(*args, **(kwargs or {}))
        if not trace.recording:
            if trace.broken is not None and traits_of(func).kind is Kind.BACKWARD:
                return trace.backward_unrecorded(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        return trace.called(func, args, kwargs or _NO_KEYWORDS)


def _forget_the_parent() -> None:
    """Record nothing in a process that was forked in a pass, such as a loader's worker: it would never end."""
    for mode in _entered:
        mode.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parent)


@contextmanager
def _eager_regions() -> Iterator[None]:
    """Run compiled regions eagerly inside, since the mode sees nothing of a compiled one."""
    global _eager  # noqa: PLW0603 -- the stance is global, and several traces may overlap
    if not dynamo_is_loaded():
        yield
        return
    if not _eager:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _eager += 1
    try:
        yield
    finally:
        _eager -= 1
        if not _eager:
            _stance.close()


def _roots_and_inputs(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the tensors that a backward pass starts from, and those it is for where these are named."""
    positions = {Tensor.backward: 4, torch.autograd.backward: 5, torch.autograd.grad: 1}
    position = positions[func]
    first = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
    inputs = args[position] if len(args) > position else kwargs.get("inputs")
    return list(tensors_in((first,))), None if inputs is None else list(tensors_in((inputs,)))


def _has_fast_path(module: nn.Module) -> bool:
    return not module.training and isinstance(
        module, (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    )


def _is_innermost(mode: TorchFunctionMode) -> bool:
    # Private: whether a mode of the user's lies on ours, which then may not be popped.
    current = getattr(torch.overrides, "_get_current_function_mode", None)
    return current is not None and current() is mode
