from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from gradwatch.config import Config, load_config
from gradwatch.report import Action

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
DEFAULT = (FOLDER / "default.yaml").read_text()


def sources(path: Path) -> list[Any]:
    """Return the configurations in a file: itself, or those of its callbacks in a CLI's file."""
    data = yaml.safe_load(path.read_text())
    if "trainer" not in data:
        return [path]
    callbacks = data["trainer"]["callbacks"]
    return [
        callback["init_args"]["config"] for callback in callbacks if "GradWatch" in str(callback)
    ]


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield every key of a model and of the models within it."""
    for name, info in model.model_fields.items():
        yield name
        for inner in parts(info.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner)


def parts(annotation: object) -> Iterator[object]:
    """Yield an annotation and everything within it."""
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_file_loads(path: Path):
    """Every file in ``configs`` is free of mistakes."""
    loaded = [load_config(source) for source in sources(path)]

    assert all(isinstance(config, Config) for config in loaded)
    assert loaded


def test_default_file_equals_no_file():
    """The default file says what holds without any file."""
    assert load_config(FOLDER / "default.yaml") == Config()


@pytest.mark.parametrize("key", sorted(set(keys(Config))))
def test_default_file_explains_every_key(key: str):
    """Each key of the schema stands in the default file, on or right below a comment."""
    lines = DEFAULT.splitlines()
    stands = [number for number, line in enumerate(lines) if re.search(rf"\b{key}:", line)]

    commented = [n for n in stands if "#" in lines[n] or lines[n - 1].lstrip().startswith("#")]

    assert commented


def test_default_file_names_every_action():
    """Each action is explained in the default file."""
    explained = [
        action for action in Action if re.search(rf"^#\s+{action} ", DEFAULT, re.MULTILINE)
    ]

    assert explained == list(Action)


def test_strict_file_aborts_at_the_first_missing_gradient():
    """The strict file ends a run at the first step without a gradient."""
    config = load_config(FOLDER / "strict.yaml")

    rule = config.rules[0]

    assert (rule.name, rule.when.for_steps, rule.action) == ("disconnected", 1, Action.ABORT)
    assert config.log.every_n_steps == 1


def test_quiet_file_stops_nothing():
    """The quiet file holds no rule that ends a run."""
    config = load_config(FOLDER / "quiet.yaml")

    assert {rule.action for rule in config.rules} <= {Action.LOG, Action.WARN}
    assert config.tensorboard.scalars == "never"
