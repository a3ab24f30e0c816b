"""GradWatch in pytest: the option ``--gradwatch``, two markers, and the fixture ``gradwatch``.

What this room knows that no other does: which tests are checked, and how a finding becomes a failure in pytest's
own form. What is found is known in ``_roots`` and ``testing``.

pytest imports this at every start, also in projects without torch: nothing else of GradWatch is loaded before a
test asks for it.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from gradwatch.testing import checked_pass

_log = logging.getLogger("gradwatch")
_FOUND = pytest.StashKey[str]()
_MARKERS = (
    "gradwatch(contract=()): check this test also without --gradwatch, against this contract",
    "no_gradwatch: leave this test out of --gradwatch",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the key of the configuration file."""
    text = "fail each test in which a backward pass leaves parameters of a model without a gradient"
    parser.getgroup("gradwatch").addoption("--gradwatch", action="store_true", help=text)
    parser.addini("gradwatch", text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for line in _MARKERS:
        config.addinivalue_line("markers", line)


@pytest.fixture
def gradwatch() -> GradWatchFixture:
    """Check gradients in a test: ``gradwatch.assert_gradients(...)``, ``with gradwatch.diagnose(model):``."""
    return GradWatchFixture()


class GradWatchFixture:
    """What the fixture ``gradwatch`` hands to a test."""

    @staticmethod
    def assert_gradients(*arguments: Any, **options: Any) -> None:
        """Fail unless every parameter gets the gradient that is meant for it: see ``gradwatch.testing``."""
        __tracebackhide__ = True
        importlib.import_module("gradwatch.testing").assert_gradients(*arguments, **options)

    @staticmethod
    def diagnose(model: Any, contract: Any = ()) -> checked_pass:
        """Diagnose the pass inside, and fail as it ends unless every gradient is as meant."""
        __tracebackhide__ = True
        made: checked_pass = importlib.import_module("gradwatch.testing").checked_pass(
            model, contract
        )
        return made


@pytest.hookimpl(wrapper=True, trylast=True)  # the innermost: nothing but the test runs inside
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Watch a test where that is asked for, and fail it for what is found."""
    marker = item.get_closest_marker("gradwatch")
    asked = marker or item.config.getoption("gradwatch") or item.config.getini("gradwatch")
    if not asked or item.get_closest_marker("no_gradwatch"):
        return (yield)
    contract = _contract_of(marker)
    roots = importlib.import_module("gradwatch._roots").Roots()
    roots.start()
    try:
        result = yield
    finally:
        text = item.stash[_FOUND] = _end(roots, contract)
    if text:
        pytest.fail(text, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what was found below the failure of a test that fails by itself."""
    report = yield
    text = item.stash.get(_FOUND, "")
    if call.when == "call" and text and text not in report.longreprtext:
        report.sections.append(("GradWatch", text))
    return report


def _contract_of(marker: pytest.Mark | None) -> Any:
    """Return the entries of the contract that a marker holds, or fail the test for its mistakes."""
    if marker is None:
        return ()
    if marker.args or marker.kwargs.keys() - {"contract"}:
        pytest.fail("`@pytest.mark.gradwatch(...)`: it takes `contract=` alone", pytrace=False)
    testing = importlib.import_module("gradwatch.testing")
    mistake = ""
    try:
        return testing.entries_of(marker.kwargs.get("contract", ()))
    except importlib.import_module("gradwatch.errors").ConfigError as error:
        mistake = str(error)
    # Outside of the clause, or pytest would show the error of ours too.
    pytest.fail(f"`@pytest.mark.gradwatch(contract=...)`\n{mistake}", pytrace=False)


def _end(roots: Any, contract: Any) -> str:
    """Stop to watch, and return what was found; a failure of ours is one log record."""
    try:
        roots.stop()
        return str(roots.findings(contract))
    except Exception as error:  # noqa: BLE001 -- ours, never the user's problem
        _log.warning("GradWatch failed: this test is not checked", exc_info=error)
        return ""
