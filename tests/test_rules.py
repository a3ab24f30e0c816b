from __future__ import annotations

import json
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gradwatch.report import Action, Alert, Status
from gradwatch.rules import (
    Condition,
    ContractEntry,
    Judge,
    Observation,
    Rule,
    condition_problem,
    matches,
    worst,
)

NAMES = ("encoder.weight", "encoder.bias", "head.weight")
DEAD = Rule(name="dead", when={"status": "missing", "for_steps": 3})
LOUD = Rule(name="loud", when={"norm_above": 10, "for_steps": 3})
BROKEN = Rule(name="broken", when={"status": "nonfinite", "for_steps": 2})


def lost(step: int, *missing: str, **facts: Any) -> Observation:
    """Return a step without logging, in which some parameters got no gradient."""
    return Observation(step, covered=NAMES, missing=missing, **facts)


def logged(step: int, **norms: float) -> Observation:
    """Return a logged step with these norms; one that is not finite has that status."""
    statuses = {
        name: Status.OK if abs(norm) < float("inf") else Status.NONFINITE
        for name, norm in norms.items()
    }
    return Observation(step, covered=("a", "b"), logged=True, statuses=statuses, norms=norms)


def said(judge: Judge, *steps: Observation) -> list[tuple[int, str, tuple[str, ...]]]:
    """Return what was said in these steps: step, rule, and parameters."""
    return [
        (alert.step, alert.rule, alert.parameters)
        for step in steps
        for alert in judge.observe(step)
    ]


# ---- conditions, rules, and contract entries


def test_numbers_may_be_text():
    """A number that YAML reads as text is a number all the same."""
    condition = Condition(norm_below="1e-8", for_steps="3")

    assert (condition.norm_below, condition.for_steps) == (1e-8, 3)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"for_steps": 3},
        {"status": "zero", "norm_above": 1},
        {"status": "zero", "norm_above": 1, "norm_below": 1},
        {"status": "ok"},
        {"status": "zero", "for_steps": 0},
        {"status": "zero", "for_steps": True},
        {"norm_above": True},
        {"norm_above": -1},
        {"norm_above": float("nan")},
        {"norm_below": float("inf")},
        {"norm_abov": 1},
    ],
    ids=str,
)
def test_condition_is_checked(given: dict[str, Any]):
    """A condition takes exactly one of a status and two limits, and numbers that make sense."""
    with pytest.raises(ValidationError, match="1 validation error for Condition"):
        Condition(**given)


def test_condition_problem_names_the_conditions():
    """What is wrong with a choice of conditions is put into words."""
    problems = [
        condition_problem(given)
        for given in (
            [],
            ["status"],
            ["norm_below", "status"],
            ["norm_above", "norm_below", "status"],
        )
    ]

    assert problems == [
        "holds no condition",
        None,
        "holds two conditions, `status` and `norm_below`",
        "holds three conditions, `status`, `norm_above`, and `norm_below`",
    ]


def test_rule_has_defaults():
    """A rule is over all parameters, and warns, unless it says otherwise."""
    rule = Rule(name="dead", when={"status": "missing"})

    assert (rule.parameters, rule.action, rule.when.for_steps) == (("*",), Action.WARN, 1)


@pytest.mark.parametrize("globs", [[], "", ["a", 3], 3], ids=repr)
def test_globs_are_checked(globs: object):
    """Globs are text, one at least, and none of them empty."""
    with pytest.raises(ValidationError, match="parameters"):
        Rule(name="dead", parameters=globs, when={"status": "missing"})


def test_rule_cannot_be_changed():
    """A rule is a value."""
    with pytest.raises(ValidationError, match="frozen"):
        DEAD.name = "other"  # type: ignore[misc]


def test_every_field_is_described():
    """Each field has a description, which the command line and the JSON schema show."""
    fields = [
        (model.__name__, name)
        for model in (Condition, Rule, ContractEntry)
        for name, info in model.model_fields.items()
        if not info.description
    ]

    assert fields == []


# ---- globs


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["*"], True),
        (["encoder.*"], True),
        (["*.weight"], True),
        (["Encoder.*"], False),
        (["encoder"], False),
        (["none", "encoder.*.weight"], True),
        (["encoder.layers.[0-9].weight"], True),
        (["decoder.*"], False),
        ([], False),
    ],
)
def test_globs_match_across_dots(globs: list[str], expected: bool):  # noqa: FBT001
    """A star crosses dots, case counts, and one match is enough."""
    assert matches(globs, "encoder.layers.0.weight") is expected


def test_globs_match_any_alias():
    """A rule and a contract mean a tied parameter by any of its names."""
    rule = Rule(name="dead", parameters="head.*", when={"status": "missing"})
    entry = ContractEntry(parameters="head.*", gradient="required", reason="tied")
    aliases = {"embed.weight": ("embed.weight", "head.weight")}
    judge = Judge([rule], [entry], aliases, names=["embed.weight"])

    alerts = judge.observe(Observation(0, covered=["embed.weight"], missing=["embed.weight"]))

    assert [alert.parameters for alert in alerts] == [("embed.weight",)]
    assert judge.contract_for("embed.weight") == entry


# ---- missing gradients


def test_missing_fires_at_its_step():
    """A rule over missing gradients fires when they were missing for as many steps, and once."""
    judge = Judge([DEAD], names=NAMES)

    alerts = [judge.observe(lost(step, "head.weight", "encoder.bias")) for step in range(5)]

    fired = Alert(
        rule="dead",
        action=Action.WARN,
        parameters=("encoder.bias", "head.weight"),
        value=None,
        limit=None,
        steps=3,
        step=2,
        status=Status.MISSING,
    )
    assert alerts == [(), (), (fired,), (), ()]


def test_missing_fires_again_after_it_healed():
    """A gradient that arrives ends the streak, and the next streak is said again."""
    judge = Judge([DEAD])

    alerts = said(judge, *(lost(step, *["head.weight"] * (step != 4)) for step in range(8)))

    assert alerts == [(2, "dead", ("head.weight",)), (7, "dead", ("head.weight",))]


def test_missing_names_only_the_new_parameters():
    """A parameter that joins later is said alone."""
    judge = Judge([DEAD])
    early = [lost(step, "head.weight") for step in range(2)]
    late = [lost(step, "head.weight", "encoder.bias") for step in range(2, 6)]

    alerts = said(judge, *early, *late)

    assert alerts == [(2, "dead", ("head.weight",)), (4, "dead", ("encoder.bias",))]


def test_steps_of_other_optimizers_do_not_count():
    """A streak waits while another optimizer steps."""
    judge = Judge([DEAD])
    mine, others = ("a",), ("b",)
    steps = [
        Observation(
            step, covered=mine if step % 2 == 0 else others, missing=mine if step % 2 == 0 else ()
        )
        for step in range(6)
    ]

    alerts = said(judge, *steps)

    assert alerts == [(4, "dead", ("a",))]
    assert judge.streaks == {"a": 3}


def test_missing_outside_covered_does_not_count():
    """A name that the step does not speak of gets no streak."""
    judge = Judge([DEAD])

    judge.observe(Observation(0, covered=["a"], missing=["a", "b"]))

    assert judge.streaks == {"a": 1}


def test_freezing_ends_a_missing_streak():
    """A parameter that is frozen is no longer missing."""
    judge = Judge([DEAD])
    steps = [lost(0, "head.weight"), lost(1, "head.weight"), lost(2, frozen=["head.weight"])]

    alerts = said(judge, *steps, lost(3, "head.weight"))

    assert alerts == []
    assert judge.streaks == {"head.weight": 1}


def test_unseen_parameters_keep_their_streak():
    """What cannot be seen neither counts nor heals."""
    judge = Judge([DEAD])
    steps = [lost(0, "head.weight"), lost(1, "head.weight"), lost(2, unseen=["head.weight"])]

    alerts = said(judge, *steps, lost(3, "head.weight"))

    assert alerts == [(3, "dead", ("head.weight",))]


def test_rule_is_over_its_parameters_alone():
    """Parameters that no glob of a rule means are none of its business."""
    judge = Judge([Rule(name="dead", parameters=["head.*"], when={"status": "missing"})])

    alerts = said(judge, lost(0, *NAMES))

    assert alerts == [(0, "dead", ("head.weight",))]


def test_every_rule_gives_an_alert_of_its_own():
    """Rules fire side by side, in their order, each at its limit."""
    harder = DEAD.model_copy(update={"name": "harder", "action": Action.ABORT})
    judge = Judge([DEAD, harder, Rule(name="soon", when={"status": "missing"})])

    alerts = said(judge, *(lost(step, "head.weight") for step in range(3)))

    assert [(step, rule) for step, rule, _ in alerts] == [(0, "soon"), (2, "dead"), (2, "harder")]


def test_a_set_is_sorted():
    """Where the covered names have no order, the alphabet gives one."""
    judge = Judge([Rule(name="dead", when={"status": "missing"})])

    alerts = judge.observe(Observation(0, covered={"b", "a", "c"}, missing={"c", "a", "b"}))

    assert [alert.parameters for alert in alerts] == [("a", "b", "c")]


# ---- measured values


def test_norm_fires_with_the_worst():
    """A rule over norms gives the worst norm, its limit, and the longest streak."""
    judge = Judge([LOUD])

    judge.observe(logged(0, a=20, b=1))
    alerts = judge.observe(logged(2, a=30, b=1)), judge.observe(logged(4, a=30, b=50))

    fired = Alert("loud", Action.WARN, ("a",), value=30, limit=10, steps=3, step=2)
    assert alerts == ((fired,), ())
    assert judge.observe(logged(6, a=30, b=50)) == (
        Alert("loud", Action.WARN, ("b",), value=50, limit=10, steps=3, step=6),
    )


def test_small_norm_fires_with_the_smallest():
    """A rule over small norms gives the smallest, and zero is small."""
    judge = Judge([Rule(name="quiet", when={"norm_below": 0.5})])

    alerts = judge.observe(logged(7, a=0.1, b=0.0))

    assert alerts == (
        Alert("quiet", Action.WARN, ("a", "b"), value=0.0, limit=0.5, steps=1, step=7),
    )


def test_norm_at_its_limit_is_neither_above_nor_below():
    """Limits are exclusive."""
    rules = [Rule(name=key, when={key: 2.0}) for key in ("norm_above", "norm_below")]

    assert Judge(rules).observe(logged(0, a=2.0, b=2.0)) == ()


def test_unlogged_steps_neither_count_nor_break():
    """A streak lasts from its first to its latest logged step, whatever was not measured in between."""
    judge = Judge([LOUD])
    unlogged = Observation(5, covered=("a", "b"), missing=("a",))

    alerts = said(judge, logged(4, a=20, b=1), unlogged, logged(6, a=20, b=1))

    assert alerts == [(6, "loud", ("a",))]


def test_a_good_norm_breaks_the_streak():
    """One logged step within the limit begins the count anew, and the next streak is said again."""
    judge = Judge([LOUD])
    norms = [20, 20, 1, 20, 20, 20, 20, 1, 20, 20, 20]

    alerts = said(judge, *(logged(step, a=norm) for step, norm in enumerate(norms)))

    assert alerts == [(5, "loud", ("a",)), (10, "loud", ("a",))]


def test_a_missing_gradient_breaks_a_streak_of_norms():
    """A parameter without a norm in a logged step is not above any limit."""
    judge = Judge([LOUD])

    alerts = said(judge, logged(0, a=20), logged(1), logged(2, a=20))

    assert alerts == []


def test_norms_outside_covered_do_not_count():
    """What another optimizer's parameters are is left alone in this step."""
    judge = Judge([Rule(name="loud", when={"norm_above": 10})])

    alerts = said(judge, logged(0, other=20))

    assert alerts == []


def test_nonfinite_is_no_size():
    """A norm that is not finite neither counts for nor breaks a streak of norms."""
    judge = Judge([LOUD])

    alerts = said(judge, logged(0, a=20), logged(1, a=float("inf")), logged(2, a=20))

    assert alerts == [(2, "loud", ("a",))]
    assert said(judge, logged(3, a=float("nan"))) == []


@pytest.mark.parametrize("status", [Status.ZERO, Status.NONFINITE])
def test_status_rule_counts_logged_steps(status: Status):
    """A rule over a measured status fires at its step, with the status and without a value."""
    judge = Judge([Rule(name="bad", action="stop", when={"status": status, "for_steps": 2})])
    steps = [Observation(step, ("a",), logged=True, statuses={"a": status}) for step in range(3)]

    alerts = [judge.observe(step) for step in steps]

    fired = Alert("bad", Action.STOP, ("a",), None, None, steps=2, step=1, status=status)
    assert alerts == [(), (fired,), ()]


def test_overflows_while_a_scaler_lowers_its_scale_are_normal():
    """An overflow counts only once the scaler has nothing left to lower."""
    judge = Judge([BROKEN.model_copy(update={"when": Condition(status="nonfinite")})])

    alerts = said(
        judge,
        *(
            Observation(
                10 * step,
                ("a",),
                logged=True,
                searching=searching,
                statuses={"a": Status.NONFINITE},
            )
            for step, searching in enumerate([True, True, True, False])
        ),
    )

    assert alerts == [(30, "broken", ("a",))]


def test_unseen_keeps_a_measured_streak():
    """A parameter that cannot be seen in a logged step keeps its streak."""
    judge = Judge([BROKEN])
    statuses = [Status.NONFINITE, Status.UNSEEN, Status.NONFINITE]

    alerts = said(
        judge,
        *(
            Observation(step, ("a",), logged=True, statuses={"a": found})
            for step, found in enumerate(statuses)
        ),
    )

    assert alerts == [(2, "broken", ("a",))]


def test_a_run_that_begins_anew_counts_anew():
    """Steps that go back to 0 do not inherit a first step that lies ahead of them."""
    judge = Judge([LOUD])
    judge.observe(logged(100, a=20))

    alerts = said(judge, *(logged(step, a=20) for step in range(3)))

    assert alerts == [(2, "loud", ("a",))]


# ---- contract

TEACHER = ContractEntry(parameters="teacher.*", gradient="none", reason="EMA teacher")
NOW = Rule(name="now", when={"status": "missing"})


def test_first_entry_wins():
    """The first entry that matches says what is meant; without one there is none."""
    rest = ContractEntry(parameters="*.weight", gradient="required")
    judge = Judge([], [TEACHER, rest])

    found = [judge.contract_for(name) for name in ("teacher.weight", "head.weight", "head.bias")]

    assert found == [TEACHER, rest, None]


def test_none_silences_missing_rules():
    """No rule over missing gradients fires for a parameter that is meant to get none."""
    judge = Judge([NOW], [TEACHER])

    alerts = said(judge, Observation(0, ("teacher.w", "w"), missing=("teacher.w", "w")))

    assert alerts == [(0, "now", ("w",))]
    assert judge.streaks == {"teacher.w": 1, "w": 1}


def test_gradient_against_the_contract_is_said_once():
    """A gradient that is not meant to arrive is said once, until it stops arriving."""
    judge = Judge([NOW], [TEACHER])
    arrives, stops = (Observation(0, ("teacher.w",), missing=gone) for gone in ((), ("teacher.w",)))

    alerts = [judge.observe(step) for step in (arrives, arrives, stops, arrives)]

    fired = Alert(
        rule="contract",
        action=Action.WARN,
        parameters=("teacher.w",),
        value=None,
        limit=None,
        steps=1,
        step=0,
        message="`teacher.w` is meant to get no gradient (EMA teacher), and one arrived",
    )
    assert alerts == [(fired,), (), (), (fired,)]


@pytest.mark.parametrize("kind", ["missing", "frozen", "unseen"])
def test_contract_of_none_is_kept(kind: str):
    """A parameter that is missing, frozen, or unseen got no gradient that anyone saw."""
    judge = Judge([NOW], [TEACHER])

    gone: dict[str, Any] = {kind: ("teacher.w",)}

    alerts = said(judge, Observation(0, ("teacher.w",), **gone))

    assert alerts == []


def test_frozen_against_the_contract_is_said_once():
    """A parameter that is required by name and frozen is said once, until it is thawed."""
    entry = ContractEntry(parameters="head.*", gradient="required")
    judge = Judge([], [entry])
    frozen = [lost(step, frozen=["head.weight", "encoder.bias"]) for step in range(4)]

    alerts = [judge.observe(step) for step in (frozen[0], frozen[1], lost(2), frozen[3])]

    assert [[alert.message for alert in found] for found in alerts] == [
        ["`head.weight` is meant to get a gradient, and is frozen"],
        [],
        [],
        ["`head.weight` is meant to get a gradient, and is frozen"],
    ]
    assert alerts[0][0].status is Status.FROZEN


def test_intermittent_waits():
    """A parameter with a gradient now and then is reported after as many steps without one."""
    entry = ContractEntry(parameters="expert.*", gradient="intermittent", within=4, reason="MoE")
    judge = Judge([DEAD], [entry])
    steps = [Observation(step, ("expert.w",), missing=("expert.w",)) for step in range(6)]

    alerts = [alert for step in steps for alert in judge.observe(step)]

    assert [(alert.step, alert.rule, alert.steps) for alert in alerts] == [
        (3, "dead", 4),
        (3, "contract", 4),
    ]
    assert alerts[1].message == (
        "`expert.w` is meant to get a gradient within 4 steps (MoE), and none arrived"
    )


def test_intermittent_is_kept_by_one_gradient():
    """A gradient now and then begins the count anew."""
    entry = ContractEntry(parameters="*", gradient="intermittent", within=3)
    judge = Judge([NOW], [entry])

    alerts = said(judge, *(lost(step, *["head.weight"] * (step % 3 != 2)) for step in range(12)))

    assert alerts == []


def test_contract_alert_names_three():
    """A contract that is broken for many names three of them, and counts the rest."""
    entries = [TEACHER, ContractEntry(parameters="ema.*", gradient="none")]
    names = [*(f"teacher.{index}" for index in range(5)), "ema.b", "ema.a"]

    alerts = Judge([], entries).observe(Observation(0, names))

    assert [alert.message for alert in alerts] == [
        (
            "`teacher.0`, `teacher.1`, `teacher.2`, and 2 more are meant to get no gradient"
            " (EMA teacher), and each got one"
        ),
        "`ema.b` and `ema.a` are meant to get no gradient, and each got one",
    ]


# ---- memory


def everything() -> Judge:
    """Return a judge that remembers something of each kind."""
    entries = [
        TEACHER,
        ContractEntry(parameters="frozen", gradient="required"),
        ContractEntry(parameters="expert", gradient="intermittent", within=2),
    ]
    return Judge([NOW, DEAD, LOUD, BROKEN], entries)


def story(first: int, last: int) -> list[Observation]:
    """Return steps in which something is wrong in every way."""
    names = ("teacher.w", "frozen", "expert", "dead", "loud", "broken")
    statuses = dict.fromkeys(names, Status.OK) | {"broken": Status.NONFINITE}
    return [
        Observation(
            step, names, missing=("dead", "expert"), frozen=("frozen",), logged=True,
            statuses=statuses, norms={"loud": 20.0},
        )
        for step in range(first, last)
    ]  # fmt: skip


@pytest.mark.parametrize("cut", range(6))
def test_memory_survives_a_checkpoint(cut: int):
    """A judge that goes on from a saved state says what the first would have said."""
    whole, first, second = everything(), everything(), everything()
    said(first, *story(0, cut))

    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert said(first, *story(cut, 6)) == said(second, *story(cut, 6))
    assert said(whole, *story(0, 6))
    assert second.state_dict() == first.state_dict() == whole.state_dict()


def test_state_is_plain():
    """A state holds nothing but what a checkpoint loads without trust."""
    judge = everything()
    said(judge, *story(0, 4))

    assert judge.state_dict() == {
        "streaks": {"dead": 4, "expert": 4},
        "rules": {
            "now": {"said": ["dead", "expert"], "since": {}},
            "dead": {"said": ["dead", "expert"], "since": {}},
            "loud": {"said": ["loud"], "since": {"loud": 0}},
            "broken": {"said": ["broken"], "since": {"broken": 0}},
        },
        "contract": {"required": ["frozen"], "none": ["teacher.w"], "intermittent": ["expert"]},
    }


def test_loading_changes_no_state():
    """A state that was loaded is neither changed nor kept."""
    judge, other = everything(), everything()
    said(judge, *story(0, 3))
    state = judge.state_dict()
    before = deepcopy(state)

    other.load_state_dict(state)
    said(other, *story(3, 6), Observation(9, ("dead", "loud", "teacher.w"), logged=True))

    assert state == before


@pytest.mark.parametrize(
    "state", [{}, {"rules": {"dead": {}}}, {"contract": {}}, {"later": 1}], ids=str
)
def test_keys_may_be_missing(state: dict[str, Any]):
    """A state without some keys is one without that memory."""
    judge = everything()
    said(judge, *story(0, 3))

    judge.load_state_dict(state)

    assert judge.state_dict() == everything().state_dict()


def test_names_that_are_gone_are_dropped():
    """A parameter, or a rule, that is no longer there leaves nothing behind."""
    old = Judge([NOW, LOUD], [TEACHER])
    said(old, Observation(0, ("w", "gone", "teacher.gone"), missing=("w", "gone")))
    said(old, logged(1, a=20))
    judge = Judge([NOW], [TEACHER], names=["w"])

    judge.load_state_dict(old.state_dict())

    assert judge.state_dict() == {
        "streaks": {"w": 1},
        "rules": {"now": {"said": ["w"], "since": {}}},
        "contract": {"required": [], "none": [], "intermittent": []},
    }


def test_rule_that_changed_its_kind_begins_anew():
    """What a rule of the same name said about something else does not silence it."""
    old = Judge([Rule(name="x", when={"status": "missing"})])
    said(old, Observation(0, ("a",), missing=("a",)))
    judge = Judge([Rule(name="x", when={"norm_above": 10})])

    judge.load_state_dict(old.state_dict())

    assert said(judge, logged(1, a=20)) == [(1, "x", ("a",))]


# ---- the rest


def test_worst_action():
    """The hardest action wins, and none is None."""
    alerts = [Alert("x", action, (), None, None, 1, 0) for action in (Action.STOP, Action.LOG)]

    assert [worst(alerts), worst(alerts[1:]), worst([])] == [Action.STOP, Action.LOG, None]


def test_memory_does_not_grow_with_steps():
    """A judge remembers no more after a thousand steps than after ten."""
    judge = everything()
    said(judge, *story(0, 10))
    before = len(json.dumps(judge.state_dict()))

    said(judge, *story(10, 1000))

    assert len(json.dumps(judge.state_dict())) - before <= 8


def test_unlogged_steps_match_no_globs(monkeypatch: pytest.MonkeyPatch):
    """Globs are matched once for each name, not in every step."""
    calls: list[str] = []

    def counted(name: str, glob: str) -> bool:
        calls.append(name)
        return glob == "*"

    monkeypatch.setattr("gradwatch.rules.fnmatchcase", counted)
    judge = Judge([DEAD, LOUD], names=NAMES)
    matched = len(calls)

    said(judge, *(lost(step, "head.weight") for step in range(10)))

    assert (matched, len(calls)) == (6, 6)


@pytest.mark.bench
def test_healthy_unlogged_step_is_cheap():
    """A step without logging costs well under a millisecond at ten thousand parameters."""
    names = tuple(f"layers.{index}.weight" for index in range(10_000))
    judge = Judge([DEAD, LOUD, BROKEN], [TEACHER], names=names)
    steps = [Observation(step, names, missing=names[:10]) for step in range(100)]

    start = time.perf_counter()
    said(judge, *steps)

    assert (time.perf_counter() - start) / len(steps) < 1e-3


@pytest.mark.parametrize("module", ["rules", "config"])
def test_reading_needs_no_torch(module: str):
    """Neither torch nor Lightning is loaded in a fresh process."""
    code = f"import sys, gradwatch.{module}; print({{'torch', 'lightning'}} & set(sys.modules))"

    done = subprocess.run(  # noqa: S603 -- our own command
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "set()\n"
