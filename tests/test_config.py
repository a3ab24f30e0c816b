from __future__ import annotations

import json
import os
import re
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from pydantic import BaseModel, ValidationError

from gradwatch.config import Config, LogConfig, TensorBoardConfig, WatchConfig, load_config
from gradwatch.errors import ConfigError
from gradwatch.report import Action, Status


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of our own, so that messages show short paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str | bytes, path: str = "watch.yaml") -> str:
    """Write a file, and return its path."""
    Path(path).write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
    return path


def complaint(source: Any) -> str:
    """Return the whole message of the error that a source ends in."""
    with pytest.raises(ConfigError, match="error\\[config\\]") as caught:
        load_config(source)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def headlines(source: Any) -> list[str]:
    """Return what a source is found guilty of, without the places."""
    return re.findall(r"^error\[config\]: (.*)$", complaint(source), re.MULTILINE)


# ---- the defaults


def test_defaults_stop_nothing():
    """Without a file rules warn, and nothing stops the run."""
    config = Config()

    assert [(rule.name, rule.when.for_steps, rule.action) for rule in config.rules] == [
        ("disconnected", 10, Action.WARN),
        ("exploding", 3, Action.WARN),
        ("vanishing", 100, Action.LOG),
        ("nonfinite", 2, Action.WARN),
    ]
    assert [rule.when.norm_above for rule in config.rules] == [None, 1e3, None, None]
    assert [rule.when.norm_below for rule in config.rules] == [None, None, 1e-8, None]


def test_every_field_is_described():
    """Each field has a description, which the command line and the JSON schema show."""
    missing = [
        (model.__name__, name)
        for model in (Config, LogConfig, WatchConfig, TensorBoardConfig)
        for name, info in model.model_fields.items()
        if not info.description
    ]

    assert missing == []


def test_schema_can_be_printed():
    """The JSON schema is plain JSON, and takes a glob as text or as a list."""
    schema = json.loads(json.dumps(Config.model_json_schema()))

    assert schema["additionalProperties"] is False
    assert [
        kind["type"] for kind in schema["$defs"]["WatchConfig"]["properties"]["include"]["anyOf"]
    ] == [
        "string",
        "array",
    ]


def test_configuration_cannot_be_changed():
    """A configuration is a value."""
    with pytest.raises(ValidationError, match="frozen"):
        Config().trace = "never"  # type: ignore[misc]


def test_configuration_is_made_of_a_mapping():
    """What is no mapping is no configuration."""
    with pytest.raises(ValidationError, match="valid dictionary"):
        Config.model_validate(3)


def test_names_of_rules_are_distinct_in_python_too():
    """Two rules of one name are refused however they are written."""
    rule = Config().rules[0]

    with pytest.raises(ValidationError, match="two rules are named `disconnected`"):
        Config(rules=(rule, rule))
    assert headlines({"rules": [rule, rule]}) == ["two rules are named `disconnected`"]


# ---- what loads


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "{}\n", "log:\nrules:\nwatch: ~\n"]
)
def test_empty_file_gives_the_defaults(text: str):
    """A file, or a section, without content keeps the defaults."""
    assert load_config(write(text)) == Config()


def test_sections_left_out_keep_their_defaults():
    """What is given replaces its default, and nothing else."""
    config = load_config(write("log: {every_n_steps: 5}\nrules: []\n"))

    assert config == Config(log=LogConfig(every_n_steps=5), rules=())


def test_nothing_a_config_and_a_mapping_load():
    """No source gives the defaults, a configuration itself, and a mapping what a file would."""
    config = Config(trace="never")

    assert load_config(None) == Config()
    assert load_config(config) is config
    assert load_config(MappingProxyType({"trace": "never"})) == config
    assert load_config(Path(write("trace: never\n"))) == config


def test_text_of_a_command_line_loads():
    """A text that begins with a brace is YAML itself."""
    assert load_config("{trace: never, rules: []}") == Config(trace="never", rules=())


def test_globs_and_words_load():
    """One glob may stand in place of a list, and a word in place of globs."""
    texts = ["auto", "never", "'*.weight'", "['a.*', b]"]

    loaded = [load_config("{tensorboard: {scalars: %s}}" % text) for text in texts]  # noqa: UP031

    assert [config.tensorboard.scalars for config in loaded] == [
        "auto", "never", ("*.weight",), ("a.*", "b"),
    ]  # fmt: skip


def test_numbers_of_yaml_load():
    """A number that PyYAML takes for text is a number."""
    config = load_config("{rules: [{name: small, when: {norm_below: 1e-8}}]}")

    assert config.rules[0].when.norm_below == 1e-8


def test_byte_order_mark_and_windows_lines_load():
    """A file from an editor on Windows is a file like any other."""
    path = write(b"\xef\xbb\xbflog:\r\n  every_n_steps: 7\r\ntrace: never\r\n")

    assert load_config(path) == Config(log=LogConfig(every_n_steps=7), trace="never")


def test_anchors_and_merge_keys_load():
    """A rule may be written as another with some keys changed."""
    path = write("""
        rules:
          - &dead {name: dead, when: {status: missing}, action: log}
          - {<<: *dead, name: worse, action: stop}
        """)

    rules = load_config(path).rules

    assert [(rule.name, rule.when.status, rule.action) for rule in rules] == [
        ("dead", Status.MISSING, Action.LOG),
        ("worse", Status.MISSING, Action.STOP),
    ]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """A path may begin with a tilde."""
    monkeypatch.setenv("HOME", str(folder))
    write("trace: never\n")

    assert load_config("~/watch.yaml").trace == "never"


# ---- mistakes, each with its place


def test_unknown_key_is_shown_at_its_place():
    """An unknown key is underlined, with what the section takes and what was probably meant."""
    path = write("""\
        rules:
          - name: exploding
            when: {norm_above: 1e3}
            acton: stop
        """)

    assert complaint(path) == dedent("""\
        error[config]: unknown key `acton` in rule `exploding`
         --> watch.yaml:4:5
          |
        4 |     acton: stop
          |     ^^^^^
          |
          = note: a rule takes `action`, `name`, `parameters`, and `when`
          = help: did you mean `action`?""")


def test_every_mistake_is_in_one_error():
    """All mistakes of a file are reported at once, in their order, the margin as wide as the number."""
    path = write("""\
        logg: 3
        log:
          every_n_steps: true
        trace: atuo





        rules:
          - when: {for_stepz: 2, status: zero}
        """)

    assert complaint(path) == dedent("""\
        error[config]: unknown key `logg`
         --> watch.yaml:1:1
          |
        1 | logg: 3
          | ^^^^
          |
          = note: a configuration takes `budget`, `contract`, `log`, `rules`, `tensorboard`, `trace`, and `watch`
          = help: did you mean `log`?

        error[config]: `every_n_steps` in `log` is true, expected a number
         --> watch.yaml:3:18
          |
        3 |   every_n_steps: true
          |                  ^^^^

        error[config]: `trace` cannot be `atuo`
         --> watch.yaml:4:8
          |
        4 | trace: atuo
          |        ^^^^
          |
          = note: it takes `auto` and `never`
          = help: did you mean `auto`?

        error[config]: key `name` is missing in rule 1
          --> watch.yaml:11:5
           |
        11 |   - when: {for_stepz: 2, status: zero}
           |     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
           |
           = note: a rule takes `action`, `name`, `parameters`, and `when`

        error[config]: unknown key `for_stepz` in `when` of rule 1
          --> watch.yaml:11:12
           |
        11 |   - when: {for_stepz: 2, status: zero}
           |            ^^^^^^^^^
           |
           = note: `when` takes `for_steps`, `norm_above`, `norm_below`, and `status`
           = help: did you mean `for_steps`?""")


def test_mapping_shows_paths():
    """In a mapping the dotted path stands in place of line and column."""
    source = {"rules": [{"name": "x", "when": {"status": "zero", "for_stepz": 2}}]}

    assert complaint(source) == dedent("""\
        error[config]: unknown key `for_stepz` in `when` of rule `x`
         --> rules[0].when.for_stepz
          = note: `when` takes `for_steps`, `norm_above`, `norm_below`, and `status`
          = help: did you mean `for_steps`?""")


def test_what_would_change_nothing_is_a_mistake():
    """``within`` without ``intermittent``, a list that watches nothing, and a whole as a budget are refused."""
    entry = {"parameters": "*", "gradient": "none", "within": 5}
    meant = entry | {"gradient": "intermittent"}

    assert headlines({"contract": [entry]}) == ["`within` in contract entry 1 changes nothing"]
    assert load_config({"contract": [meant]}).contract[0].within == 5
    assert headlines({"watch": {"include": []}}) == [
        "`include` in `watch` is a list, expected at least one glob"
    ]
    for whole in (1, "100%"):
        assert headlines({"budget": whole}) == [
            f"`budget` is `{whole}`, expected a share of the time, such as 1%"
        ]


def test_duplicate_key_shows_both_places():
    """A key that stands twice is shown at the second place, with that of the first."""
    assert complaint(write("log: {}\ntrace: auto\nlog: {jsonl: a}\n")) == dedent("""\
        error[config]: duplicate key `log`
         --> watch.yaml:3:1
          |
        3 | log: {jsonl: a}
          | ^^^
          |
          = note: the first stands at line 1, column 1""")


def test_word_read_as_truth_value_is_explained():
    """Where YAML reads a word as false, the message says so and lists the words."""
    assert complaint("{rules: [{name: x, when: {status: zero}, action: off}]}") == dedent("""\
        error[config]: `action` in rule `x` cannot be false
         --> <text>:1:50
          |
        1 | {rules: [{name: x, when: {status: zero}, action: off}]}
          |                                                  ^^^
          |
          = note: YAML reads an unquoted `off` as false
          = note: it takes `log`, `warn`, `stop`, and `abort`""")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log: [1]", "`log` is a list, expected a mapping"),
        ("rules: {}", "`rules` is a mapping, expected a list"),
        ("rules: [3]", "rule 1 is `3`, expected a mapping"),
        ("contract: [x]", "contract entry 1 is `x`, expected a mapping"),
        ("contract: [{parameters: x, gradient: nine}]", "`gradient` in contract entry 1 cannot be `nine`"),
        ("contract: [{parameters: [], gradient: none}]",
         "`parameters` in contract entry 1 is a list, expected at least one glob"),
        ("contract: [{parameters: x, gradient: none, within: 2.5}]",
         "`within` in contract entry 1 is `2.5`, expected a whole number"),
        ("watch: {include: [a, 3]}", "`include` in `watch` is `3`, expected text"),
        ("watch: {include: }", "`include` in `watch` is empty, expected a list"),
        ("watch: {exclude: ''}", "`exclude` in `watch` is empty, expected at least one character"),
        ("log: {every_n_steps: ten}", "`every_n_steps` in `log` is `ten`, expected a whole number"),
        ("log: {every_n_steps: 0}", "`every_n_steps` in `log` is `0`, expected at least 1"),
        ("log: {jsonl: 3}", "`jsonl` in `log` is `3`, expected text"),
        ("log: {jsonl: yes}", "`jsonl` in `log` is true, expected text"),
        ("log: 2024-13-45", "`log` is `2024-13-45`, expected a mapping"),
        ("on: 3", "unknown key `on`"),
        ("rulez:", "unknown key `rulez`"),
        ("trace: never\n? [a]\n: 3", "a key is a list or a mapping, expected a word"),
        ("tensorboard: {prefix: a/}", "`prefix` in `tensorboard` is `a/`, expected text without `/` at its ends"),
        ("tensorboard: {prefix: ''}", "`prefix` in `tensorboard` is empty, expected text without `/` at its ends"),
        ("tensorboard: {scalars: [3]}",
         "`scalars` in `tensorboard` is a list, expected `auto`, `always`, `never`, or globs"),
        ("tensorboard: {tag: x}", "unknown key `tag` in `tensorboard`"),
    ],
)  # fmt: skip
def test_wrong_value_says_what_was_expected(text: str, expected: str):
    """A value that cannot be used is echoed, with what was expected."""
    assert headlines(write(text)) == [expected]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("{}", "`when` in rule `x` holds no condition"),
        ("{for_steps: 2}", "`when` in rule `x` holds no condition"),
        ("{status: zero, norm_above: 1}",
         "`when` in rule `x` holds two conditions, `status` and `norm_above`"),
        ("{status: zeroo}", "`status` in `when` of rule `x` cannot be `zeroo`"),
        ("{norm_above: -1}", "`norm_above` in `when` of rule `x` is `-1`, expected at least 0"),
        ("{norm_above: .inf}", "`norm_above` in `when` of rule `x` is `inf`, expected a finite number"),
        ("{norm_above: .nan}", "`norm_above` in `when` of rule `x` is `nan`, expected at least 0"),
        ("{norm_above: much}", "`norm_above` in `when` of rule `x` is `much`, expected a number"),
        ("{status: zero, for_steps: 0}", "`for_steps` in `when` of rule `x` is `0`, expected at least 1"),
        ("{norm_abov: 1}", "unknown key `norm_abov` in `when` of rule `x`"),
        ("3", "`when` in rule `x` is `3`, expected a mapping"),
    ],
)  # fmt: skip
def test_wrong_condition_is_one_mistake(when: str, expected: str):
    """A condition that cannot be used is one mistake, in the words of its rule."""
    assert headlines("{rules: [{name: x, when: %s}]}" % when) == [expected]  # noqa: UP031


def test_two_rules_of_one_name_are_found_beside_other_mistakes():
    """A name that stands twice is reported though a rule is wrong otherwise too."""
    path = write("""
        rules:
          - {name: x, when: {status: zero}}
          - {name: x, when: {status: zero, norm_below: 1}, action: shout}
        """)

    assert headlines(path) == [
        "two rules are named `x`",
        "`when` in rule `x` holds two conditions, `status` and `norm_below`",
        "`action` in rule `x` cannot be `shout`",
    ]


def test_rules_may_come_from_an_iterator():
    """Rules that can be read only once are checked all the same."""
    rule = {"name": "x", "when": {"status": "zero"}}

    assert load_config({"rules": iter([rule])}) == load_config({"rules": [rule]})
    assert headlines({"rules": iter([rule, rule])}) == ["two rules are named `x`"]


def test_empty_value_is_shown_at_its_key():
    """A key without a value is underlined itself."""
    text = complaint(write("rules:\n  - name: x\n    when: {status: zero}\n    action:\n"))

    assert text.splitlines()[:5] == [
        "error[config]: `action` in rule `x` cannot be empty",
        " --> watch.yaml:4:5",
        "  |",
        "4 |     action:",
        "  |     ^^^^^^",
    ]


def test_mistake_in_an_anchor_is_shown_there():
    """A value that was merged in is shown where it is written."""
    path = write("""\
        rules:
          - &a {name: a, when: {status: zero}, action: shout}
          - {<<: *a, name: b}
        """)

    assert re.findall(r"--> (.*)", complaint(path)) == ["watch.yaml:2:48"] * 2


def test_keys_of_a_mapping_are_text():
    """A key that is no text is an unknown key."""
    assert headlines({1: 2, "log": {2: 3}}) == ["unknown key `2` in `log`", "unknown key `1`"]


def test_terminal_codes_are_not_repeated():
    """What a terminal would act on is not shown."""
    text = complaint(write("lug: \x07\n"))

    assert "\x07" not in text
    assert "U+0007 cannot stand in YAML" in text
    assert " --> watch.yaml:1:6\n" in text


def test_terminal_codes_in_keys_are_not_repeated():
    """An escaped character that a terminal would act on is not shown either."""
    assert headlines(write(r'"\e[31m": 3')) == ["unknown key `\ufffd[31m`"]


def test_long_values_are_cut():
    """A value is echoed up to a sensible length."""
    assert len(headlines({"trace": "x " * 200})[0]) < 100


# ---- files that are no YAML


@pytest.mark.parametrize("glob", ["*", "*.weight", "*head", "**"])
def test_unquoted_star_says_to_quote_it(glob: str):
    """A glob that begins with a star needs quotes, and the message shows it with them."""
    assert complaint(write(f"watch: {{include: {glob}}}")) == dedent(f"""\
        error[config]: unquoted `{glob}`
         --> watch.yaml:1:18
          |
        1 | watch: {{include: {glob}}}
          |                  {"^" * len(glob)}
          |
          = note: unquoted, `*` refers to an anchor, and there is none of this name
          = help: put it in quotes: "{glob}\"""")


@pytest.mark.parametrize(
    ("text", "expected", "place"),
    [
        ("log:\n\tjsonl: a\n", "a tab indents this line, and YAML takes spaces alone", "2:1"),
        (
            "log:\n  jsonl: a\n \tb: 2\n",
            "a tab indents this line, and YAML takes spaces alone",
            "3:2",
        ),
        ("log: {}\n---\nlog: {}\n", "a second document starts here", "2:1"),
        ("log: [1\n", "not YAML: expected ',' or ']', but got '<stream end>'", "2:1"),
        ("log: !odd x\n", "not YAML: could not determine a constructor for the tag '!odd'", "1:6"),
        ("log: %x\n", "not YAML: found character '%' that cannot start any token", "1:6"),
        (
            "<<: 3\n",
            "not YAML: expected a mapping or list of mappings for merging, but found scalar",
            "1:5",
        ),
        ("- a\n", "the top of the file is a list, expected a mapping", "1:1"),
        ("word\n", "the top of the file is `word`, expected a mapping", "1:1"),
    ],
)
def test_no_yaml_is_shown_at_its_place(text: str, expected: str, place: str):
    """Where the parser gives up, its place is shown, and the usual slips are named."""
    message = complaint(write(text.encode()))

    assert headlines("watch.yaml") == [expected]
    assert message.splitlines()[1].strip() == f"--> watch.yaml:{place}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xff\xfel\x00", "`watch.yaml` is not a text in UTF-8\n  = note: byte 0 is 0xff"),
        (b"log: !!int x\n", "`watch.yaml` holds a bad value\n  = note: invalid literal"),
        (b"[" * 3000, "`watch.yaml` is nested too deeply\n  = note: maximum recursion"),
    ],
)
def test_file_that_cannot_be_used_as_a_whole(text: bytes, expected: str):
    """A file without a place to show is named with what was found."""
    assert complaint(write(text)).startswith(f"error[config]: {expected}")


def test_alias_within_itself_ends():
    """A value that holds itself is refused like any other wrong value."""
    assert headlines(write("rules: &a [*a]\n")) == ["rule 1 is empty, expected a mapping"]


# ---- files that are not there


def test_missing_file_suggests_its_neighbour(folder: Path):
    """A file that is not there is said with the folder and a name like it."""
    write("", "strict.yaml")

    assert complaint("strct.yaml") == dedent(f"""\
        error[config]: no file `strct.yaml`
          = note: looked in `{folder}`
          = help: did you mean `strict.yaml`?""")


def test_missing_folder_is_said(folder: Path):
    """A folder that is not there is said."""
    assert complaint("none/strict.yaml") == dedent(f"""\
        error[config]: no file `none/strict.yaml`
          = note: the folder `{folder / "none"}` does not exist""")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (".", "`.` is a folder, expected a YAML file"),
        ("watch.yaml/more", "`watch.yaml/more` cannot be read"),
        ("a\0b", "`a\ufffdb` cannot be read"),
        ("unlike", "no file `unlike`"),
        (3, "a configuration is a path or a mapping, found `int`"),
        (["a"], "a configuration is a path or a mapping, found `list`"),
    ],
)
def test_source_that_is_no_file(source: object, expected: str):
    """What is no file is named with what it is."""
    write("")

    assert headlines(source) == [expected]


def test_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch):
    """A file without permission is said with the system's reason."""
    write("")
    denied = PermissionError(13, os.strerror(13))
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(denied))

    assert complaint("watch.yaml") == dedent("""\
        error[config]: `watch.yaml` cannot be read
          = note: Permission denied""")


# ---- LightningCLI's parser


class Watching:
    """Stand in for a callback.

    Args:
        config: What to watch.
    """

    def __init__(self, config: Config | str | Path | None = None) -> None:
        self.config = config


def parse(text: str) -> Any:
    """Return the configuration that the command line's parser makes of its own file."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--file", action="config")
    parser.add_class_arguments(Watching, "watching")
    parsed = parser.parse_args(["--file", write(text, "cli.yaml")])
    # jsonargparse renamed the method on the way to its version 5.
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return build(parsed).watching.config


def test_parser_takes_nested_yaml():
    """A configuration within the command line's own file is checked and built."""
    sections = {
        "log": {"every_n_steps": 1},
        "watch": {"exclude": "head.*"},
        "contract": [{"parameters": "teacher.*", "gradient": "none"}],
        "rules": [{"name": "x", "parameters": ["a", "b"], "when": {"norm_below": "1e-8"}, "action": "stop"}],
        "tensorboard": {"scalars": "*.weight"},
    }  # fmt: skip

    assert parse(json.dumps({"watching": {"config": sections}})) == load_config(sections)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("log: {every_n_stepz: 1}", "every_n_stepz"),
        ("rules: [{name: x, when: {status: zero, for_stepz: 2}}]", "for_stepz"),
        ("rules: [{name: x, when: {status: zero}, action: shout}]", "shout"),
    ],
)
def test_parser_rejects_typos(section: str, expected: str):
    """A misspelt key or word in the command line's own file is refused."""
    with pytest.raises(Exception, match=expected):
        parse("watching: {config: {%s}}" % section)  # noqa: UP031


def test_parser_passes_paths_on():
    """A path stays a path, and its mistakes are shown by us."""
    assert parse("watching: {config: strict.yaml}") == "strict.yaml"


def test_parser_prints_a_configuration(capsys: pytest.CaptureFixture[str]):
    """What ``--print_config`` prints can be read again."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--file", action="config")
    parser.add_class_arguments(Watching, "watching")

    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--watching.config.log.every_n_steps=3", "--print_config"])
    printed = capsys.readouterr().out

    assert parse(printed) == Config(log=LogConfig(every_n_steps=3))


def test_parser_shows_descriptions(capsys: pytest.CaptureFixture[str]):
    """The help text holds the description of the fields."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Watching, "watching")

    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--watching.config.help"])

    shown = " ".join(capsys.readouterr().out.split())
    models: list[type[BaseModel]] = [LogConfig, WatchConfig, TensorBoardConfig]
    texts = [info.description for model in models for info in model.model_fields.values()]
    assert [text for text in texts if text and text not in shown] == []
