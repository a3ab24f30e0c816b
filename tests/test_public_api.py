"""What ``import gradwatch`` promises: the names, and how little it loads."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import gradwatch

HEAVY = ("torch", "pytorch_lightning", "lightning", "tensorboard")
READING = ("errors", "report", "explain", "rules", "config", "cli")


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Return which of ``names`` are loaded after ``statement`` ran in a fresh process."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return run.stdout.split()


def test_all_is_sorted() -> None:
    """The public names stand in alphabetical order, each of them once."""
    assert sorted(set(gradwatch.__all__)) == gradwatch.__all__


@pytest.mark.parametrize("name", gradwatch.__all__)
def test_public_names(name: str) -> None:
    """Every public name can be imported, and is called what it is imported as."""
    assert getattr(gradwatch, name).__name__ == name


def test_dir_lists_the_public_names() -> None:
    """``dir()`` lists every public name, so that completion finds what is imported on first use."""
    assert set(gradwatch.__all__) <= set(dir(gradwatch))


def test_star_import() -> None:
    """A star import brings exactly the public names."""
    namespace: dict[str, object] = {}
    exec("from gradwatch import *", namespace)  # noqa: S102

    assert sorted(namespace.keys() - {"__builtins__"}) == gradwatch.__all__


def test_unknown_name() -> None:
    """A name that is not public raises the usual AttributeError."""
    with pytest.raises(AttributeError, match="module 'gradwatch' has no attribute 'GradWatcher'"):
        _ = gradwatch.GradWatcher


def test_same_object_everywhere() -> None:
    """A public name is the same object as in the room it comes from."""
    assert gradwatch.Report is importlib.import_module("gradwatch.report").Report


def test_import_is_light() -> None:
    """``import gradwatch`` loads neither torch nor Lightning nor pydantic."""
    heavy = (*HEAVY, "pydantic", "yaml", "rich", "numpy")

    assert loaded_by("import gradwatch", heavy) == []


@pytest.mark.parametrize("room", READING)
def test_reading_needs_no_torch(room: str) -> None:
    """What reads configurations and reports loads no torch."""
    assert loaded_by(f"import gradwatch.{room}", HEAVY) == []


def test_pytest_starts_light() -> None:
    """The plugin, which pytest loads at every start, loads nothing else of GradWatch, and no torch."""
    rooms = tuple(f"gradwatch.{room}" for room in (*READING, "testing", "_roots"))

    assert loaded_by("import gradwatch.pytest_plugin", (*HEAVY, "pydantic", *rooms)) == []


def test_watching_needs_no_lightning() -> None:
    """``Watcher`` and ``diagnose``, for plain PyTorch, load no Lightning."""
    statement = "from gradwatch import Watcher, diagnose"

    assert loaded_by(statement, ("pytorch_lightning", "lightning")) == []
