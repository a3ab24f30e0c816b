"""Assertions for test suites: every parameter that should get a gradient gets one.

What this room knows that no other does: what makes a pass fail a test, how a gradient that arrives now and
then is told from one that never does, and what has to be put back so that a test goes on as if nothing ran.

A missing gradient fails, and so does one with NaN or infinity. A gradient of zero does not: at the first step
it is often meant, as in a layer whose weights start at zero.

Limits: what a pass itself changes by hand (weights, attributes, files) stays changed, and lazy parameters
stay materialised. Random numbers are put back for Python, NumPy, the CPU, and CUDA.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradwatch import _error_words, _words
from gradwatch._graph import walk
from gradwatch._histories import all_frozen
from gradwatch._names import checked, names_of
from gradwatch._roots import aside
from gradwatch._single import diagnose
from gradwatch.config import Config, load_config
from gradwatch.errors import GradWatchError
from gradwatch.explain import did_you_mean, fold, render
from gradwatch.report import Status
from gradwatch.rules import Judge, Observation, is_required

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from torch import nn

    from gradwatch.report import Diagnosis
    from gradwatch.rules import ContractEntry

Contract = Config | str | os.PathLike[str] | list[Any] | tuple[Any, ...]
"""Entries of a contract, or what ``load_config`` takes, of which the contract alone is used."""


def assert_gradients(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    contract: Contract = (),
    seeds: int = 5,
) -> None:
    """Fail unless every parameter gets the gradient that is meant for it.

    ``loss_fn(*batch)`` runs once, with the random numbers as they are, and its loss is taken backward. Where a
    gradient is missing it runs again under other seeds, so that a part which is left out at random is told
    from one that never trains. Afterwards ``.grad``, buffers, modes, and random numbers are as before.

    Args:
        model: The module whose parameters are asked about, in the mode in which it is.
        loss_fn: Returns the loss: a tensor with one element, computed with the model.
        batch: What ``loss_fn`` is called with.
        contract: What is meant for which parameters, as in the ``contract:`` section of a configuration: a list
            of entries, or a configuration or its path. The first match wins, and all else needs a gradient.
        seeds: Passes at most, each under another seed.

    Raises:
        AssertionError: A gradient is missing or not finite, or the contract is broken; the message is the
            diagnosis.
        ConfigError: The contract cannot be used. It is a ``ValueError`` too.
        TypeError: The model is no module, ``loss_fn`` no function, or the loss no tensor.
        ValueError: The loss has several elements, or ``seeds`` is not a whole number of at least 1.

    Cost:
        One traced pass, and up to ``seeds`` where a gradient is missing.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> assert_gradients(model, lambda x: model(x).sum(), torch.ones(1, 2))
        >>> loss_fn = lambda x: model[1](model[0](x).detach()).sum()
        >>> teacher = {"parameters": "0.*", "gradient": "none", "reason": "a teacher"}
        >>> assert_gradients(model, loss_fn, torch.ones(1, 2), contract=[teacher])
        >>> assert_gradients(model, loss_fn, torch.ones(1, 2))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        AssertionError: warning[detached]: `0.*` get no gradient
    """
    __tracebackhide__ = True
    checked(model, "assert_gradients(model, ...)")
    _check_function(loss_fn)
    _check_seeds(seeds)
    verdict = _Verdict(model, contract)
    verdict.run(loss_fn, batch)
    if verdict.is_open(seeds):
        for seed in range(1, seeds):
            verdict.run(loss_fn, batch, seed)
    if text := str(verdict):
        raise AssertionError(text)


class checked_pass(diagnose):  # noqa: N801 -- reads as a phrase: `with checked_pass(model):`
    """Diagnose one pass of your own, and fail as it ends unless every gradient is as meant.

    As ``diagnose``; an exception raised inside passes through with a note on its cause, and nothing is put back.

    Args:
        model: The module whose parameters are asked about.
        contract: As for ``assert_gradients``.

    Raises:
        AssertionError: A gradient is missing or not finite, or the contract is broken.
        ConfigError: The contract cannot be used.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> with checked_pass(model) as diagnosis:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> str(diagnosis)
        'no problem found: 2 parameters train'
    """

    def __init__(self, model: nn.Module, contract: Contract = ()) -> None:
        super().__init__(model)
        self._verdict = _Verdict(model, contract)
        self._aside = ExitStack()

    def __enter__(self) -> Self:
        self._aside.enter_context(aside())
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        super().__exit__(kind, error, traceback)
        self._aside.close()
        if error is None:
            self._verdict.add(self)
            if text := str(self._verdict):
                raise AssertionError(text)


# --- what fails ----------------------------------------------------------------------------------------


class _Verdict:
    """What one or several passes over the same model say, held against a contract."""

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        self._model = model
        self._names = names_of(model)
        self._judge = Judge([], entries_of(contract), self._names.aliases, self._names.parameters)
        self._passes: list[diagnose] = []
        self._broken: list[str] = []
        self._without_history = 0

    def __str__(self) -> str:
        """Return why the test fails; empty when it does not."""
        texts = [render(found, self._names.parameters) for found in self._findings()]
        texts += self._broken
        if self._without_history == len(self._passes):
            if not any(p.requires_grad for p in self._names.parameters.values()):
                return all_frozen(self._model)
            if texts:
                texts.insert(0, _error_words.note("no_history", None))
        return "\n\n".join([*texts, *map(self._misspelt, self._judge.unmatched() if texts else ())])

    def run(
        self, loss_fn: Callable[..., Tensor], batch: Iterable[Any], seed: int | None = None
    ) -> None:
        """Run one more pass, and leave the model and the process as they were."""
        __tracebackhide__ = True
        with aside(), _as_before(self._model):
            if seed is not None:
                _seed(seed)
            with diagnose(self._model) as diagnosis:
                loss = _checked_loss(loss_fn(*batch))
                # Without a history it raises: the diagnosis says what the loss lacks.
                lenient = nullcontext() if loss.requires_grad else suppress(RuntimeError)
                with _strangers_as_before(loss, self._model), lenient:
                    loss.backward()  # type: ignore[no-untyped-call]
        self._without_history += not loss.requires_grad
        self.add(diagnosis)

    def add(self, diagnosis: diagnose) -> None:
        """Take in one more pass."""
        report = diagnosis.report
        if not report.logged:
            raise GradWatchError("this pass could not be diagnosed: see the log of `gradwatch`")
        missing, frozen, unseen = (
            [name for name, found in report.statuses.items() if found is status]
            for status in (Status.MISSING, Status.FROZEN, Status.UNSEEN)
        )
        step, covered = len(self._passes), tuple(report.statuses)
        alerts = self._judge.observe(Observation(step, covered, missing, frozen, unseen))
        # A test has no steps: what the notes say of them is left out.
        self._broken += [render(alert, covered).partition("\n")[0] for alert in alerts]
        self._passes.append(diagnosis)

    def is_open(self, seeds: int) -> bool:
        """Tell after the first pass whether others may say more, when there are ``seeds`` in all."""
        statuses = self._passes[0].report.statuses
        waiting = [self._patience(n) for n, s in statuses.items() if s is Status.MISSING]
        return any(steps <= seeds for steps in waiting)

    def _patience(self, name: str) -> float:
        """Return after how many passes without a gradient a parameter breaks the contract."""
        entry = self._judge.contract_for(name)
        if entry is None or is_required(entry):
            return 1
        return entry.within if entry.gradient == "intermittent" else math.inf

    def _findings(self) -> Iterator[Diagnosis]:
        """Yield what is wrong, each parameter as in the first pass in which it went wrong."""
        for status in (Status.MISSING, Status.NONFINITE):
            groups: dict[tuple[int, int], list[str]] = defaultdict(list)
            for name in self._names.parameters:
                bad = [i for i, p in enumerate(self._passes) if p.report.statuses[name] is status]
                if bad and (
                    status is Status.NONFINITE or is_required(self._judge.contract_for(name))
                ):
                    groups[bad[0], len(bad)].append(name)
            for (first, count), names in groups.items():
                for found in self._passes[first].about(names):
                    yield self._counted(found, len(self._passes) - count)

    def _counted(self, found: Diagnosis, others: int) -> Diagnosis:
        """Add to a diagnosis under how many seeds it was otherwise."""
        seeds = len(self._passes)
        if found.status is not Status.MISSING or seeds == 1:
            return found
        if not others:
            return replace(found, notes=(*found.notes, _words.under_no_seed(seeds)))
        globs = fold(found.parameters, self._names.parameters)
        notes = (_words.under_some_seeds(others, seeds), *found.notes)
        return replace(found, notes=notes, help=_words.say_intermittent(globs))

    def _misspelt(self, glob: str) -> str:
        guess = did_you_mean(
            glob, [*self._names.parameters, *map("{}.*".format, self._names.modules)]
        )
        hint = f"\n   = help: did you mean `{guess}`?" if guess else ""
        return f"note[contract]: no parameter matches {_words.listed([glob])}{hint}"


def entries_of(contract: Contract) -> tuple[ContractEntry, ...]:
    """Return the checked entries of a contract.

    Args:
        contract: As for ``assert_gradients``.

    Raises:
        ConfigError: Something in it cannot be used.

    Example:
        >>> [entry.gradient for entry in entries_of([{"parameters": "a.*", "gradient": "none"}])]
        ['none']
    """
    if isinstance(contract, Config | str | os.PathLike):
        return load_config(contract).contract
    return load_config({"contract": contract}).contract


# --- running, and leaving all as it was ----------------------------------------------------------------


def _check_function(loss_fn: object) -> None:
    __tracebackhide__ = True
    if not callable(loss_fn):
        found = type(loss_fn).__name__
        raise TypeError(
            f"`assert_gradients(model, loss_fn)`: expected a function that returns the loss, found `{found}`"
        )


def _check_seeds(seeds: Any) -> None:
    __tracebackhide__ = True
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        wanted = "expected a whole number of at least 1"
        raise ValueError(f"`assert_gradients(seeds={seeds!r})`: {wanted}")


def _checked_loss(loss: Any) -> Tensor:
    __tracebackhide__ = True
    wanted = "`assert_gradients(model, loss_fn)`: expected a tensor with one element from `loss_fn`"
    if not isinstance(loss, Tensor):
        raise TypeError(f"{wanted}, found `{type(loss).__name__}`")
    if loss.numel() != 1:
        shape = tuple(loss.shape)
        raise ValueError(f"{wanted}, found shape {shape}: take its `.mean()` or `.sum()`")
    return loss


def _seed(seed: int) -> None:
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Begin without gradients, and put back all that a pass changes in the model and in the process."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    with _random_numbers_as_before():
        for parameter, _, _ in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, grad, wants in parameters:
                parameter.grad = grad
                parameter.requires_grad_(wants)
            for module, name, buffer, content in buffers:
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
                buffer.data.copy_(content)  # through `.data`, so that no graph takes it for a write


@contextmanager
def _random_numbers_as_before() -> Iterator[None]:
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if on_cuda else ()
    numpy = sys.modules.get("numpy")
    state, legacy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(legacy)


@contextmanager
def _strangers_as_before(loss: Tensor, model: nn.Module) -> Iterator[None]:
    """Put back ``.grad`` of leaves that the loss reaches, and that are not the model's."""
    own = {id(parameter) for parameter in model.parameters()}
    leaves = [getattr(node, "variable", None) for node in walk([loss], "")[1]]
    strangers = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in own]
    kept = [(leaf, leaf.grad) for leaf in strangers]
    for leaf in strangers:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad
