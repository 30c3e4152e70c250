"""Every setting of an environment with its values, default and meaning, as ``gym.make`` and all other forms take it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from kuaifair_env.abandonment import LEAVE_RULES, RULE_PARAMETERS
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.popularity import POPULAR_SHARE
from kuaifair_env.embeddings import EMBEDDING_DIM
from kuaifair_env.world import HISTORY_LENGTH, WorldEncoder

if TYPE_CHECKING:
    from kuaifair_env.abandonment import LeaveRuleLike
    from kuaifair_env.actions import ActionMode, Duplicates
    from kuaifair_env.data.clicks import FeedbackKind, Positive
    from kuaifair_env.data.popularity import PopularitySource
    from kuaifair_env.data.schema import Split
    from kuaifair_env.metrics.fairness import DisparityMode
    from kuaifair_env.observations import ObservationMode
    from kuaifair_env.origins import Source
    from kuaifair_env.response.fitting import ResponseKind
    from kuaifair_env.simulator import InitialHistory, Repeats, RewardForm
    from kuaifair_env.synthetic.config import TasteStrength

Part = Literal["world", "sessions", "leave rule"]
Documented = TypeVar("Documented", bound=Callable[..., Any])

_WIDTH = 112


class WorldSettings(TypedDict, total=False):
    """Settings of a world; see :data:`SETTINGS`."""

    split: Split
    data_dir: str | Path | None
    source: Source
    allow_partial: bool
    positive: Positive | None
    feedback: FeedbackKind
    clip: float | None
    response: ResponseKind
    taste: TasteStrength | float
    conformity: float
    embedding_dim: int
    history_length: int
    popularity: PopularitySource
    popularity_share: float
    min_candidates: int | None
    encoder: WorldEncoder | None


class Settings(WorldSettings, total=False):
    """Settings that ``gym.make`` takes: those of a world and those of its sessions; see :data:`SETTINGS`.

    The latter are the fields of ``SessionConfig`` and the parameters of its leave rule.
    """

    max_len: int
    slate_size: int | None
    action_mode: ActionMode
    observation_mode: ObservationMode
    session_clock: bool
    leave: LeaveRuleLike
    initial_history: InitialHistory
    repeats: Repeats
    duplicates: Duplicates
    reward: RewardForm
    drift: float | None
    ad_bound: float
    unfair_penalty: float
    mode: DisparityMode
    target_share: float
    window: int | None
    grace_steps: int
    initial_temper: float | None
    threshold: int


@dataclass(frozen=True)
class Setting:
    """A setting of an environment.

    Attributes:
        name: The keyword.
        part: What it is a setting of.
        values: What it may be.
        default: What it is if not given.
        meaning: What it does, in a sentence or two.
    """

    name: str
    part: Part
    values: str
    default: Any
    meaning: str


def _world(name: str, values: str, default: Any, meaning: str) -> Setting:
    return Setting(name, "world", values, default, meaning)


def _sessions(name: str, values: str, meaning: str) -> Setting:
    return Setting(name, "sessions", values, getattr(SessionConfig, name), meaning)


def _rule(name: str, values: str, meaning: str) -> Setting:
    defaults = (getattr(rule, name) for rule in LEAVE_RULES.values() if hasattr(rule, name))
    return Setting(name, "leave rule", values, next(defaults), meaning)


SETTINGS: tuple[Setting, ...] = (
    _world("split", "'train', 'test'", "train", "World that agents learn in, or the one they are evaluated in."),
    _world(
        "data_dir",
        "path",
        None,
        "Folder or archive with the official files, which synthetic ids ignore; None is KUAIFAIR_DATA, else the cache.",
    ),
    _world(
        "source",
        "'auto', 'real', 'twin'",
        "auto",
        "'real' takes the whole official files and nothing else, 'twin' the synthetic twin; 'auto' the files that "
        "there are, with a warning if they are not the whole official ones, and the twin with a warning where no place "
        "was named and the cache has none.",
    ),
    _world(
        "allow_partial",
        "bool",
        False,
        "A part of the official files is welcome: 'real' takes it, 'auto' says nothing; results say that it is a part.",
    ),
    _world(
        "positive",
        "name, mapping",
        None,
        "What counts as a click: {'watch_ratio': 1.0}, KuaiRec's default, or another threshold; for KuaiRand and the "
        "toy 'is_click', their default, another logged column, or weights of several.",
    ),
    _world(
        "feedback",
        "'click', 'watch_ratio'",
        "click",
        "KuaiRec: 'watch_ratio' rewards the watch ratio itself instead of the click.",
    ),
    _world("clip", "number", None, "Largest watch ratio as feedback; None is 5."),
    _world(
        "response",
        "'auto', 'observed', 'factorised', 'sequential'",
        "auto",
        "Model of how users respond; 'auto' suits the data: observed where the log covers everything, a twin's truth.",
    ),
    _world(
        "taste",
        "'measured', 'strong', number",
        "measured",
        "Twins: strength of users' own tastes, or its standard deviation in logits.",
    ),
    _world(
        "conformity",
        "number",
        0.0,
        "Twins: share of the training world's conformity that users of the test world have; an error elsewhere.",
    ),
    _world("embedding_dim", "integer", EMBEDDING_DIM, "Size d of item embeddings, states and actions, at most 4,096."),
    _world("history_length", "integer", HISTORY_LENGTH, "Places H in a history window."),
    _world(
        "popularity",
        "'train', 'shown'",
        "train",
        "What popularity is counted in: exposures in the training log, or the platform's own counts.",
    ),
    _world("popularity_share", "number in (0, 1)", POPULAR_SHARE, "Share of the candidates that are called popular."),
    _world(
        "min_candidates",
        "integer",
        None,
        "Replays: candidates that a user of the test world needs; None is 5, or the slate size where that is larger.",
    ),
    _world("encoder", "dsrm.encoder.Encoder", None, "Pretrained encoder in place of the world's own embeddings."),
    _sessions("max_len", "integer", "Max Len of the paper: the temper that a user starts with, and the cap in steps."),
    _sessions("slate_size", "integer", "Items per slate K; None is 10, 5 in replays, 1 in 'item' mode."),
    _sessions("action_mode", "'embedding', 'slate', 'item'", "What an action is: a query, a slate, or one item."),
    _sessions("observation_mode", "'state', 'history'", "What is observed: the state, or the window behind it too."),
    _sessions("session_clock", "bool", "Whether the state ends with steps taken / Max Len, never the temper."),
    _sessions(
        "leave",
        "name, text, mapping, LeaveRule",
        f"When users leave: {', '.join(LEAVE_RULES)}; with parameters as 'temper:ad_bound=0.2' or "
        "{'rule': 'temper', 'ad_bound': 0.2}.",
    ),
    _sessions("initial_history", "'log', 'empty'", "Sessions start from the user's training log, or cold."),
    _sessions(
        "repeats",
        "'allow', 'forbid'",
        "Whether an item may be shown more than once in a session; in replays it may not.",
    ),
    _sessions(
        "duplicates",
        "'error', 'replace'",
        "An item twice in a slate ('slate' mode) is an error, or replaced by the most similar one.",
    ),
    _sessions("reward", "'mean', 'sum'", "Form of the reward: mean or sum of the slate's feedback."),
    _sessions(
        "drift",
        "number",
        "Slates after which a user's taste correlates by .5 with that at the session's start; None lets tastes stay.",
    ),
    _rule("ad_bound", "number in [0, 1]", "Disparity |2p - 1| of a popular share p from which a slate is unfair."),
    _rule("unfair_penalty", "number", "Temper lost to an unfair slate; 0 switches the fairness part off."),
    _rule(
        "mode",
        "'parity', 'popular_only', 'target', 'personal'",
        "How a popular share becomes a disparity: by its distance to half, above half, to target_share, or to what the "
        "user tolerates.",
    ),
    _rule("target_share", "number in [0, 1]", "Popular share that mode='target' calls fair."),
    _rule(
        "window",
        "integer",
        "Slates over which the share is taken; None is as many as make 4 items. In 'category': items that count, 10.",
    ),
    _rule("grace_steps", "integer", "First steps of a session that are not evaluated."),
    _rule("initial_temper", "number", "Temper that a user starts with; None is max_len."),
    _rule("threshold", "integer", "Repeats of a tag that a user of 'category' forgives."),
)
"""All of them, in the order in which they are explained."""

DEFAULTS: dict[str, Any] = {setting.name: setting.default for setting in SETTINGS}

SESSION_SETTINGS = (*(field.name for field in fields(SessionConfig)), *RULE_PARAMETERS)
"""Names of those that are the sessions', parameters of the leave rule among them; the others are the world's."""


def lists_settings(*parts: Part) -> Callable[[Documented], Documented]:
    """Returns a decorator that appends the settings of some parts to a docstring."""
    lines = [
        textwrap.fill(
            f"{setting.name}={setting.default!r} ({setting.values}): {setting.meaning}",
            _WIDTH,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for setting in SETTINGS
        if setting.part in parts
    ]
    text = f"\n    Settings, with their defaults:\n{chr(10).join(lines)}\n    "

    def documented(target: Documented) -> Documented:
        # Python drops docstrings where it is told to (-OO).
        if target.__doc__ is not None:
            target.__doc__ = target.__doc__.rstrip() + "\n" + text
        return target

    return documented
