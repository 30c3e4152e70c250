"""When a user leaves: temper falls with every slate, by a rule of your choice, and below 1 the user is gone.

A rule is a frozen dataclass of settings (:class:`LeaveRule`); its ``bind`` gives a :class:`BoundLeaveRule`, which holds
the temper of a batch of sessions and decrements it in ``update``. Wherever a rule is asked for it may also be written
as a name (``"strict"``), as a text (``"temper:ad_bound=0.2,grace_steps=3"``) or as a mapping
(``{"rule": "temper", "ad_bound": 0.2}``); see :func:`leave_rule`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.metrics.fairness import BOUND_TOLERANCE, DisparityMode, least_violation, slate_disparity

Floats = NDArray[np.float64]

_MIN_ITEMS_FOR_SHARE = 4
# Small ufuncs take twice as long with a Python number, or in place.
_LEAST_LOST, _MOST_LOST, _LEAVES_BELOW = np.asarray(0.0), np.asarray(2.0), np.asarray(1.0 - BOUND_TOLERANCE)


class LeaveDecision(NamedTuple):
    """What one step did to ``B`` sessions.

    Attributes:
        temper: ``float64 (B,)``, patience left; the user leaves below 1.
        disparity: ``float64 (B,)``, the ``u`` that was evaluated; 0 for rules that do not evaluate shares, and
            ``|2p - 1|`` where ``u`` would tell agents what a user tolerates (``personal``).
        violation: ``bool (B,)``, whether the slate broke the rule.
        leaves: ``bool (B,)``, whether the user leaves now.
    """

    temper: Floats
    disparity: Floats
    violation: BoolArray
    leaves: BoolArray


class BoundLeaveRule(ABC):
    """A leave rule together with the state of ``B`` sessions.

    Args:
        batch_size: Number of sessions ``B``.
        start: Temper at the start of a session.

    Attributes:
        temper: ``float64 (B,)``, patience left.
    """

    def __init__(self, batch_size: int, start: float) -> None:
        self.start = start
        self.temper = np.full(batch_size, start)

    def reset(self, rows: IntArray, users: IntArray) -> None:
        """Starts new sessions in the given rows of the batch, of the given user rows."""
        self.temper[rows] = self.start

    @abstractmethod
    def update(self, items: IntArray, popular_share: Floats, reward: Floats, steps: IntArray) -> LeaveDecision:
        """Decrements the temper of every session after a slate and decides who leaves.

        Args:
            items: ``(B, K)`` shown items.
            popular_share: ``(B,)``, share of popular items in the slate.
            reward: ``(B,)``, mean feedback over the slate.
            steps: ``(B,)``, steps taken so far, this one included.

        Returns:
            New arrays; callers keep the decisions of earlier steps.
        """


class WorldFacts(Protocol):
    """What a leave rule may ask of a :class:`~kuaifair_env.world.World`."""

    @property
    def tags(self) -> BoolArray:
        """``bool (N, T)``, categories of the candidates."""
        ...

    @property
    def tolerated_shares(self) -> Floats:
        """``float64 (users,)``, share of popular items that each user tolerates."""
        ...


class LeaveRule(Protocol):
    """Settings of a rule; :meth:`bind` gives it a batch of sessions."""

    def bind(self, batch_size: int, slate_size: int, max_len: int, world: WorldFacts) -> BoundLeaveRule:
        """Returns the rule with the state of ``batch_size`` sessions.

        Args:
            batch_size: Number of sessions ``B``.
            slate_size: Items per slate ``K``.
            max_len: The environment's Max Len.
            world: Where the sessions run.
        """
        ...


LeaveRuleLike = str | Mapping[str, Any] | LeaveRule
"""A leave rule in any of the forms that :func:`leave_rule` reads."""


def _need_numbers(rule: object, kind: type, names: tuple[str, ...]) -> None:
    """Checks that settings of a rule are numbers, or None where that is their default."""
    for name in names:
        value = getattr(rule, name)
        if value is None and getattr(type(rule), name) is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be a {'whole ' if kind is Integral else ''}number, got {value!r}")


@dataclass(frozen=True)
class TemperFairness:
    """Users lose temper with dull slates, and more of it with slates of unequal exposure (the default).

    ``temper_0 = max_len``; after a slate with mean feedback ``r`` and popular share ``p``::

        temper += clip(r - 2, -2, 0)
        temper -= unfair_penalty    if u >= ad_bound
        leaves  = temper < 1

    with ``u = |2p - 1|`` (``parity``), ``max(0, 2p - 1)`` (``popular_only``), the distance of ``p`` to ``target_share``
    over the largest that there can be (``target``), or ``|p - t_u|`` with the share ``t_u`` that the user tolerates
    (``personal``; see :mod:`kuaifair_env.tolerance`). The temper loss is KuaiSim's (Zhao et al., 2023), the penalty
    the fairness-aware abandonment of the paper's section 5.1.1, whose numbers the paper does not give: see
    ``docs/concepts/leaving.md``.

    Attributes:
        ad_bound: Disparity from which a slate counts as unfair (inclusive, tolerance 1e-9).
        unfair_penalty: Temper lost to an unfair slate; 0 switches the fairness part off.
        mode: How a popular share becomes the disparity ``u``.
        target_share: The share that ``mode="target"`` calls fair.
        window: Slates over which the share is taken; None means as many as make 4 items, ``ceil(4 / K)``: of 3 items or
            fewer no share comes nearer to equal than ``u = 1/3``.
        grace_steps: First steps of a session that are not evaluated.
        initial_temper: ``temper_0``; None means the environment's ``max_len``.
    """

    rule: Literal["temper"] = field(default="temper", init=False, repr=False)
    ad_bound: float = 0.3
    unfair_penalty: float = 1.0
    mode: DisparityMode = "parity"
    target_share: float = 0.5
    window: int | None = None
    grace_steps: int = 0
    initial_temper: float | None = None

    def __post_init__(self) -> None:
        _need_numbers(self, Real, ("ad_bound", "unfair_penalty", "target_share", "initial_temper"))
        _need_numbers(self, Integral, ("window", "grace_steps"))
        if not 0 <= self.ad_bound <= 1:
            raise ValueError(f"ad_bound must lie in [0, 1], got {self.ad_bound}")
        if not 0 <= self.unfair_penalty < float("inf"):
            raise ValueError(f"unfair_penalty must be finite and not negative, got {self.unfair_penalty}")
        if self.mode not in get_args(DisparityMode):
            raise ValueError(f"mode must be one of {get_args(DisparityMode)}, got {self.mode!r}")
        if not 0 <= self.target_share <= 1:
            raise ValueError(f"target_share must lie in [0, 1], got {self.target_share}")
        if self.mode != "target" and self.target_share != 0.5:
            raise ValueError(
                f"target_share={self.target_share} has no effect with mode={self.mode!r}; add mode='target'"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 slate, got {self.window}")
        if self.grace_steps < 0:
            raise ValueError(f"grace_steps must not be negative, got {self.grace_steps}")
        if self.initial_temper is not None and not 1 <= self.initial_temper < float("inf"):
            raise ValueError(
                f"initial_temper must be at least 1, where users leave, and finite, got {self.initial_temper}"
            )

    def window_for(self, slate_size: int) -> int:
        """Returns how many slates of ``K`` items the share is taken over."""
        return self.window or -(-_MIN_ITEMS_FOR_SHARE // slate_size)

    def grace_for(self, slate_size: int) -> int:
        """Returns how many first slates of ``K`` items are never evaluated."""
        return max(self.grace_steps, -(-_MIN_ITEMS_FOR_SHARE // slate_size) - 1)

    def bind(self, batch_size: int, slate_size: int, max_len: int, world: WorldFacts) -> BoundLeaveRule:
        """See :class:`LeaveRule`.

        Raises:
            ValueError: If a full window holds fewer than 4 items, too few to measure a share.
        """
        window = self.window_for(slate_size)
        if self.unfair_penalty and window * slate_size < _MIN_ITEMS_FOR_SHARE:
            raise ValueError(
                f"a window of {window} slates of {slate_size} items is too small to measure a share; "
                f"it needs at least {-(-_MIN_ITEMS_FOR_SHARE // slate_size)}, which window=None takes"
            )
        start = float(max_len if self.initial_temper is None else self.initial_temper)
        if self.mode == "personal":
            return _BoundPersonal(self, batch_size, slate_size, window, start, world.tolerated_shares)
        return _BoundTemperFairness(self, batch_size, slate_size, window, start)


class _BoundTemperFairness(BoundLeaveRule):
    def __init__(self, rule: TemperFairness, batch_size: int, slate_size: int, window: int, start: float) -> None:
        super().__init__(batch_size, start)
        self._rule = rule
        self._target: float | Floats = rule.target_share
        self._window = window
        self._least_violation = np.asarray(least_violation(rule.ad_bound))
        self._penalty = np.asarray(rule.unfair_penalty, np.float64)
        self._grace = np.asarray(rule.grace_for(slate_size))
        self._items_per_slate, self._longest = np.asarray(slate_size, np.float64), np.asarray(window)
        self._items_of_slates = np.arange(window + 1) * self._items_per_slate
        # Numbers of popular items in the last slates, in any order; whole, so that sums are exact.
        self._recent = np.zeros((batch_size, window))
        self._ones = np.ones(window)
        self._turn = 0

    def reset(self, rows: IntArray, users: IntArray) -> None:
        super().reset(rows, users)
        self._recent[rows] = 0.0

    def update(self, items: IntArray, popular_share: Floats, reward: Floats, steps: IntArray) -> LeaveDecision:
        disparity = slate_disparity(self._recent_share(popular_share, steps), self._rule.mode, self._target)
        violation = disparity >= self._least_violation
        if self._grace:
            violation = violation & (steps > self._grace)
        temper = self.temper - np.minimum(np.maximum(_MOST_LOST - reward, _LEAST_LOST), _MOST_LOST)
        if self._penalty:
            temper = temper - self._penalty * violation
        self.temper = temper
        return LeaveDecision(temper.copy(), disparity, violation, temper < _LEAVES_BELOW)

    def _recent_share(self, popular_share: Floats, steps: IntArray) -> Floats:
        if self._window == 1:
            return popular_share
        self._recent[:, self._turn] = np.rint(popular_share * self._items_per_slate)
        self._turn = (self._turn + 1) % self._window
        shown = self._items_of_slates.take(np.minimum(steps, self._longest))
        share: NDArray[np.float64] = self._recent.dot(self._ones) / shown
        return share


class _BoundPersonal(_BoundTemperFairness):
    def __init__(
        self, rule: TemperFairness, batch_size: int, slate_size: int, window: int, start: float, tolerated: Floats
    ) -> None:
        super().__init__(rule, batch_size, slate_size, window, start)
        self._tolerated = tolerated
        self._target = self._target_of_rows = np.zeros(batch_size)

    def reset(self, rows: IntArray, users: IntArray) -> None:
        super().reset(rows, users)
        self._target_of_rows[rows] = self._tolerated[users]

    def update(self, items: IntArray, popular_share: Floats, reward: Floats, steps: IntArray) -> LeaveDecision:
        decision = super().update(items, popular_share, reward, steps)
        # The user's own disparity would tell agents what the user tolerates.
        return decision._replace(disparity=slate_disparity(popular_share))


@dataclass(frozen=True)
class CategoryBoredom:
    """Users leave when the content categories of recent items repeat too often.

    The quit rule of CIRS and EasyRL4Rec (Gao et al., 2023): with the tags of the last ``window`` items, the user
    leaves when any tag of a newly shown item already stood more than ``threshold`` times among them. The public
    code misreads the window in the first ``window`` turns; here it is simply shorter then. Items of one slate
    are evaluated against the slates before it.

    Attributes:
        window: How many of the last items count.
        threshold: Repeats that a user forgives.
    """

    rule: Literal["category"] = field(default="category", init=False, repr=False)
    window: int = 10
    threshold: int = 4

    def __post_init__(self) -> None:
        _need_numbers(self, Integral, ("window", "threshold"))
        if self.window < 1 or self.threshold < 0:
            raise ValueError(f"window must be at least 1 and threshold at least 0, got {self}")

    def bind(self, batch_size: int, slate_size: int, max_len: int, world: WorldFacts) -> BoundLeaveRule:
        """See :class:`LeaveRule`.

        Raises:
            ValueError: If the items have no tags.
        """
        if world.tags.shape[1] == 0:
            raise ValueError("CategoryBoredom needs items with tags; this catalogue has none")
        return _BoundCategoryBoredom(self, batch_size, slate_size, max_len, world.tags)


class _BoundCategoryBoredom(BoundLeaveRule):
    def __init__(self, rule: CategoryBoredom, batch_size: int, slate_size: int, max_len: int, tags: BoolArray) -> None:
        super().__init__(batch_size, float(max_len))
        self._rule = rule
        self._tags = tags
        self._recent = np.full((batch_size, max(rule.window, slate_size)), -1, np.int64)

    def reset(self, rows: IntArray, users: IntArray) -> None:
        super().reset(rows, users)
        self._recent[rows] = -1

    def update(self, items: IntArray, popular_share: Floats, reward: Floats, steps: IntArray) -> LeaveDecision:
        window = self._recent[:, -self._rule.window :]
        counts = (self._tags[window] & (window >= 0)[:, :, None]).sum(axis=1)
        bored = ((counts > self._rule.threshold)[:, None, :] & self._tags[items]).any(axis=(1, 2))
        k = items.shape[1]
        self._recent[:, :-k] = self._recent[:, k:]
        self._recent[:, -k:] = items
        self.temper = np.where(bored, 0.0, self.temper - 1.0)
        return LeaveDecision(self.temper.copy(), np.zeros(len(items)), bored, bored)


@dataclass(frozen=True)
class NeverLeave:
    """Users stay until the environment's ``max_len`` truncates the session (fixed-length evaluation)."""

    rule: Literal["never"] = field(default="never", init=False, repr=False)

    def bind(self, batch_size: int, slate_size: int, max_len: int, world: WorldFacts) -> BoundLeaveRule:
        """See :class:`LeaveRule`."""
        return _BoundNeverLeave(batch_size, float(max_len + 1))


class _BoundNeverLeave(BoundLeaveRule):
    def update(self, items: IntArray, popular_share: Floats, reward: Floats, steps: IntArray) -> LeaveDecision:
        self.temper = self.temper - 1.0
        never = np.zeros(len(items), np.bool_)
        return LeaveDecision(self.temper.copy(), np.zeros(len(items)), never, never)


LEAVE_RULES: dict[str, TemperFairness | CategoryBoredom | NeverLeave] = {
    "temper": TemperFairness(),
    "strict": TemperFairness(ad_bound=0.1),
    "no_fairness": TemperFairness(unfair_penalty=0.0),
    "popular_only": TemperFairness(mode="popular_only"),
    "personal": TemperFairness(mode="personal"),
    "category": CategoryBoredom(),
    "never": NeverLeave(),
}
"""Rules by name, for ``gym.make(..., leave="strict")``."""


def rule_parameters(rule: LeaveRule) -> tuple[str, ...]:
    """Returns the names of a rule's parameters; none if it is no dataclass."""
    return tuple(part.name for part in fields(rule) if part.init) if is_dataclass(rule) else ()


RULE_PARAMETERS = tuple(dict.fromkeys(name for rule in LEAVE_RULES.values() for name in rule_parameters(rule)))
"""Parameters of the rules in :data:`LEAVE_RULES`, which environments take as settings of their own."""


def leave_rule(rule: LeaveRuleLike, parameters: Mapping[str, Any] | None = None) -> LeaveRule:
    """Returns a leave rule from any of the forms in which it may be written.

    Args:
        rule: A name of :data:`LEAVE_RULES`; the same with parameters, ``"temper:ad_bound=0.2,grace_steps=3"``; a
            mapping, ``{"rule": "temper", "ad_bound": 0.2}``; or the rule itself.
        parameters: Parameters by name that replace those of the rule.

    Raises:
        ValueError: If there is no such rule, it has no such parameter, or a value is not valid.
    """
    if isinstance(rule, str):
        rule = _parsed(rule)
    if isinstance(rule, Mapping):
        given = dict(rule)
        name = given.pop("rule", None)
        if name is None:
            raise ValueError(
                f"a leave rule as a mapping says which, as in {{'rule': 'temper', 'ad_bound': 0.2}}; got {dict(rule)}. "
                "A rule of your own is a Python object, which no JSON keeps: give the object itself"
            )
        if not isinstance(name, str) or name not in LEAVE_RULES:
            raise ValueError(f"no leave rule is called {name!r}; choose from {_known_rules()}, or give a LeaveRule")
        rule = _with_parameters(LEAVE_RULES[name], name, given)
    if not hasattr(rule, "bind"):
        raise ValueError(f"leave must be a LeaveRule or one of {_known_rules()}; got {rule!r}")
    return _with_parameters(rule, describe_rule(rule)["rule"], parameters) if parameters else rule


def plain_number(value: Any) -> Any:
    """Returns a NumPy number as a Python number, and anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def describe_rule(rule: LeaveRule) -> dict[str, Any]:
    """Returns a rule as a mapping, JSON-able; :func:`leave_rule` reads it unless the rule is of one's own."""
    own: dict[str, Any] = asdict(rule) if is_dataclass(rule) and not isinstance(rule, type) else {}
    return {"rule": type(rule).__name__} | {name: plain_number(value) for name, value in own.items()}


def rule_text(rule: LeaveRule) -> str:
    """Returns a rule as :func:`leave_rule` reads it: its name, and the parameters that differ from it.

    A rule of one's own, which cannot be read, gets the same form.
    """
    named = [name for name, known in LEAVE_RULES.items() if known == rule]
    if named:
        return named[0]
    described = describe_rule(rule)
    name = described.pop("rule")
    usual = describe_rule(LEAVE_RULES[name]) if name in LEAVE_RULES else {}
    changes = [f"{part}={value}" for part, value in described.items() if part not in usual or value != usual[part]]
    return f"{name}:{','.join(changes)}" if changes else str(name)


def _parsed(text: str) -> dict[str, Any]:
    """Returns the mapping behind ``"temper:ad_bound=0.2,grace_steps=3"``."""
    name, _, listed = text.partition(":")
    parameters: dict[str, Any] = {"rule": name.strip()}
    for entry in listed.split(",") if listed.strip() else ():
        parameter, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not parameter or not value or parameter in parameters:
            raise ValueError(
                "parameters of a leave rule are written as in 'temper:ad_bound=0.2,grace_steps=3', each once; "
                f"got {text!r}"
            )
        parameters[parameter] = _value(value)
    return parameters


def _value(text: str) -> Any:
    """Returns the number that a text stands for, None for ``none``, or else the text."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text) if re.search(r"[.eEn]", text) else int(text)
    except ValueError:
        return text


def _with_parameters(rule: LeaveRule, name: str, parameters: Mapping[str, Any]) -> LeaveRule:
    known = rule_parameters(rule)
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        takes = ", ".join(known) or "nothing"
        raise ValueError(f"the leave rule {name!r} has no parameter {', '.join(map(str, unknown))}; it takes {takes}")
    # A rule with parameters is a dataclass.
    return replace(rule, **parameters) if parameters else rule  # type: ignore[type-var]


def _known_rules() -> str:
    names: dict[tuple[str, ...], list[str]] = {}
    for name, rule in LEAVE_RULES.items():
        names.setdefault(rule_parameters(rule), []).append(name)
    return "; ".join(
        f"{', '.join(alike)} (parameters: {', '.join(parameters) or 'none'})" for parameters, alike in names.items()
    )
