"""The number of each tensor's content: which value it holds now, and what one that nobody saw made was made from.

What this room knows that no other does: that a tensor is no value. What it holds is another one after a write in
place, after one over the same memory, and after a Function has given it a history. It stores numbers only; tensors are
held weakly, by their ``id``, and by the address of their memory.

Limits: a tensor without memory of its own, as ``torch.func`` makes them, is not followed to its aliases. The memory of
a tensor that died may have been given to another one: only what could be its heir is taken for it.
"""

from __future__ import annotations

import copy
import sys
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradwatch import _calls, _frames
from gradwatch._calls import Kind, Wrapper
from gradwatch._record import (
    MADE,
    Op,
    Record,
    Value,
    held_by,
    label_of,
    memory_of,
    node_of,
    tensors_in,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch._frames import Place

_traces = count()
_CROWD = 16
"""Tensors over one memory from which on those that died are let go."""
_NO_TENSORS = frozenset({int, float, bool, str, type(None), slice, torch.dtype, torch.device})


class Entry(weakref.ref[Tensor]):
    """A tensor, held weakly: one object, since one is made for every operation."""

    __slots__ = ("open", "value", "version")

    value: int
    """Number of its present content."""
    open: Value | None
    """That content where something about it can still change; None for the tracked result of an operation."""
    version: int


class Numbering(Record):
    """Number the content of every tensor that a pass reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tag = f"gradwatch {next(_traces)}"
        """Key of the operation's number in an autograd node's metadata, another one for each trace."""
        self._parameters: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._known: dict[int, Entry] = {}
        self._storages: dict[int, Entry | dict[int, Entry]] = {}
        """Per address the tensor over that memory; several by their ``id``, the one numbered last at the end."""
        self._keepers: dict[int, tuple[str, str]] = {}
        """Path and attribute of the modules that held other tensors when the pass began, by ``id``."""
        self._running: list[tuple[str | None, Any, nn.Module]] = []
        """Path of each module that runs now, what is to be done at its end, and itself; the innermost at the end."""

    # What is asked about -------------------------------------------------------------------------

    def adopt(self, parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        """Ask about these tensors and modules too, from now on."""
        for name, tensor in parameters.items():
            self._parameters[name], self._names[id(tensor)] = tensor, name
            entry = self._known.get(id(tensor))
            if entry is not None and entry() is tensor:
                value = self.values[entry.value]
                value.label = None
            else:
                value = self.values[self._register(tensor, Value(None, tensor.requires_grad))]
            self._ask_about(tensor, name, value)
        for path, module in modules.items():
            self._paths[id(module)] = path
            self._know_attributes(path, module)

    def _ask_about(self, tensor: Tensor, name: str, value: Value) -> None:
        value.parameter = name
        self._known[id(tensor)].open = value

    def _know_attributes(self, path: str, module: nn.Module) -> None:
        """Number the tensors that a module held before the pass began."""
        for name, held in held_by(module):
            if not isinstance(held, Tensor):
                self._keepers.update((id(tensor), (path, name)) for tensor in tensors_in((held,)))
            elif not held.is_leaf:
                self._keepers[id(held)] = path, name
            elif id(held) not in self._known:
                number = self._register(held, self._leaf(held))
                self.values[number].attribute = (path, name)

    @staticmethod
    def _leaf(tensor: Tensor) -> Value:
        value = Value(tracked=tensor.requires_grad)
        if value.tracked:
            value.label, value.alien = label_of(tensor), weakref.ref(tensor)
        return value

    # What is read ---------------------------------------------------------------------------------

    def _numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """Return the numbers of the values that a call is given."""
        known, numbers = self._known, []
        arg: Any
        for arg in (*args, *kwargs.values()) if kwargs else args:
            if type(arg) in _NO_TENSORS:
                continue
            entry = known.get(id(arg))
            if entry is not None and arg is entry():
                numbers.append(entry.value if entry.open is None else self._read(arg))  # type: ignore[arg-type]
            else:
                numbers.extend(map(self._read, tensors_in((arg,))))
        return numbers

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor's present content."""
        return self._read(tensor)

    def _register(self, tensor: Tensor, value: Value) -> int:
        number = len(self.values)
        self.values.append(value)
        try:
            version = tensor._version
            memory: int | None = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError, ValueError):  # rare kinds of tensors
            version, memory = version_of(tensor), memory_of(tensor)
            value.wrapped = (
                memory is None
                and tensor.layout is torch.strided
                and not hasattr(tensor, "to_local")
            )
            self.opaque = self.opaque or value.wrapped
        entry = self._known[id(tensor)] = Entry(tensor)
        entry.value, entry.version = number, version
        entry.open = None if value.tracked else value
        if memory:
            self._share(memory, id(tensor), entry)
        return number

    def _share(self, memory: int, key: int, entry: Entry) -> None:
        """Note that a tensor lies over some memory; those before it that died do not any more."""
        sharing = self._storages.get(memory)
        if isinstance(sharing, dict):
            if len(sharing) > _CROWD:
                self._storages[memory] = sharing = {
                    k: e for k, e in sharing.items() if e() is not None
                }
            sharing.pop(key, None)
            sharing[key] = entry
        else:
            other = None if sharing is None else sharing()
            if sharing is None or other is None or id(other) == key:
                self._storages[memory] = entry
            else:
                self._storages[memory] = {id(other): sharing, key: entry}

    def _sharing(self, tensor: Tensor) -> list[Entry]:
        """Return what lies over the memory of a tensor, the one numbered last at the end."""
        sharing = self._storages.get(memory_of(tensor) or 0)
        if sharing is None:
            return []
        return list(sharing.values()) if isinstance(sharing, dict) else [sharing]

    def _read(self, tensor: Tensor) -> int:
        entry = self._known.get(id(tensor))
        if entry is None or entry() is not tensor:
            return self._discover(tensor)
        value = entry.open
        if value is None:
            return entry.value
        if value.parameter is not None:
            return self._read_parameter(tensor, value, entry)
        if not value.tracked and tensor.requires_grad:
            node = node_of(tensor)
            return (
                self._put_over(tensor, entry) if node is None else self._adopt(tensor, node, entry)
            )
        return entry.value

    def _number_of(self, tensor: Tensor) -> int:
        """Return the number that a tensor had when it was read last, or made."""
        entry = self._known.get(id(tensor))
        known = entry is not None and entry() is tensor
        return entry.value if entry is not None and known else self._discover(tensor)

    def _read_parameter(self, tensor: Tensor, value: Value, entry: Entry) -> int:
        name, wants = value.parameter, tensor.requires_grad
        if name is None:
            return entry.value
        if value.frozen is wants and value.producer is None:
            # Frozen for one pass of a step and not for the other: each pass has a value of its own.
            entry.value, value = len(self.values), Value()
            self.values.append(value)
            self._ask_about(tensor, name, value)
        value.frozen = not wants
        value.tracked = value.tracked or wants
        self.read_flags[name] = wants or self.read_flags.get(name, False)
        return entry.value

    def _put_over(self, tensor: Tensor, entry: Entry) -> int:
        """Note that a leaf was put over the memory of another value after it was made: ``copy.copy(h)``."""
        value, alias = self.values[entry.value], self._alias(tensor)
        if value.producer is None or alias is None or alias == entry.value:
            return entry.value
        op = self._append(copy.copy, Kind.REWRAP, (alias,), self.ops[value.producer].place)
        return self._produce(tensor, op)

    def _adopt(self, tensor: Tensor, node: Any, entry: Entry) -> int:
        """Note that a Function gave a tensor its ``grad_fn`` after the operations inside it ran."""
        value = self.values[entry.value]
        made = None if value.producer is None else self.ops[value.producer]
        op = self._append(
            torch.autograd.Function.apply,
            Kind.LINK,
            (entry.value, *self._linked(node)),
            None if made is None else made.place,
        )
        op.wrapper = Wrapper.CUSTOM_FUNCTION if made is None else made.wrapper
        if made is not None and made.wrapper is Wrapper.REENTRANT_CHECKPOINT:
            self._open_checkpoint(made.call)
        entry.value = self._produce(tensor, op)
        return entry.value

    def _open_checkpoint(self, call: Any) -> None:
        """Take what ran inside a checkpoint that works as what it is: backward will run it again."""
        for op in self.ops:
            if op.wrapper is not Wrapper.REENTRANT_CHECKPOINT or op.call is not call:
                continue
            op.wrapper, op.around, op.place, op.grad_mode = None, op.place, op.inner, True
            if op.kind is Kind.PLAIN and any(self.values[n].tracked for n in op.inputs):
                for number in op.outputs:
                    self.values[number].tracked = True

    def _discover(self, tensor: Tensor) -> int:
        """Number a tensor that the mode never saw made, and link it to what it came from."""
        node = node_of(tensor)
        if node is not None:
            inputs = self._linked(node)
            op = self._append(torch.autograd.Function.apply, Kind.LINK, inputs, None)
            self.foreign[op.index] = weakref.ref(tensor)
            if MADE in node.metadata:
                self.outlived[op.index] = node.metadata[MADE]
            if id(tensor) in self._keepers:
                self.keepers[op.index] = self._keepers[id(tensor)]
            return self._produce(tensor, op)
        name = self._gathered(tensor)
        if name is not None:
            number = self._register(tensor, Value(None, tensor.requires_grad))
            self._ask_about(tensor, name, self.values[number])
            return number
        alias = self._alias(tensor)
        if alias is not None:
            place = self.registrations.get(id(tensor))
            maker = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.autograd.Variable
            op = self._append(maker, Kind.REWRAP, (alias,), place)
            number = self._produce(tensor, op)
            self.values[number].label = label_of(tensor) if tensor.requires_grad else None
            return number
        number = self._register(tensor, self._leaf(tensor))
        if not tensor.requires_grad:
            frame = _frames.innermost(sys._getframe(1))
            if frame is not None and _calls.calls_script(frame):
                self.scripted[number] = _frames.here(frame)
        return number

    def _gathered(self, tensor: Tensor) -> str | None:
        """Return the parameter that FSDP2 has put together for a forward pass: the parts are others."""
        if not self._running or not isinstance(tensor, nn.Parameter):
            return None
        module = self._running[-1][2]
        path = self._paths.get(id(module))
        for short, held in module.named_parameters(recurse=False):
            name = f"{path}.{short}" if path else short
            if held is tensor and hasattr(self._parameters.get(name), "to_local"):
                return name
        return None

    def _alias(self, tensor: Tensor) -> int | None:
        """Return the value over whose memory a leaf was put, where there is one."""
        for entry in reversed(self._sharing(tensor)):
            # The memory of a dead tensor may have been given to a new one: only a leaf that wants a
            # gradient, or could, or that the user's text may have wrapped, is taken for its heir.
            if (
                entry() is not None
                or tensor.requires_grad
                or isinstance(tensor, nn.Parameter)
                # What leaves `torch.func` is a new one that nothing has seen.
                or (not self.opaque and _calls.wraps_in_variables(sys._getframe(1)))
            ):
                return entry.value
        return None

    def _linked(self, node: Any) -> tuple[int, ...]:
        """Return the values from which a node computes, by walking to the nearest known ones."""
        found: dict[int, None] = {}
        seen, todo = set(), [parent for parent, _ in node.next_functions if parent is not None]
        while todo:
            parent = todo.pop()
            if parent in seen:
                continue
            seen.add(parent)
            leaf = getattr(parent, "variable", None)
            tag = parent.metadata.get(self.tag)
            if leaf is not None:
                found[self._read(leaf)] = None
            elif tag is not None:
                found.update(dict.fromkeys(self.ops[tag].outputs))
            else:
                todo.extend(up for up, _ in parent.next_functions if up is not None)
        return tuple(found)

    def _produce(self, tensor: Tensor, op: Op) -> int:
        node = node_of(tensor)
        if node is not None:
            node.metadata[self.tag] = op.index
        number = self._register(tensor, Value(op.index, node is not None))
        op.outputs = (*op.outputs, number) if op.outputs else (number,)
        return number

    def _rewrite(self, target: Tensor, op: Op) -> tuple[int, int]:
        """Give a tensor a new value; return its number, and that of the one it had before."""
        known = self._known.get(id(target))
        before = self._read(target) if known is None or known() is not target else known.value
        old = self.values[before]
        number = self._produce(target, op)
        if old.parameter is not None and node_of(target) is None:
            # Written under no_grad, a parameter stays the leaf whose gradient is asked about.
            self._ask_about(target, old.parameter, self.values[number])
            self.values[number].tracked = target.requires_grad
        return number, before

    def _moved(self, tensor: Tensor) -> bool:
        entry = self._known.get(id(tensor))
        return entry is not None and entry.version != version_of(tensor)

    def _append(self, func: Any, kind: Kind, inputs: tuple[int, ...], place: Place | None) -> Op:
        module = self._running[-1][0] if self._running else ""
        # Inside of inference mode `enable_grad` switches on what is of no use.
        grad_mode = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        op = Op(len(self.ops), func, kind, inputs, place, module, grad_mode)
        self.ops.append(op)
        return op
