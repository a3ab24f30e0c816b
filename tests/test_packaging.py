"""What an installed GradWatch brings along, and what its project file promises."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import gradwatch
from gradwatch import Cause

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def normal(name: str) -> str:
    """Return the name of a package as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required_names() -> list[str]:
    """Return every package that the project names, its extras included, but for itself."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    names = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}
    return sorted(names - {"gradwatch"})


def test_version() -> None:
    """``gradwatch.__version__`` is the version of the project file."""
    assert gradwatch.__version__ == PROJECT["version"]


def test_metadata() -> None:
    """The installed metadata tells name, licence, and the oldest Python."""
    metadata = importlib.metadata.metadata("gradwatch")

    assert metadata["Name"] == "gradwatch"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_extras() -> None:
    """The extras are those that the documentation names."""
    extras = importlib.metadata.metadata("gradwatch").get_all("Provides-Extra")

    assert extras is not None
    assert sorted(extras) == ["bench", "cli", "dev", "docs", "examples", "test"]


def test_make_installs_extras_that_exist() -> None:
    """Every extra that the Makefile installs is one of the project's; pip would only warn."""
    makefile = (ROOT / "Makefile").read_text()
    asked = {name for some in re.findall(r'"\.\[([\w,]+)\]"', makefile) for name in some.split(",")}

    assert sorted(asked - {*PROJECT["optional-dependencies"]}) == []
    assert "test" in asked


def test_types_are_shipped() -> None:
    """The package says that it is typed."""
    assert importlib.resources.files("gradwatch").joinpath("py.typed").is_file()


@pytest.mark.parametrize("cause", Cause)
def test_pages_are_shipped(cause: Cause) -> None:
    """The page of every cause comes with the package."""
    assert importlib.resources.files("gradwatch").joinpath("causes", f"{cause}.md").is_file()


def test_entry_point() -> None:
    """The command ``gradwatch`` calls ``gradwatch.cli:main``."""
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="gradwatch")

    assert command.value == "gradwatch.cli:main"
    assert callable(command.load())


def test_pytest_entry_point() -> None:
    """The project file tells pytest of the plugin, and the module is there."""
    assert PROJECT["entry-points"]["pytest11"] == {"gradwatch": "gradwatch.pytest_plugin"}
    assert importlib.util.find_spec("gradwatch.pytest_plugin") is not None


def test_constraints_pin_torch() -> None:
    """The constraints pin torch to a release that every index has, without a local part."""
    assert dict(PINNED)["torch"] == "2.13.0"


def test_constraints_pin_everything() -> None:
    """Each package that the project names has an exact version in the constraints."""
    pinned = {normal(name) for name, _ in PINNED}

    assert [name for name in required_names() if name not in pinned] == []


def test_constraints_pin_once() -> None:
    """No package stands twice in the constraints."""
    names = [normal(name) for name, _ in PINNED]

    assert sorted(set(names)) == sorted(names)
