"""From YAML to a checked ``Config``; every mistake of a file at once, each at its line and column.

This room alone knows what a configuration file looks like, and where in it each value stands. What rules
mean is known in ``rules``. Where the text is no YAML at all, the parser stops at the first mistake, and
only that one is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gradwatch._words import listed
from gradwatch.errors import ConfigError
from gradwatch.explain import did_you_mean
from gradwatch.report import Status
from gradwatch.rules import (
    Condition,
    ContractEntry,
    Globs,
    Rule,
    Steps,
    condition_problem,
    matches,
)

_Loc = tuple[int | str, ...]


def _word_or_globs(value: object) -> object:
    globs = (value,) if isinstance(value, str) else value
    if isinstance(globs, list | tuple) and all(isinstance(glob, str) and glob for glob in globs):
        return value
    raise PydanticCustomError("scalars_type", "expected a word or globs")


def _share(value: object) -> object:
    """Return a share of the whole as a number: `1%` and 0.01 are the same."""
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", value) if isinstance(value, str) else None
    )
    if found:
        return float(found[1]) / 100
    if isinstance(value, bool | str):
        raise PydanticCustomError("share_type", "expected a share, such as 1%")
    return value


Budget = Annotated[
    float, BeforeValidator(_share, json_schema_input_type=str | float), Field(gt=0, lt=1)
]
"""A share of the whole: ``1%``, or 0.01. A plain 1 is refused: it may be meant as either."""


class LogConfig(BaseModel):
    """How often norms are measured, and where reports go besides the logger."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    every_n_steps: Steps | None = Field(
        default=None,
        description="Steps between two measurements of norms; null: the trainer's own number.",
    )
    jsonl: str | None = Field(
        default=None, description="File that gets every report as one JSON line."
    )


class WatchConfig(BaseModel):
    """Which parameters are watched."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    include: Globs = Field(
        default=("*",), min_length=1, description="Globs over parameter names to watch."
    )
    exclude: Globs = Field(default=(), description="Globs over parameter names to leave out again.")

    def holds(self, name: str, aliases: Collection[str] = ()) -> bool:
        """Tell whether a parameter is watched, by its name or one of its aliases.

        Args:
            name: The parameter's name.
            aliases: Its other names, when it is tied.

        Example:
            >>> WatchConfig(exclude="teacher.*").holds("teacher.weight")
            False
        """
        return matches(self.include, name, aliases) and not matches(self.exclude, name, aliases)

    def unmatched(self, names: Mapping[str, Collection[str]]) -> list[str]:
        """Return the globs that match no parameter.

        Args:
            names: Every parameter's name, with its aliases; of a model without any, nothing is said.

        Example:
            >>> WatchConfig(exclude="tutor.*").unmatched({"teacher.weight": ()})
            ['tutor.*']
        """
        return [
            glob
            for glob in dict.fromkeys((*self.include, *self.exclude) if names else ())
            if not any(matches((glob,), name, aliases) for name, aliases in names.items())
        ]


class TensorBoardConfig(BaseModel):
    """What is written for TensorBoard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prefix: str = Field(
        default="gradwatch", pattern=r"^[^/](.*[^/])?$", description="First part of every tag."
    )
    scalars: Annotated[
        Literal["auto", "always", "never"] | Globs,
        BeforeValidator(_word_or_globs, json_schema_input_type=str | list[str]),
    ] = Field(
        default="auto",
        description="Parameters with scalars of their own: auto (up to 100), always, never, or globs.",
    )


# Plain values, which `--print_config` of a command line can write; they are checked like any others.
_RULES: Any = (
    {"name": "disconnected", "when": {"status": "missing", "for_steps": 10}},
    {"name": "exploding", "when": {"norm_above": 1e3, "for_steps": 3}},
    {"name": "vanishing", "when": {"norm_below": 1e-8, "for_steps": 100}, "action": "log"},
    {"name": "nonfinite", "when": {"status": "nonfinite", "for_steps": 2}},
)


class Config(BaseModel):
    """Everything that can be set; without arguments, what holds when there is no file.

    A section left out, or given without content, keeps its defaults.

    Example:
        >>> config = Config()
        >>> [rule.name for rule in config.rules]
        ['disconnected', 'exploding', 'vanishing', 'nonfinite']
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    log: LogConfig = Field(default=LogConfig(), description="How often norms are measured.")
    watch: WatchConfig = Field(default=WatchConfig(), description="Which parameters are watched.")
    contract: tuple[ContractEntry, ...] = Field(
        default=(),
        description="What is meant, by glob; the first match wins, all else needs a gradient.",
    )
    rules: tuple[Rule, ...] = Field(
        default=_RULES,
        validate_default=True,
        description="When to speak up or stop; a list replaces the default rules.",
    )
    trace: Literal["auto", "never"] = Field(
        default="auto",
        description="Whether the causes of missing gradients are looked for: auto or never.",
    )
    tensorboard: TensorBoardConfig = Field(
        default=TensorBoardConfig(), description="What is written for TensorBoard."
    )
    budget: Budget | None = Field(
        default=None,
        description="Share of the time that watching may take, such as 1%; above it norms are measured "
        "less often. Null: no limit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty_sections(cls, data: object) -> object:
        if isinstance(data, Mapping):
            return {
                key: value
                for key, value in data.items()
                if value is not None or key not in cls.model_fields
            }
        return data

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError("names", "two rules are named `{name}`", {"name": name})
        return self

    def with_overrides(
        self,
        *,
        every_n_steps: int | None = None,
        for_steps: int | None = None,
        action: str | None = None,
    ) -> Config:
        """Return the configuration with what was given in code in place of what it says.

        Args:
            every_n_steps: Steps between two measurements of norms.
            for_steps: Steps without a gradient after which rules over ``missing`` fire; one such rule
                is added where there is none.
            action: What these rules do.

        Raises:
            ConfigError: A value cannot be used.

        Example:
            >>> Config().with_overrides(for_steps=1, action="abort").rules[0].action
            <Action.ABORT: 'abort'>
        """
        data = self.model_dump(mode="json")
        if every_n_steps is not None:
            data["log"]["every_n_steps"] = every_n_steps
        rules = [rule for rule in data["rules"] if rule["when"]["status"] == Status.MISSING.value]
        if not rules and not (for_steps is None and action is None):
            rules = [{"name": "disconnected", "when": {"status": Status.MISSING.value}}]
            data["rules"] += rules
        for rule in rules:
            if for_steps is not None:
                rule["when"]["for_steps"] = for_steps
            if action is not None:
                rule["action"] = action
        return _checked(data, _Source())


def load_config(source: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
    """Return the configuration that a file, a mapping, or nothing at all stands for.

    Args:
        source: Path of a YAML file, or a mapping with the same keys; a text that begins with ``{`` is
            YAML itself, as command lines pass it. None gives the defaults.

    Raises:
        ConfigError: Something in it cannot be used; the message shows every mistake with its place.

    Example:
        >>> load_config({"log": {"every_n_steps": 5}}).log.every_n_steps
        5
    """
    if source is None or isinstance(source, Config):
        return source or _defaults()
    if isinstance(source, Mapping):
        # What can be read only once is looked at twice: for values, and for what is between them.
        data = {k: list(v) if isinstance(v, Iterator) else v for k, v in source.items()}
        return _checked(data, _Source())
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parsed("<text>", source)
    path: Any = source
    with suppress(TypeError):
        path = os.fspath(source)
    if not isinstance(path, str):
        found = type(source).__name__
        mistake = _Mistake(f"a configuration is a path or a mapping, found `{found}`")
        raise ConfigError(str(mistake))
    return _parsed(path, _read(path))


@cache
def _defaults() -> Config:
    return Config()  # frozen, and a tenth of a millisecond to build


@dataclass(frozen=True)
class _Mistake:
    headline: str
    notes: tuple[str, ...] = ()
    advice: str | None = None
    place: str = ""
    span: tuple[int, int, int] | None = None
    """Line, first column, and the column behind the last, from 0."""
    source: str = ""

    def __str__(self) -> str:
        margin = " " * len(str(self.span[0] + 1 if self.span else 1))
        lines = [f"error[config]: {self.headline}"]
        if self.span is not None:
            line, start, end = self.span
            indent = re.sub(r"[^\t]", " ", self.source[:start])
            lines += [f"{margin}--> {self.place}:{line + 1}:{start + 1}", f"{margin} |"]
            lines += [f"{line + 1} | {self.source}", f"{margin} | {indent}{'^' * (end - start)}"]
            lines += [f"{margin} |"] if self.notes or self.advice else []
        elif self.place:
            lines += [f"{margin}--> {self.place}"]
        lines += [f"{margin} = note: {note}" for note in self.notes]
        lines += [f"{margin} = help: {self.advice}"] if self.advice else []
        # What a terminal would act on, or not show at all, keeps its column and nothing else.
        return re.sub(r"[^\n\t -~\xa0-\U0010ffff]", "\ufffd", "\n".join(lines))


class _Loader(yaml.SafeLoader):
    """YAML without dates: no key takes one, and an impossible one would end in a ``ValueError``."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- as its base declares it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Source:
    """Where each value stands: in a text, by its node tree, or in a mapping, by its dotted path."""

    def __init__(self, path: str = "", text: str = "") -> None:
        self.path = path
        self.lines = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text)
        self.root: yaml.Node | None = None
        self.mistakes: list[_Mistake] = []
        self._built: dict[int, object] = {}

    def at(
        self, where: _Loc | yaml.Node, headline: str, *notes: str, advice: str | None = None
    ) -> _Mistake:
        """Return a mistake at a value's path, or at a node."""
        node = self.node(where) if isinstance(where, tuple) else where
        if node is None:
            return _Mistake(headline, notes, advice, _dotted(cast("_Loc", where)))
        start, end = node.start_mark, node.end_mark
        last = end.column if end.line == start.line else len(self.lines[start.line].rstrip())
        return self.marked(start.line, start.column, headline, *notes, advice=advice, end=last)

    def marked(
        self, line: int, column: int, headline: str, *notes: str, advice: str | None, end: int = 0
    ) -> _Mistake:
        """Return a mistake at a line and column, from 0."""
        span = line, column, max(end, column + 1)
        return _Mistake(headline, notes, advice, self.path, span, self.lines[line])

    def node(self, loc: _Loc, *, key: bool = False) -> yaml.Node | None:
        """Return the node of a value or its key; for what is not there, what it would stand in."""
        node = name = self.root
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                for key_node, value in node.value:
                    if key_node.value == part:
                        name, node = key_node, value
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                name = node = node.value[part]
        empty = node is not None and node.start_mark.index == node.end_mark.index
        return name if key or empty else node

    def build(self, loader: _Loader, node: yaml.Node) -> object:
        """Return the plain value of a node, and note keys that stand there twice."""
        if not isinstance(node, yaml.CollectionNode):
            return loader.construct_object(node)
        if id(node) not in self._built:
            self._built[id(node)] = None  # what an alias within itself stands for
            if isinstance(node, yaml.MappingNode):
                self._note_keys(node)
                loader.flatten_mapping(node)
                # Keys are taken as written: YAML itself would read `on` as true.
                pairs = [(key.value, value) for key, value in node.value if _is_word(key)]
                self._built[id(node)] = {key: self.build(loader, value) for key, value in pairs}
            else:
                self._built[id(node)] = [self.build(loader, item) for item in node.value]
        return self._built[id(node)]

    def _note_keys(self, node: yaml.MappingNode) -> None:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not _is_word(key):
                self.mistakes.append(self.at(key, "a key is a list or a mapping, expected a word"))
            elif key.value in first:
                mark = first[key.value].start_mark
                note = f"the first stands at line {mark.line + 1}, column {mark.column + 1}"
                self.mistakes.append(self.at(key, f"duplicate key `{key.value}`", note))
            else:
                first[key.value] = key


def _is_word(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode)


def _read(path: str) -> str:
    """Return the text of a file, or say why there is none."""
    if not path:
        raise ConfigError(str(_Mistake("the path of the file is empty")))
    file = Path(path)
    try:
        file = file.expanduser()
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        mistake = _Mistake(f"no file `{path}`", *_neighbours(file))
    except IsADirectoryError:
        mistake = _Mistake(f"`{path}` is a folder, expected a YAML file")
    except UnicodeDecodeError as error:
        note = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        mistake = _Mistake(f"`{path}` is not a text in UTF-8", (note,))
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, or no home for `~`
        mistake = _Mistake(f"`{path}` cannot be read", (getattr(error, "strerror", str(error)),))
    raise ConfigError(str(mistake))


def _neighbours(file: Path) -> tuple[tuple[str, ...], str | None]:
    """Say where a file was looked for, and what has a name like it there."""
    folder = file.parent.absolute()
    if not folder.is_dir():
        return (f"the folder `{folder}` does not exist",), None
    names: list[str] = []
    with suppress(OSError):  # a folder may be entered, and yet not listed
        names = sorted(entry.name for entry in folder.iterdir())
    similar = did_you_mean(file.name, names)
    return (f"looked in `{folder}`",), _question(str(file.with_name(similar)) if similar else None)


def _parsed(path: str, text: str) -> Config:
    source = _Source(path, text)
    try:
        loader = _Loader(text)
        source.root = root = loader.get_single_node()
        data = source.build(loader, root) if root is not None else None
    except yaml.reader.ReaderError as error:
        before = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text[: error.position])
        headline = f"the character U+{error.character:04X} cannot stand in YAML"
        mistake = source.marked(len(before) - 1, len(before[-1]), headline, advice=None)
    except yaml.MarkedYAMLError as error:
        mistake = _not_yaml(source, error)
    except (ValueError, RecursionError) as error:
        kind = "is nested too deeply" if isinstance(error, RecursionError) else "holds a bad value"
        mistake = _Mistake(f"`{path}` {kind}", (str(error),))
    else:
        if data is None or isinstance(data, dict):
            return _checked(data or {}, source)
        headline = f"the top of the file is {_found(data)}, expected a mapping"
        mistake = source.at((), headline, _takes(Config))
    raise ConfigError(str(mistake))


def _not_yaml(source: _Source, error: yaml.MarkedYAMLError) -> _Mistake:
    """Put the parser's complaint into words that name the usual slips."""
    mark = error.problem_mark or error.context_mark
    for candidate in (error.context_mark, error.problem_mark):
        if candidate and source.lines[candidate.line].startswith("*", candidate.column):
            rest = source.lines[candidate.line][candidate.column :]
            word = re.split(r"[\s,\]}]", rest)[0]
            note = "unquoted, `*` refers to an anchor, and there is none of this name"
            end = candidate.column + len(word)
            headline, advice = f"unquoted `{word}`", f'put it in quotes: "{word}"'
            return source.marked(
                candidate.line, candidate.column, headline, note, advice=advice, end=end
            )
    line, column = (mark.line, mark.column) if mark else (0, 0)
    text = source.lines[line]
    indent = text[: len(text) - len(text.lstrip())]
    if "\t" in indent:
        headline = "a tab indents this line, and YAML takes spaces alone"
        return source.marked(line, indent.index("\t"), headline, advice="write spaces for the tab")
    if error.context == "expected a single document in the stream":
        headline, advice = "a second document starts here", "keep one, and remove the `---`"
        return source.marked(line, column, headline, advice=advice, end=column + 3)
    notes = (f"{error.context}, line {error.context_mark.line + 1}",) if error.context_mark else ()
    return source.marked(line, column, f"not YAML: {error.problem}", *notes, advice=None)


def _checked(data: dict[str, Any], source: _Source) -> Config:
    """Return the configuration, or raise one error for all of its mistakes."""
    mistakes = [*source.mistakes, *_across(data, source)]
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        # `_across` found what is wrong between values already, with its place.
        found = (entry for entry in error.errors() if entry["type"] not in {"condition", "names"})
        mistakes += [_explained(entry, data, source) for entry in found]
    else:
        if not mistakes:
            return config
    mistakes.sort(key=lambda mistake: mistake.span or (0, 0, 0))
    raise ConfigError("\n\n".join(map(str, mistakes))) from None


def _across(data: Mapping[str, Any], source: _Source) -> Iterator[_Mistake]:
    """Find what is wrong between values, also where a single value is wrong too."""
    rules = data.get("rules")
    first: dict[str, int] = {}
    for index, rule in enumerate(rules if isinstance(rules, Collection) else ()):
        name, when = _get(rule, "name"), _get(rule, "when")
        if isinstance(name, str) and first.setdefault(name, index) != index:
            note = f"the first is rule {first[name] + 1}, this one is rule {index + 1}"
            yield source.at(("rules", index, "name"), f"two rules are named `{name}`", note)
        if isinstance(when, Mapping):
            given = [key for key, value in when.items() if value is not None]
            unknown = when.keys() - Condition.model_fields.keys()
            problem = condition_problem(given)
            if problem and not (unknown and "no condition" in problem):
                headline = f"`when`{_within(('rules', index), data)} {problem}"
                note = "it takes one of `norm_above`, `norm_below`, and `status`"
                yield source.at(("rules", index, "when"), headline, note)
    contract = data.get("contract")
    for index, entry in enumerate(contract if isinstance(contract, Collection) else ()):
        gradient, within = _get(entry, "gradient"), _get(entry, "within")
        is_set = isinstance(within, int) and within != ContractEntry.model_fields["within"].default
        if is_set and gradient in ("required", "none"):
            headline = f"`within`{_within(('contract', index), data)} changes nothing"
            note = f"it belongs to `gradient: intermittent`, and this is `gradient: {gradient}`"
            yield source.at(("contract", index, "within"), headline, note)


def _get(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


_EXPECTED = {
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a share of the time, such as 1%",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "number_type": "a number",
    "scalars_type": "`auto`, `always`, `never`, or globs",
    "share_type": "a share of the time, such as 1%",
    "string_pattern_mismatch": "text without `/` at its ends",
    "string_too_short": "at least one character",
    "string_type": "text",
    "too_short": "at least one glob",
    "tuple_type": "a list",
}


def _explained(error: Any, data: Mapping[str, Any], source: _Source) -> _Mistake:
    """Put one error of pydantic into our words, at its place."""
    loc, kind = error["loc"], error["type"]
    model = _model_at(loc[:-1])
    within = _within(loc[:-1], data)
    if kind in {"extra_forbidden", "invalid_key"}:
        advice = _question(did_you_mean(str(loc[-1]), sorted(model.model_fields)))
        where = source.node(loc, key=True) or loc
        return source.at(where, f"unknown key `{loc[-1]}`{within}", _takes(model), advice=advice)
    if kind == "missing":
        where = source.node(loc[:-1]) or loc
        return source.at(where, f"key `{loc[-1]}` is missing{within}", _takes(model))
    found, notes = _found(error["input"]), _misread(source.node(loc))
    if kind == "literal_error":
        words = [
            str(word)
            for word in _parts(model.model_fields[loc[-1]].annotation)
            if isinstance(word, str)
        ]
        advice = _question(did_you_mean(str(error["input"]), words))
        headline = f"`{loc[-1]}`{within} cannot be {found}"
        return source.at(loc, headline, *notes, f"it takes {listed(words, None)}", advice=advice)
    expected = _EXPECTED.get(kind, error["msg"]).format(**error.get("ctx", {}))
    if kind.startswith(("int_", "float_")):
        expected = "a whole number" if kind.startswith("int_") else "a number"
    return source.at(loc, f"{_subject(loc, data)} is {found}, expected {expected}", *notes)


def _model_at(loc: _Loc) -> type[BaseModel]:
    """Return the model that checks the value at a path."""
    model: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, str):
            parts = list(_parts(model.model_fields[part].annotation))
            model = next(
                (p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), model
            )
    return model


def _parts(annotation: object) -> Iterator[object]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


_NOUNS = {Config: "a configuration", Rule: "a rule", ContractEntry: "a contract entry"}


def _takes(model: type[BaseModel]) -> str:
    section = {Condition: "`when`", LogConfig: "`log`", WatchConfig: "`watch`"}
    noun = (_NOUNS | section).get(model, "`tensorboard`")
    return f"{noun} takes {listed(sorted(model.model_fields), None)}"


def _subject(loc: _Loc, data: Mapping[str, Any]) -> str:
    """Name the value at a path: a key with what it stands in, or an entry of a list."""
    if isinstance(loc[-1], int):
        if loc[:-1] in {("rules",), ("contract",)}:
            return _within(loc, data).removeprefix(" in ")
        loc = loc[:-1]
    return f"`{loc[-1]}`{_within(loc[:-1], data)}"


def _within(loc: _Loc, data: Mapping[str, Any]) -> str:
    """Say what a key stands in, such as `when` of a rule."""
    words = [f"`{part}`" for part in loc if isinstance(part, str)]
    if loc and loc[0] in {"rules", "contract"} and len(loc) > 1:
        noun = "rule" if loc[0] == "rules" else "contract entry"
        name = _get(list(data[str(loc[0])])[int(loc[1])], "name")
        words[0] = f"{noun} `{name}`" if name and noun == "rule" else f"{noun} {int(loc[1]) + 1}"
    return f" in {' of '.join(reversed(words))}" if words else ""


def _found(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or value == "":
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{shorten(str(value), 60, placeholder='...')}`"


def _misread(node: yaml.Node | None) -> tuple[str, ...]:
    """Tell where YAML reads a word as a truth value."""
    if node is None or not node.tag.endswith(":bool") or node.value.lower() in {"true", "false"}:
        return ()
    value = "true" if node.value.lower() in {"on", "yes", "y"} else "false"
    return (f"YAML reads an unquoted `{node.value}` as {value}",)


def _dotted(loc: _Loc) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".")


def _question(word: str | None) -> str | None:
    return f"did you mean `{word}`?" if word else None
