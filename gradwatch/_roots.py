"""Which parameters some code ought to give a gradient to, when nobody said for which model.

What this room knows that no other does: that a module which is called from outside of any other's forward
stands for a model, and which of its parameters a backward pass was then meant to reach. It errs on the side of
silence. A parameter is expected to get a gradient when it required one, in a module in training mode, as the
model's forward began with gradients on, and when what that forward returned lay on the way of a backward pass
that filled ``.grad``, named no ``inputs``, and did not fail. One gradient of any backward pass is enough.

Limits: models are known from their first call on. What runs on other threads, inside of ``torch.func``
transforms, or returns tensors in an object of its own is passed over, and after the first 50,000 operations
only arriving gradients are noted. Models are kept alive until the code ends.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradwatch import _words
from gradwatch._diagnose import Inspection
from gradwatch._graph import walk
from gradwatch._names import names_of
from gradwatch._record import node_of, tensors_in
from gradwatch._stats import is_hidden
from gradwatch.explain import render
from gradwatch.report import Status
from gradwatch.rules import Judge, Observation, is_required

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gradwatch.rules import ContractEntry

MAX_OPS = 50_000
_watching: list[Roots] = []


@contextmanager
def aside() -> Iterator[None]:
    """Expect nothing of the code inside: whoever runs it judges it already."""
    with ExitStack() as stack:
        for roots in _watching:
            stack.enter_context(roots.aside())
        yield


@dataclass(slots=True)
class _Root:
    """A module that was called from outside of any other."""

    module: nn.Module
    homes: dict[str, tuple[nn.Module, str]]
    """For each parameter, the module that it is registered on, and its name there."""
    covered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a root."""

    covered: tuple[str, ...]
    expected: frozenset[str]


class Roots(Inspection):
    """Find the models that run between ``start()`` and ``stop()``, and say which parameters were left out.

    Parameters are named after the class of their model: ``Net.encoder.weight``.

    Cost:
        Before the first call of a model, one Python call for each operation; from then on as
        ``Inspection``, and one more walk over the graph of each backward pass.
    """

    def __init__(self) -> None:
        super().__init__({}, {}, sizes=False)
        self.trace.recording = False
        self._mark = f"{self.trace.tag} call"
        self._thread = threading.get_ident()
        self._handles = ExitStack()
        self._roots: dict[int, _Root] = {}
        self._names: dict[int, str] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._running: list[nn.Module] = []
        self._calls: list[_Call] = []
        self._now: _Call | None = None
        self._is_aside = False
        self._covered: dict[str, None] = {}
        self._expected: set[str] = set()
        self._assigned: set[str] = set()

    def start(self) -> None:
        """Begin to look."""
        # What compiles is loaded here, so that the trace can tell it to run eagerly: not halfway through.
        with suppress(ImportError, RuntimeError), torch.compiler.set_stance("default"):
            pass
        # Before the trace's own hooks: a module has to be known when they are called.
        for handle in (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ):
            self._handles.callback(handle.remove)
        super().start()
        _watching.append(self)

    def stop(self) -> None:
        """Stop looking."""
        self._assigned |= self.trace.assigned
        _watching.remove(self)
        self._handles.close()
        super().stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Expect and note nothing inside."""
        before, self._is_aside = self._is_aside, True
        try:
            with self.trace.paused():
                yield
        finally:
            self._is_aside = before

    def findings(self, contract: Iterable[ContractEntry] = ()) -> str:
        """Return what is to be said after ``stop()``; empty where there is nothing.

        Args:
            contract: What is meant for which parameters, by their names with or without the model's class.
        """
        judge = Judge([], contract, self._aliases)
        covered, given = tuple(self._covered), self.sensor.arrived | self._assigned
        absent = [name for name in covered if name not in given]
        hidden = {n for n in absent if n in self.unseen or is_hidden(self.parameters[n])}
        missing = [name for name in absent if name in self._expected and name not in hidden]
        frozen = [name for name in covered if not self.parameters[name].requires_grad]
        unseen = set(absent).difference(missing)
        alerts = judge.observe(Observation(0, covered, missing, frozen, unseen))
        found = self.diagnose(
            {name: Status.MISSING for name in missing if is_required(judge.contract_for(name))}, 0
        )
        texts = [render(diagnosis, self.parameters) for diagnosis in found]
        # A test has no steps: what the notes of an alert say of them is left out.
        texts += [render(alert, self.parameters).partition("\n")[0] for alert in alerts]
        return "\n\n".join(texts)

    # Backward passes and optimizers -------------------------------------------------------------------

    @contextmanager
    def around_backward(self, roots: list[Tensor]) -> Iterator[None]:
        """Watch one backward pass, and note what it was meant to reach, unless it fails."""
        self._assigned |= self.trace.assigned
        reached = self._calls_behind(roots)
        with super().around_backward(roots):
            yield
        for call in reached:
            self._covered.update(dict.fromkeys(call.covered))
            self._expected |= {n for n in call.expected if self.parameters[n].requires_grad}

    def before_step(self, written: frozenset[str]) -> None:
        """Note gradients that were assigned by hand, since they are often emptied after the step."""
        self._assigned |= self.trace.assigned
        super().before_step(written)

    def _calls_behind(self, roots: list[Tensor]) -> list[_Call]:
        """Return the calls of models whose results lie on the way of a backward pass."""
        try:
            if not roots or self.trace.backwards[-1].inputs is not None:
                return []
            nodes = walk(roots, self.trace.tag)[1]
            numbers = {node.metadata.get(self._mark) for node in nodes} - {None}
            return [self._calls[number] for number in sorted(numbers)]
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.trace.give_up(error)
            return []

    # Calls of modules -----------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        del args
        if threading.get_ident() != self._thread:
            return
        self._running.append(module)
        if len(self._running) > 1 or self._is_aside or self.trace.in_backward:
            return
        if not (module.training and torch.is_grad_enabled()) or self.trace.broken is not None:
            return
        try:
            self._expect(module)
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.trace.give_up(error)

    def _expect(self, module: nn.Module) -> None:
        """Note what a call that begins would train."""
        if len(self.trace.ops) > MAX_OPS:
            raise RuntimeError(_words.too_long(MAX_OPS))
        root = self._roots.get(id(module)) or self._adopted(module)
        if root is not None:
            expected = (name for name, home in root.homes.items() if self._trains(name, *home))
            self._now = _Call(root.covered, frozenset(expected))

    def _trains(self, name: str, owner: nn.Module, short: str) -> bool:
        """Tell whether a parameter is to be trained, and is the one in use: functional_call swaps it."""
        parameter = self.parameters[name]
        in_use = getattr(owner, short, None) is parameter
        return in_use and owner.training and parameter.requires_grad

    def _adopted(self, module: nn.Module) -> _Root | None:
        """Learn the names of a model that is called for the first time."""
        names = names_of(module)
        if not all(isinstance(p, nn.Parameter) and p.is_leaf for p in names.parameters.values()):
            return None  # inside of functional_call, with other tensors in the parameters' place
        prefix = self._prefix(module)
        homes = {}
        for name, parameter in names.parameters.items():
            key = self._names.setdefault(id(parameter), f"{prefix}.{name}")
            path, _, short = name.rpartition(".")
            homes[key] = names.modules[path], short
            self._aliases[key] = (*self._aliases.get(key, ()), *names.aliases.get(name, (name,)))
        known = {id(module) for module in self._modules.values()}
        self.adopt(
            {k: getattr(*home) for k, home in homes.items() if k not in self.parameters},
            {
                f"{prefix}.{path}" if path else prefix: inner
                for path, inner in names.modules.items()
                if id(inner) not in known
            },
        )
        self.trace.recording = True
        root = self._roots[id(module)] = _Root(module, homes, tuple(homes))
        return root

    def _prefix(self, module: nn.Module) -> str:
        """Return a name for a model that no other has."""
        short = type(module).__name__
        count = sum(type(root.module).__name__ == short for root in self._roots.values())
        return f"{short}_{count + 1}" if count else short

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        if threading.get_ident() != self._thread or not self._running:
            return
        if self._running[-1] is not module:
            return  # a hook before ours raised as the module was entered
        self._running.pop()
        if self._running or self._now is None:
            return
        call, self._now = self._now, None
        try:
            self._mark_results(output, len(self._calls))
        except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
            self.trace.give_up(error)
        self._calls.append(call)

    def _mark_results(self, output: Any, number: int) -> None:
        """Leave the number of a call on what it returned; what it hands through is no work of its own."""
        for tensor in tensors_in((output,)):
            node = node_of(tensor)
            if node is not None:
                node.metadata.setdefault(self._mark, number)
