"""The terms of a loss: which parameters each one reaches, and which of them train nothing.

What this room knows that no other does: that a term which reaches no parameter is said once, also where it was
learned of after its step had been judged.

Limits: terms are looked at in traced steps alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradwatch import _words, explain
from gradwatch.report import Action, Alert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch._diagnose import Inspection
    from gradwatch._grouping import Finding
    from gradwatch.report import Report


class Terms:
    """What is known of the terms of a run's loss."""

    def __init__(self) -> None:
        self.reached: dict[str, tuple[str, ...]] = {}
        """Names of the parameters that each term reaches."""
        self._dead: dict[str, str] = {}
        self._said: set[str] = set()

    def learn(self, terms: Mapping[str, Any], inspection: Inspection, *, meant: bool) -> None:
        """Find out which parameters terms reach.

        Args:
            terms: The terms by name.
            inspection: The traced step in which they were computed.
            meant: Whether they were said to be terms; otherwise only what went into the loss is one.
        """
        with inspection.trace.paused():
            for name, term in terms.items():
                cut = None
                if isinstance(term, Tensor):
                    reach = inspection.reach(term)
                    if not (meant or reach.in_loss):
                        continue
                    self.reached[name], cut = reach.parameters, reach.cut
                else:
                    self.reached[name] = ()
                if not self.reached[name] and name not in self._dead:
                    self._dead[name] = _words.term_reaches_nothing(name, *_told_of(cut))

    def alerts(self, step: int) -> tuple[Alert, ...]:
        """Return what is to be said of terms that reach nothing, once."""
        new = [text for text in self._dead.values() if text not in self._said]
        self._said.update(new)
        return tuple(
            Alert("loss_terms", Action.WARN, (), None, None, 1, step, message=text) for text in new
        )

    def added_to(self, report: Report) -> Report:
        """Return a report with what was learned of since it was made; the same one where that is nothing."""
        alerts = self.alerts(report.step)
        if not alerts and report.terms == self.reached:
            return report
        return replace(report, terms=dict(self.reached), alerts=(*report.alerts, *alerts))


def _told_of(cut: Finding | None) -> tuple[str | None, str | None, str | None]:
    """Return the cause and the place of a cut, and the way out where it is a derivative, as words."""
    if cut is None or cut.site is None:
        return None, None, None
    is_slope = cut.operation == "torch.autograd.grad"
    advice = explain.help_for(cut.cause, cut.operation, site=cut.site) if is_slope else None
    return str(cut.cause), _words.place(cut.site), advice
