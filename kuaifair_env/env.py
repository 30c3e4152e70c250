"""The Gymnasium environment: one session at a time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from kuaifair_env import seeding
from kuaifair_env.abandonment import leave_rule
from kuaifair_env.batch import SessionBatch, SessionConfig, step_info
from kuaifair_env.data.schema import BoolArray, raw_id
from kuaifair_env.observations import take_rows
from kuaifair_env.render import SessionRecorder, render_ansi, render_rgb
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.session_view import FixedSettings, refuse_to_set
from kuaifair_env.settings import lists_settings
from kuaifair_env.world import World

_FIRST_ROW = np.zeros(1, np.int64)
# Attributes that are read when an environment is made, and never again.
_FIXED = {"world", "config", "batch", "action_space", "observation_space", "render_mode", "user_id", "temper"}


@lists_settings("world", "sessions", "leave rule")
class KuaiFairEnv(FixedSettings, gym.Env[Any, Any]):
    """A user scrolls; the agent picks each slate; unequal exposure makes the user leave early.

    ## Description

    One episode is one session of one user. At each step the agent shows a slate of ``K`` items, the user clicks
    some, and loses patience (temper): faster with dull slates, and faster still with slates in which popular and
    long-tail items are unequally present. The session ends when the temper falls below 1.

    ## Action space

    | ``action_mode`` | space | meaning |
    |---|---|---|
    | ``embedding`` | ``Box(-1, 1, (d,))`` | the top-K items by inner product with the item embeddings are shown |
    | ``slate`` | ``SlateSpace(N, K)``, a ``MultiDiscrete`` | ``K`` distinct items in order (see ``duplicates``) |
    | ``item`` | ``Discrete(N)`` | one item, ``K = 1`` |

    ## Observation space

    | ``observation_mode`` | space | meaning |
    |---|---|---|
    | ``state`` | ``Box((d,))`` | the observed state: mean embedding of the clicked items in the history window |
    | ``history`` | ``Dict`` | the state, the window's items and clicks, and the user's features |

    With ``session_clock=True`` the state has one more component at its end: steps taken / Max Len.

    ## Rewards

    The mean feedback over the slate, ``r_t`` in [0, 1] for clicks (``reward="sum"``: the sum, in [0, K]).

    ## Starting state

    A user drawn uniformly, with the last ``H`` exposures of the training log as history
    (``initial_history="empty"``: none). ``reset(options={"user_id": 7})`` picks the user, ``"session_key"`` (an
    integer) the randomness of the session.

    ## Episode end

    ``terminated``: the user left (see :class:`kuaifair_env.abandonment.TemperFairness`). ``truncated``: the user is
    still there, and ``max_len`` steps were taken, which the default rule does not allow, or (in replays) the user has
    fewer candidates left than fill a slate.

    ## Info

    ``reset``: ``user_id``, ``temper`` and ``fingerprint`` (of the world, in short). Each step: ``items`` (rows of the
    candidates, as actions name them), ``item_ids`` (their raw ids), ``clicks``, ``feedback``, ``popular_share``,
    ``disparity``, ``temper``, ``violation``, ``user_id`` (raw). At the end of an episode also ``session``: ``len``,
    ``r_cum``, ``r_each``, ``ad``, ``signed_gap``, ``popular_share``, ``violation_rate``, ``gini``, ``coverage``,
    ``left``, ``user_id``.

    ## Arguments

    ``gym.make(id, ...)`` and every other form take the settings at the end of this text as keywords;
    ``KuaiFairEnv`` itself takes a world and a configuration.

    ## Version history

    * v0: first release.

    Args:
        world: Users, items and their response.
        config: How sessions run; the defaults of :class:`~kuaifair_env.batch.SessionConfig` if None.
        render_mode: ``"ansi"``, ``"rgb_array"`` or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, world: World, config: SessionConfig | None = None, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be one of {self.metadata['render_modes']} or None, got {render_mode!r}")
        # SyncVectorEnv writes its autoreset mode into what it finds here (before Gymnasium 1.4).
        self.metadata = dict(self.metadata)
        self.config = SessionConfig() if config is None else config
        self.world = world
        self.batch = SessionBatch(world, self.config, 1)
        self.action_space = self.batch.action_space
        self.observation_space = self.batch.observation_space
        self.render_mode = render_mode
        self._recorder = None if render_mode is None else SessionRecorder(world, leave_rule(self.config.leave))
        self._seeded = False
        self._over = True

    def __repr__(self) -> str:
        return f"KuaiFairEnv({self.config},\n{self.world})"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a session; see the class for ``options``.

        Raises:
            ValueError: If an option or the user is unknown.
        """
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            key = seeding.stream_key(seed) if seed is not None else self.np_random.integers(2**63)
            self.batch.seed(np.asarray([key], np.uint64))
            self._seeded = True
        self.batch.reset(_FIRST_ROW, self.batch.chosen_sessions(_FIRST_ROW, [options]) if options else None)
        self._over = False
        if self._recorder is not None:
            self._recorder.start(self.batch.simulator)
        return self._observation(), {
            "user_id": self.user_id,
            "temper": self.temper,
            "fingerprint": str(self.world.fingerprint),
        }

    def play(self, batch: SessionBatch) -> None:
        """Plays the sessions of another batch of one from the next reset on, instead of random users."""
        self.batch = batch
        self._seeded, self._over = True, True
        if self._recorder is not None:
            self._recorder = SessionRecorder(self.world, leave_rule(self.config.leave))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Shows a slate.

        Raises:
            ValueError: If the action is not valid, or the session is over.
        """
        if self._over:
            raise ValueError("the session is over; call reset() before step()")
        outcome = self.batch.step(np.asarray(action)[None])
        if self._recorder is not None:
            self._recorder.add(outcome)
        terminated, truncated = outcome.terminated.item(), outcome.truncated.item()
        info = step_info(outcome, self.batch, 0)
        if terminated or truncated:
            self._over = True
            assert self.batch.finished_records is not None
            info["session"] = self.batch.finished_records.infos()[0]
        return self._observation(), outcome.reward.item(), terminated, truncated, info

    def render(self) -> Any:
        """Returns the session so far as text or picture; None without a ``render_mode``."""
        if self._recorder is None:
            gym.logger.warn("render() needs render_mode='ansi' or 'rgb_array' in gym.make")
            return None
        if not self._recorder.started:
            raise ValueError("there is no session yet; call reset() before render()")
        trace = self._recorder.trace()
        return render_ansi(trace) if self.render_mode == "ansi" else render_rgb(trace)

    def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool:
        """Sets an attribute of a subclass; see ``gymnasium.Env.set_wrapper_attr``.

        Raises:
            AttributeError: If there is none of that name, or setting it has no effect.
        """
        if name in _FIXED or not hasattr(self, name):
            refuse_to_set(name)
        return super().set_wrapper_attr(name, value, force=force)

    @property
    def user_id(self) -> int | str:
        """Raw id of the current user."""
        return raw_id(self.batch.user_ids[0])

    @property
    def temper(self) -> float:
        """The current user's patience."""
        return float(self.batch.simulator.temper[0])

    def history_window(self, length: int | None = None) -> HistoryWindow:
        """Returns what the user saw, newest last, with a leading axis of 1.

        Args:
            length: How many places, padded at the front where there are fewer; None takes the log context and the
                whole session, ``H + max_len K`` places.
        """
        return self.batch.history_window(length)

    @property
    def finished_window(self) -> HistoryWindow | None:
        """What the user saw (see :meth:`history_window`) if the last step ended the session, else None."""
        return self.batch.finished_window

    def action_masks(self) -> BoolArray:
        """Returns ``bool (N,)``, the items that may be shown now (repeated for each slot in ``slate`` mode)."""
        return self.batch.action_mask(0)

    def _observation(self) -> Any:
        return take_rows(self.batch.observe(), 0)
