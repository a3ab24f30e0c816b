"""One diagnosed pass over a model that a function of the user's makes, for the command line and CI.

What this room knows that no other does: how ``package.module:factory`` is found, what such a function may
return, and how an error of the user's own code is told from a slip in what was typed.

Limits: no Trainer runs. A LightningModule gets its ``training_step`` called as it is, and what needs the
Trainer inside of it raises there.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from gradwatch._frames import Owner, owner_of_file
from gradwatch._single import diagnose
from gradwatch.errors import CheckError
from gradwatch.explain import did_you_mean
from gradwatch.report import Report, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradwatch.config import Config

_RETURNS = "return `(model, closure)`, or `(LightningModule, batch)`"
_MESSAGE_WITHOUT_TRAINER = r"You are trying to `self\.log\(\)`"
"""How Lightning's own warning begins, of which there is one per ``self.log`` outside of a Trainer."""


class Checked(NamedTuple):
    """What a pass showed, and where its model is made."""

    report: Report
    made_at: Site


def check(target: str, config: Config) -> Checked:
    """Make a model, run one pass of it, and diagnose that.

    Args:
        target: ``package.module:factory``, as seen from the working directory.
        config: What is watched, and what is meant.

    Raises:
        CheckError: There is no such function, it returned something else, or code of the user's raised.

    Cost:
        The import, one forward and backward pass, and five small operations for each of its own.
    """
    module, _, name = _split(target)
    with _from_here():
        with _theirs(f"importing `{module}`"):
            home = _imported(module, target)
        factory = _factory(home, name, target)
        with _theirs(f"`{target}`"):
            made = factory()
        model, loss_of = _model_and_loss(made, target)
        with _theirs(f"a pass of `{target}`"):
            report = _diagnosed(model, loss_of, config)
    return Checked(report, _site(factory, home))


@contextmanager
def _from_here() -> Iterator[None]:
    """Let modules of the working directory be imported first."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have changed it
            sys.path.remove(here)


# --- what was typed ------------------------------------------------------------------------------------


def _wrong(headline: str, *notes: str, help: str | None = None) -> CheckError:  # noqa: A002 -- as in a message
    lines = [headline, *(f"  = note: {note}" for note in notes)]
    return CheckError("\n".join([*lines, f"  = help: {help}"] if help else lines))


def _split(target: str) -> tuple[str, str, str]:
    module, colon, name = target.partition(":")
    words = [*module.split("."), *name.split(".")]
    if all(word.isidentifier() for word in words) and not module.endswith(".py"):
        return module, colon, name
    path = re.fullmatch(r"(?:\./)?([\w./\\]+?)(?:\.py)?(?::([\w.]+))?", target)
    dotted = path and re.sub(r"[/\\]+", ".", path[1]).strip(".")
    example = f"did you mean `{dotted}:{path[2] or 'FACTORY'}`?" if path and dotted else None
    raise _wrong(
        f"`{target}` is not of the form `package.module:factory`",
        help=example or "name a module and a function in it, such as `train:factory`",
    )


def _imported(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise  # an import inside of the user's module
    parent, _, last = missing.rpartition(".")
    folders = [str(Path.cwd())] if not parent else [*getattr(sys.modules[parent], "__path__", ())]
    guess = did_you_mean(last, _modules_in(folders))
    near = f"{parent}.{guess}".lstrip(".") + target.removeprefix(missing)
    raise _wrong(
        f"no module `{missing}`",
        f"looked in `{folders[0]}`" if folders else f"`{parent}` is a module without others in it",
        help=f"did you mean `{near}`?" if guess else None,
    )


def _modules_in(folders: list[str]) -> list[str]:
    found: set[str] = set()
    for folder in folders:
        with suppress(OSError):
            entries = [entry for entry in Path(folder).iterdir() if entry.stem.isidentifier()]
            found |= {entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir()}
    return sorted(found)


def _factory(home: Any, name: str, target: str) -> Callable[[], Any]:
    value = home
    for part in name.split("."):
        if not hasattr(value, part):
            names = [n for n, v in vars(value).items() if callable(v)] if _has_dict(value) else []
            guess = did_you_mean(part, names)
            near = target.replace(f":{name}", f":{name.replace(part, guess)}") if guess else ""
            help_ = f"did you mean `{near}`?" if guess else None
            raise _wrong(f"`{_called(value, home)}` has no `{part}`", help=help_)
        value = getattr(value, part)
    if not callable(value) or isinstance(value, nn.Module):
        kind = type(value).__name__
        raise _wrong(f"`{target}` is a `{kind}`, expected a function", help=f"let it {_RETURNS}")
    needed = _required(value)
    if needed:
        words = ", ".join(f"`{word}`" for word in needed)
        raise _wrong(
            f"`{target}` takes {words}, expected a function that is called without arguments",
            help="write one that gives them",
        )
    factory: Callable[[], Any] = value
    return factory


def _has_dict(value: Any) -> bool:
    return hasattr(value, "__dict__")


def _called(value: Any, home: Any) -> str:
    return str(home.__name__) if value is home else str(getattr(value, "__qualname__", value))


def _required(factory: Callable[..., Any]) -> list[str]:
    """Return the parameters of a function that have to be given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]


def _site(factory: Any, home: Any) -> Site:
    """Return where a function is defined, or the top of its module."""
    made = inspect.unwrap(factory)
    with suppress(OSError, TypeError):
        file = inspect.getsourcefile(made)
        if file is not None:
            line = max(inspect.getsourcelines(made)[1], 1)
            return Site(str(Path(file).absolute()), line, function=made.__qualname__)
    return Site(str(getattr(home, "__file__", None) or "<unknown>"), 1)


# --- what it returned ----------------------------------------------------------------------------------


def _model_and_loss(made: Any, target: str) -> tuple[nn.Module, Callable[[], Any]]:
    """Return the model, and what gives its loss."""
    if not isinstance(made, (tuple, list)) or len(made) != 2:  # noqa: PLR2004 -- a pair
        kind = f"{len(made)} values" if isinstance(made, (tuple, list)) else f"`{_kind(made)}`"
        raise _wrong(f"`{target}` returned {kind}, expected a pair", help=_RETURNS)
    model, second = made
    if not isinstance(model, nn.Module):
        headline = f"`{target}` returned `{_kind(model)}` first, expected a `torch.nn.Module`"
        raise _wrong(headline, help=_RETURNS)
    if callable(second):
        return model, second
    step = getattr(model, "training_step", None)
    if step is None:
        headline = f"`{target}` returned a `{_kind(model)}` and a `{_kind(second)}`"
        note = "a batch goes with a LightningModule, and this model has no `training_step`"
        raise _wrong(headline, note, help="return `(model, closure)`, where `closure()` is a loss")
    if not getattr(model, "automatic_optimization", True):
        headline = f"`{_kind(model)}` optimizes by hand, for which it needs a Trainer"
        raise _wrong(headline, help="return `(model, closure)`, where `closure()` is a loss")
    takes_number = len(inspect.signature(step).parameters) > 1
    return model, lambda: step(second, 0) if takes_number else step(second)


def _kind(value: Any) -> str:
    return type(value).__name__


def _diagnosed(model: nn.Module, loss_of: Callable[[], Any], config: Config) -> Report:
    with diagnose(model, config) as diagnosis:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_MESSAGE_WITHOUT_TRAINER)
            loss = _scalar(loss_of())
        # A loss that nothing leads to is what this looks for; torch raises over it.
        wanted = any(parameter.requires_grad for parameter in model.parameters())
        with suppress(RuntimeError) if wanted and not loss.requires_grad else nullcontext():
            loss.backward()  # type: ignore[no-untyped-call]
    if not diagnosis.report.logged:
        raise CheckError("GradWatch failed, and the pass was not diagnosed")
    return diagnosis.report


def _scalar(given: Any) -> Tensor:
    """Return the loss in what a closure or a training step gave."""
    loss = given.get("loss") if isinstance(given, dict) else given
    if not isinstance(loss, Tensor):
        found = "a dict without `loss`" if isinstance(given, dict) else f"`{_kind(given)}`"
        raise _wrong(f"the loss is {found}, expected a tensor of one number")
    if loss.numel() != 1:
        raise _wrong(
            f"the loss has the shape {tuple(loss.shape)}, expected one number",
            help="reduce it with `.mean()` or `.sum()`",
        )
    return loss


# --- errors of the user's own code ---------------------------------------------------------------------


@contextmanager
def _theirs(doing: str) -> Iterator[None]:
    """Show an error of the user's own code as Python does, with the frames of that code alone."""
    try:
        yield
    except CheckError:
        raise
    except SystemExit as end:
        raise _wrong(
            f"{doing} ended the process ({end.code!r})",
            help='keep what a script does under `if __name__ == "__main__":`',
        ) from None
    except Exception as error:  # noqa: BLE001 -- it may be any: it is shown
        text = _shown(error)
        advice = "".join(f"\n  = help: {a}" for words, a in _ADVICE.items() if words in str(error))
        raise CheckError(f"{doing} raised an error\n{text}{advice}") from None


_ADVICE = {
    "is not attached to a `Trainer`": "return `(model, closure)`, with a closure that needs no Trainer",
    "backward through the graph a second time": "leave `backward()` to `gradwatch check`, which calls it"
    " on the loss that the closure returns",
}
"""What to do about errors that only come up outside of a training run."""


def _shown(error: Exception) -> str:
    told = traceback.TracebackException.from_exception(error)
    seen: traceback.TracebackException | None = told
    while seen is not None:
        own = [frame for frame in seen.stack if owner_of_file(frame.filename) is Owner.USER]
        seen.stack = traceback.StackSummary.from_list(own)
        seen = seen.__cause__ or seen.__context__
    lines = told.format() if told.stack else told.format_exception_only()
    return "".join(lines).rstrip()
