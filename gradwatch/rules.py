"""From facts to alerts: which threshold holds for how long, and what was already said.

This room alone knows how a streak is counted, which parameters a glob means, and when a rule keeps quiet
because it has spoken. It sees names, statuses, and norms, never a tensor, and knows nothing of causes.
Streaks of missing gradients are exact. Norms, zeros, and non-finite values are known on logged steps
only: what happened in between is taken to be as it was at both ends.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gradwatch._words import listed
from gradwatch.report import Action, Alert, Status

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


def _one_as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # Python counts True as 1; in a configuration it is a slip
        raise PydanticCustomError("number_type", "expected a number")
    return value


Globs = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_one_as_list, json_schema_input_type=str | list[str]),
]
"""One glob or several, as ``fnmatchcase`` takes them, so that ``*`` crosses dots."""

Steps = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
"""A number of steps."""

_Norm = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
_GLOBS = "Glob, or list of globs, over parameter names."


class Condition(BaseModel):
    """What has to hold before a rule fires: exactly one of a status and two limits, for some steps.

    Example:
        >>> Condition(norm_above="1e3", for_steps=3).norm_above
        1000.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: Literal[Status.MISSING, Status.ZERO, Status.NONFINITE] | None = Field(
        default=None, description="Status that the parameter has: missing, zero, or nonfinite."
    )
    norm_above: _Norm | None = Field(default=None, description="Limit that the L2 norm is above.")
    norm_below: _Norm | None = Field(default=None, description="Limit that the L2 norm is below.")
    for_steps: Steps = Field(
        default=1, description="Steps in a row of the parameter's own optimizer."
    )

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if problem := condition_problem(self.model_dump(exclude_none=True)):
            raise PydanticCustomError("condition", "`when` {problem}", {"problem": problem})
        return self


def condition_problem(given: Collection[str]) -> str | None:
    """Return what is wrong with the choice of conditions under ``when``, if anything.

    Args:
        given: The keys that hold a value; others than the three conditions are passed over.

    Example:
        >>> condition_problem(["status", "norm_above"])
        'holds two conditions, `status` and `norm_above`'
    """
    names = [name for name in ("status", "norm_above", "norm_below") if name in given]
    if not names:
        return "holds no condition"
    if len(names) == 1:
        return None
    return f"holds {['two', 'three'][len(names) - 2]} conditions, {listed(names)}"


class Rule(BaseModel):
    """A condition over parameters, and what happens when it holds.

    Example:
        >>> Rule(name="dead", parameters="encoder.*", when={"status": "zero"}).action
        <Action.WARN: 'warn'>
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(min_length=1, description="Name by which the rule is reported.")
    parameters: Globs = Field(default=("*",), min_length=1, description=_GLOBS)
    when: Condition = Field(description="What has to hold, and for how long.")
    action: Literal[Action.LOG, Action.WARN, Action.STOP, Action.ABORT] = Field(
        default=cast(
            "Any", "warn"
        ),  # plain, so that `--print_config` of a command line can write it
        validate_default=True,
        description="What happens then: log, warn, stop, or abort.",
    )


class ContractEntry(BaseModel):
    """What is meant for some parameters: a gradient, none, or one now and then.

    Example:
        >>> ContractEntry(parameters="teacher.*", gradient="none", reason="EMA teacher").parameters
        ('teacher.*',)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    parameters: Globs = Field(min_length=1, description=_GLOBS)
    gradient: Literal["required", "none", "intermittent"] = Field(
        description="Whether a gradient is meant to arrive: required, none, or intermittent."
    )
    within: Steps = Field(
        default=100,
        description="For intermittent: steps without a gradient after which it is reported.",
    )
    reason: str | None = Field(
        default=None, description="Why it is meant so; shown with the report."
    )


def is_required(entry: ContractEntry | None) -> bool:
    """Tell whether a gradient has to arrive in every step.

    Args:
        entry: What the contract says of a parameter; None where it says nothing.

    Example:
        >>> is_required(None)
        True
    """
    return entry is None or entry.gradient == "required"


@dataclass(frozen=True, slots=True)
class Observation:
    """The facts about one optimizer step that rules look at; its collections do not change later."""

    step: int
    """Optimizer steps before this one."""
    covered: Collection[str]
    """Names that this step speaks of, in model order: the optimizer's own, and those in none. The same
    object in every step is the cheapest."""
    missing: Collection[str] = ()
    """Those of the covered that require grad and got none."""
    frozen: Collection[str] = ()
    """Those of the covered that do not require grad."""
    unseen: Collection[str] = ()
    """Those of the covered whose gradient cannot be seen: they neither heal nor break a contract."""
    logged: bool = False
    """Whether ``statuses`` and ``norms`` were measured; they are empty unless so."""
    statuses: Mapping[str, Status] = field(default_factory=dict)
    """Those that are not ok, at least."""
    norms: Mapping[str, float] = field(default_factory=dict)
    searching: bool = False
    """Whether a GradScaler is lowering its scale: overflows are normal then, and decide nothing."""


@dataclass(slots=True)
class _Track:
    """One rule, the names it means, and its memory."""

    rule: Rule
    means: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    since: dict[str, int] = field(default_factory=dict)
    """First step of each streak; rules over `missing` share theirs, and leave this empty."""

    @property
    def over_missing(self) -> bool:
        return self.rule.when.status is Status.MISSING

    def end(self, name: str) -> None:
        self.said.discard(name)
        self.since.pop(name, None)


class Judge:
    """Rules and a contract, with the memory of what held for how long and what was said.

    Args:
        rules: The rules, in the order in which their alerts are given.
        contract: What is meant for which parameters; the first entry that matches wins.
        aliases: For each tied parameter all of its names, any of which a glob may match.
        names: All parameter names, where known: a checkpoint's other names are then dropped.

    Example:
        >>> judge = Judge([Rule(name="dead", when={"status": "missing", "for_steps": 2})])
        >>> steps = [Observation(step, covered=("w", "b"), missing={"b"}) for step in range(3)]
        >>> [[alert.parameters for alert in judge.observe(step)] for step in steps]
        [[], [('b',)], []]
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        contract: Iterable[ContractEntry] = (),
        aliases: Mapping[str, Collection[str]] | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self._tracks = [_Track(rule) for rule in rules]
        self._contract = tuple(contract)
        self._aliases = aliases or {}
        self._closed = names is not None
        self._entries: dict[str, ContractEntry | None] = {}
        self._meant: dict[str, set[str]] = {"required": set(), "none": set(), "intermittent": set()}
        self._broken: dict[str, set[str]] = {kind: set() for kind in self._meant}
        self._streaks: dict[str, int] = {}
        self._last: Collection[str] | None = None
        self._covered: frozenset[str] = frozenset()
        self._learn(names or ())

    @property
    def streaks(self) -> Mapping[str, int]:
        """For each parameter without a gradient, for how many of its steps in a row by now."""
        return self._streaks

    @property
    def counts(self) -> bool:
        """Whether a step in which every gradient arrived would matter, without a measurement."""
        return bool(self._streaks or self._contract)

    def unmatched(self) -> list[str]:
        """Return the globs of the contract and the rules that match none of the known names."""
        entries: list[ContractEntry | Rule] = list(self._contract)
        entries += [track.rule for track in self._tracks]
        return [
            glob
            for glob in dict.fromkeys(glob for entry in entries for glob in entry.parameters)
            if not any(matches((glob,), n, self._aliases.get(n, ())) for n in self._entries)
        ]

    def contract_for(self, name: str) -> ContractEntry | None:
        """Return what the contract says of a parameter, by any of its names; None if nothing.

        Args:
            name: The parameter's name.

        Example:
            >>> entry = ContractEntry(parameters="teacher.*", gradient="none")
            >>> Judge([], [entry]).contract_for("teacher.weight").gradient
            'none'
        """
        if name not in self._entries:
            self._learn((name,))
        return self._entries[name]

    def observe(self, observation: Observation) -> tuple[Alert, ...]:
        """Return the alerts that fire in this step: those of rules first, then those of the contract.

        What was said of a parameter is not said again until its streak was broken, but for what ends the run.

        Args:
            observation: The facts about the step; steps come in order.

        Cost:
            Without logging, Python work for each missing name and a few set operations. On a logged
            step also one pass over the statuses, and one over the norms for each rule over them.
        """
        if observation.covered is not self._last:
            self._last, self._covered = observation.covered, frozenset(observation.covered)
            self._learn(self._covered - self._entries.keys())
        missing = self._covered.intersection(observation.missing)
        self._count(missing, frozenset(observation.unseen))
        by_status: dict[Status, set[str]] = defaultdict(set)
        for name, status in observation.statuses.items() if observation.logged else ():
            by_status[status].add(name)
        alerts = []
        for track in self._tracks:
            if track.over_missing:
                due = self._due_missing(track, missing)
            elif observation.logged:
                due = _due_measured(track, self._covered, by_status, observation)
            else:
                continue
            if due:
                # What ends a run is said until it does: the user's own `except` may have caught it.
                track.said.update(due if track.rule.action is not Action.ABORT else ())
                alerts.append(_alert(track.rule, due, observation))
        return (*alerts, *self._judge_contract(missing, observation))

    def state_dict(self) -> dict[str, Any]:
        """Return the streaks and what was said, as plain values for a checkpoint.

        Example:
            >>> Judge([]).state_dict()
            {'streaks': {}, 'rules': {}, 'contract': {'required': [], 'none': [], 'intermittent': []}}
        """
        return {
            "streaks": dict(self._streaks),
            "rules": {
                track.rule.name: {"said": sorted(track.said), "since": dict(track.since)}
                for track in self._tracks
            },
            "contract": {kind: sorted(names) for kind, names in self._broken.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's memory in place of the present one; the mapping is not changed.

        Args:
            state: What ``state_dict`` returned. Keys may be missing, and rules and parameters that are
                no longer there are passed over.

        Example:
            >>> judge = Judge([], names=["w"])
            >>> judge.load_state_dict({"streaks": {"w": 4, "gone": 9}})
            >>> dict(judge.streaks)
            {'w': 4}
        """
        self._streaks = self._known(state.get("streaks", {}))
        for track in self._tracks:
            saved = state.get("rules", {}).get(track.rule.name, {})
            track.since = {} if track.over_missing else self._known(saved.get("since", {}))
            # What was said is forgotten as its streak ends: without one it would be kept for ever.
            streaks = self._streaks if track.over_missing else track.since
            track.said = set(saved.get("said", ())) & streaks.keys()
        for kind in self._broken:
            said = state.get("contract", {}).get(kind, ())
            self._broken[kind] = set(self._known(dict.fromkeys(said, 0)))

    def _known(self, numbers: Mapping[str, int]) -> dict[str, int]:
        if not self._closed:
            return dict(numbers)
        return {name: number for name, number in numbers.items() if name in self._entries}

    def _learn(self, names: Iterable[str]) -> None:
        """Match every glob against names not seen before, once and for all."""
        for name in names:
            aliases = self._aliases.get(name, ())
            for track in self._tracks:
                if matches(track.rule.parameters, name, aliases):
                    track.means.add(name)
            found = (item for item in self._contract if matches(item.parameters, name, aliases))
            entry = self._entries[name] = next(found, None)
            if entry is not None:
                self._meant[entry.gradient].add(name)

    def _count(self, missing: frozenset[str], unseen: frozenset[str]) -> None:
        """Bring the streaks of missing gradients up to this step."""
        for name in self._covered.intersection(self._streaks) - missing - unseen:
            del self._streaks[name]
            for track in self._tracks:
                if track.over_missing:
                    track.end(name)
        for name in missing:
            self._streaks[name] = self._streaks.get(name, 0) + 1

    def _due_missing(self, track: _Track, missing: frozenset[str]) -> dict[str, int]:
        limit = track.rule.when.for_steps
        return {
            name: self._streaks[name]
            for name in (missing & track.means) - track.said - self._meant["none"]
            if self._streaks[name] >= max(limit, self._patience(name))
        }

    def _patience(self, name: str) -> int:
        entry = self._entries[name]
        return entry.within if entry is not None and entry.gradient == "intermittent" else 0

    def _judge_contract(self, missing: frozenset[str], observation: Observation) -> list[Alert]:
        if not self._contract:
            return []
        frozen, unseen = frozenset(observation.frozen), frozenset(observation.unseen)
        waiting = missing & self._meant["intermittent"]
        holds = {
            "none": (self._covered & self._meant["none"]) - missing - frozen - unseen,
            "required": self._covered & self._meant["required"] & frozen,
            "intermittent": {n for n in waiting if self._streaks[n] >= self._patience(n)},
        }
        alerts: list[Alert] = []
        for kind, now in holds.items():
            said = self._broken[kind]
            by_entry: dict[int, list[str]] = {}  # one alert each, since each has its own reason
            for name in _in_order(now - said, observation):
                by_entry.setdefault(id(self._entries[name]), []).append(name)
            alerts += [
                self._contract_alert(kind, names, observation) for names in by_entry.values()
            ]
            said -= (said & self._covered) - unseen - now
            said |= now
        return alerts

    def _contract_alert(self, kind: str, names: list[str], observation: Observation) -> Alert:
        return Alert(
            rule="contract",
            action=Action.WARN,
            parameters=tuple(names),
            value=None,
            limit=None,
            steps=max(self._streaks.get(name, 1) for name in names),
            step=observation.step,
            status={"required": Status.FROZEN, "intermittent": Status.MISSING}.get(kind),
            message=_contract_message(kind, names, self._entries[names[0]]),
        )


def worst(alerts: Iterable[Alert]) -> Action | None:
    """Return the hardest action among alerts, None when there are none.

    Args:
        alerts: What ``Judge.observe`` returned.

    Example:
        >>> worst([]) is None
        True
    """
    return max((alert.action for alert in alerts), key=list(Action).index, default=None)


def matches(globs: Iterable[str], name: str, aliases: Collection[str] = ()) -> bool:
    """Tell whether any glob means a parameter, by its name or one of its aliases.

    Args:
        globs: Patterns as ``fnmatchcase`` takes them.
        name: The parameter's name.
        aliases: Its other names, when it is tied.

    Example:
        >>> matches(["encoder.*"], "encoder.layers.0.weight")
        True
    """
    return any(fnmatchcase(spelling, glob) for glob in globs for spelling in (name, *aliases))


def _due_measured(
    track: _Track,
    covered: frozenset[str],
    by_status: Mapping[Status, set[str]],
    observation: Observation,
) -> dict[str, int]:
    """Bring the streaks of a rule over measured values up to a logged step."""
    when, step = track.rule.when, observation.step
    undecided = by_status[Status.UNSEEN]
    found: Collection[str]
    if when.status is not None:
        found = by_status[when.status]
    else:
        # NaN and infinity have rules of their own: they are no size, and leave a streak of sizes as it is.
        undecided = undecided | by_status[Status.NONFINITE]
        found = _beyond(when, observation.norms, by_status[Status.NONFINITE])
    if observation.searching:
        undecided = undecided | by_status[Status.NONFINITE]
    hits = (covered & track.means).intersection(found) - undecided if found else set[str]()
    for name in covered.intersection(track.since) - hits - undecided:
        track.end(name)
    for name in hits:  # a streak that begins after this step comes from a run that began anew
        track.since[name] = min(track.since.get(name, step), step)
    lengths = {name: step - track.since[name] + 1 for name in hits - track.said}
    return {name: length for name, length in lengths.items() if length >= when.for_steps}


def _beyond(
    when: Condition, norms: Mapping[str, float], nonfinite: Collection[str]
) -> Collection[str]:
    """Return those beyond a limit; that there are none is seen without a look at each."""
    ordered = norms and not nonfinite  # NaN has no place among numbers
    if when.norm_above is not None:
        if ordered and max(norms.values()) <= when.norm_above:
            return ()
        return {name for name, norm in norms.items() if norm > when.norm_above}
    limit = when.norm_below or 0.0
    if ordered and min(norms.values()) >= limit:
        return ()
    return {name for name, norm in norms.items() if norm < limit}


def _alert(rule: Rule, due: Mapping[str, int], observation: Observation) -> Alert:
    when, norms = rule.when, [observation.norms.get(name, 0.0) for name in due]
    return Alert(
        rule=rule.name,
        action=rule.action,
        parameters=_in_order(due, observation),
        value=None if when.status else max(norms) if when.norm_above is not None else min(norms),
        limit=when.norm_above if when.norm_above is not None else when.norm_below,
        steps=max(due.values()),
        step=observation.step,
        status=when.status,
    )


def _in_order(names: Collection[str], observation: Observation) -> tuple[str, ...]:
    if isinstance(observation.covered, set | frozenset):
        return tuple(sorted(names))
    return tuple(name for name in observation.covered if name in names) if names else ()


def _contract_message(kind: str, names: list[str], entry: ContractEntry | None) -> str:
    """Say which parameters broke the contract, and how."""
    reason = f" ({entry.reason})" if entry is not None and entry.reason else ""
    within = f" within {entry.within} steps" if entry is not None else ""
    one = len(names) == 1
    be = "is" if one else "are"
    meant, broken = {
        "none": ("no gradient", "and one arrived" if one else "and each got one"),
        "required": ("a gradient", f"and {be} frozen"),
        "intermittent": (f"a gradient{within}", "and none arrived"),
    }[kind]
    return f"{listed(names)} {be} meant to get {meant}{reason}, {broken}"
