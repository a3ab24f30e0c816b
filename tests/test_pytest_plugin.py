"""GradWatch in pytest: which tests are checked, and what a finding looks like."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 -- pytest would forget what is first loaded inside of a run within this one

import gradwatch._roots
import gradwatch.pytest_plugin
import gradwatch.testing  # noqa: F401 -- as above

PAGE = (Path(__file__).parents[1] / "docs" / "testing.md").read_text()
INSTALLED = importlib.metadata.entry_points(group="pytest11", name="gradwatch")
# Named by its module beside its entry point, pytest would register the plugin twice, and refuse.
PLUGIN = ("-p", "gradwatch" if INSTALLED else "gradwatch.pytest_plugin")

NET = """
import unittest

import pytest
import torch
from torch import nn

X = torch.ones(2, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def loss(self, x):
        return self(x).mean()

    def forward(self, x):
        return self.head(self.encoder(x))


class Cut(Net):
    def forward(self, x):
        return self.head(self.encoder(x).detach())


"""
DIAGNOSIS = [
    "warning[[]detached[]]: `Cut.encoder.[*]` get no gradient",
    "  --> test_it.py:25 in Cut.forward (module `Cut`)",
    "   |",
    "25 |         return self.head(self.encoder(x).detach())",
    "   |                          ^^^^^^^^^^^^^^^^^^^^^^^^ the result has no history",
    "   |",
    "   = note: no other use of these parameters reaches the loss",
    "   = help: remove `.detach()` to train them, or freeze `Cut.encoder` with `requires_grad_(False)`",
    "   = more: gradwatch explain detached",
]


@pytest.fixture
def run(pytester):
    """Return a function that runs tests below the two models, and returns what pytest says."""

    def run(tests, *arguments, ini=""):
        pytester.makepyfile(test_it=NET + tests)
        pytester.makeini(f"[pytest]\n{ini}")
        return pytester.runpytest_inprocess(
            *PLUGIN, "-p", "no:cacheprovider", "--strict-markers", *arguments
        )

    return run


BOTH = """
def test_healthy():
    Net().loss(X).backward()

def test_sick():
    Cut().loss(X).backward()

def test_without_backward():
    Cut().loss(X)
"""


def test_option(run) -> None:
    """With the option a test that leaves parameters out fails, and the failure is the diagnosis alone."""
    result = run(BOTH, "--gradwatch")

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*_ test_sick _*", *DIAGNOSIS, "==*"], consecutive=True)
    result.stdout.no_fnmatch_line("*Traceback*")


def test_ini(run) -> None:
    """The key of the configuration file does what the option does."""
    run(BOTH, ini="gradwatch = true").assert_outcomes(passed=2, failed=1)


def test_off(run) -> None:
    """Without either, nothing is checked."""
    run(BOTH).assert_outcomes(passed=3)


def test_failing_test(run) -> None:
    """A test that fails keeps its own failure, with the diagnosis in a section below it."""
    result = run(
        """
def test_sick():
    Cut().loss(X).backward()
    assert X.sum() == 7
""",
        "--gradwatch",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *assert *== 7", "*- GradWatch -*", *DIAGNOSIS])


def test_failing_healthy_test(run) -> None:
    """A test that fails and leaves nothing out has no section of ours."""
    result = run("def test_it():\n    Net().loss(X).backward()\n    assert 0\n", "--gradwatch")

    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*GradWatch*")


def test_error_in_backward(run) -> None:
    """An error of the user's shows the user's lines, and none of ours."""
    result = run("def test_it():\n    Net()(X).backward()\n", "--gradwatch")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([">       Net()(X).backward()", "E  *scalar outputs*"])
    result.stdout.no_fnmatch_line("*gradwatch*_trace.py*")


def test_markers(run) -> None:
    """A marker leaves a test out; another one checks it without the option, against a contract."""
    result = run("""
@pytest.mark.no_gradwatch
@pytest.mark.gradwatch
def test_left_out():
    Cut().loss(X).backward()

@pytest.mark.gradwatch
def test_sick():
    Cut().loss(X).backward()

@pytest.mark.gradwatch(contract=[{"parameters": "encoder.*", "gradient": "none"}])
def test_as_meant():
    Cut().loss(X).backward()

@pytest.mark.gradwatch(contract=[{"parameters": "head.*", "gradient": "none", "reason": "later"}])
def test_not_as_meant():
    Net().loss(X).backward()
""")

    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            *DIAGNOSIS,
            "*_ test_not_as_meant _*",
            "warning[[]contract[]]: `Net.head.weight` and `Net.head.bias` are meant to get no *",
        ]
    )


def test_marker_mistakes(run) -> None:
    """A mistake in a marker is one message with the way out."""
    result = run("""
@pytest.mark.gradwatch(contract=[{"parameters": "*", "gradient": "non"}])
def test_value(): ...

@pytest.mark.gradwatch(contrct=[])
def test_name(): ...
""")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ test_value _*",
            "`@pytest.mark.gradwatch(contract=...)`",
            "error[[]config[]]: `gradient` in contract entry 1 cannot be `non`",
            " --> contract[[]0[]].gradient",
            "  = note: it takes `required`, `none`, and `intermittent`",
            "  = help: did you mean `none`?",
            "*_ test_name _*",
            "`@pytest.mark.gradwatch(...)`: it takes `contract=` alone",
        ],
        consecutive=True,
    )


def test_expected_failures(run) -> None:
    """What is found is a failure as any other: of a test that is expected to fail, an expected one."""
    result = run(
        """
@pytest.mark.xfail
def test_fails():
    Cut().loss(X).backward()
    assert 0

@pytest.mark.xfail
def test_fails_by_what_is_found():
    Cut().loss(X).backward()

@pytest.mark.xfail
def test_passes():
    Net().loss(X).backward()

def test_skips():
    Cut().loss(X).backward()
    pytest.skip("late")
""",
        "--gradwatch",
    )

    result.assert_outcomes(xfailed=2, xpassed=1, skipped=1)


def test_unittest(run) -> None:
    """Tests of unittest are checked, and keep their own failures."""
    result = run(
        """
class TestIt(unittest.TestCase):
    def test_healthy(self):
        Net().loss(X).backward()

    def test_sick(self):
        Cut().loss(X).backward()

    def test_sick_and_failing(self):
        Cut().loss(X).backward()
        self.assertEqual(1, 2)
""",
        "--gradwatch",
    )

    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*TestIt.test_sick _*", *DIAGNOSIS, "E  *1 != 2", "*- GradWatch -*", *DIAGNOSIS]
    )


FIXTURE = """
def test_asserted(gradwatch):
    net, cut = Net(), Cut()
    gradwatch.assert_gradients(net, net.loss, X)
    gradwatch.assert_gradients(cut, cut.loss, X)

def test_diagnosed(gradwatch):
    net, cut = Net(), Cut()
    with gradwatch.diagnose(net) as diagnosis:
        net.loss(X).backward()
    assert str(diagnosis).startswith("no problem found: ")
    with gradwatch.diagnose(cut, contract=[{"parameters": "encoder.*", "gradient": "none"}]):
        cut.loss(X).backward()
    with gradwatch.diagnose(cut):
        cut.loss(X).backward()
"""


@pytest.mark.parametrize("option", [(), ("--gradwatch",)], ids=["off", "on"])
def test_fixture(run, option) -> None:
    """The fixture fails a test at its own line, with or without the option, and once."""
    result = run(FIXTURE, *option)

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            ">       gradwatch.assert_gradients(cut, cut.loss, X)",
            "E       AssertionError: warning[[]detached[]]: `encoder.[*]` get no gradient",
            ">       with gradwatch.diagnose(cut):",
            "E       AssertionError: warning[[]detached[]]: `encoder.[*]` get no gradient",
        ]
    )
    result.stdout.no_fnmatch_line("*gradwatch/testing.py*")
    result.stdout.no_fnmatch_line("*- GradWatch -*")


def test_failure_of_ours(run, monkeypatch) -> None:
    """A failure of ours is one log record, and the test passes."""
    monkeypatch.setattr("gradwatch._roots.Roots.findings", lambda *_: 1 / 0)

    run(BOTH, "--gradwatch", "-p", "no:logging").assert_outcomes(passed=3)


def test_light(pytester) -> None:
    """With the plugin there and the option off, pytest loads no torch, and the help names the option."""
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    plain = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", "--strict-markers")
    told = pytester.runpytest_subprocess(*PLUGIN, "--help")

    plain.assert_outcomes(passed=1)
    told.stdout.fnmatch_lines(["*--gradwatch *fail each test in which*"])


def test_entry_point(pytester, monkeypatch) -> None:
    """Installed, the plugin is found by its entry point, and may be named beside it."""
    if not INSTALLED:
        folder = pytester.mkdir("site")
        info = folder / "gradwatch-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradwatch\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[pytest11]\ngradwatch = gradwatch.pytest_plugin\n")
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    pytester.makepyfile("def test_it(gradwatch): ...")
    for arguments in ((), ("-p", "gradwatch")):
        result = pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider")
        result.assert_outcomes(passed=1)


def test_page(pytester, monkeypatch) -> None:
    """The page on testing is true: its files run, and pytest says what it shows."""
    monkeypatch.setattr(sys, "path", [str(pytester.path), *sys.path])
    for name, code in re.findall(
        r"^```python\n(# (?:test_\w+).py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    ):
        pytester.path.joinpath(name.removeprefix("# ")).write_text(f"{name}\n{code}")
    shown = re.findall(
        r"^\$ pytest ([^\n]*)\n```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    for arguments, text in shown:
        result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", *arguments.split())
        result.assert_outcomes(failed=1)
        assert text in f"{result.stdout}\n"
    others = pytester.runpytest_inprocess(
        *PLUGIN, "-p", "no:cacheprovider", "test_price.py", "test_marked.py", "test_fixture.py"
    )

    others.assert_outcomes(passed=4)
    assert len(shown) == 2
