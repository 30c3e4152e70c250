"""The Stable-Baselines3 environment: a native ``VecEnv`` over one batch of sessions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import Wrapper
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from kuaifair_env import seeding
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig, step_info
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.observations import replace_rows, split_observations, take_rows
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.session_view import FixedSettings, SessionView, refuse_to_set
from kuaifair_env.simulator import Outcome
from kuaifair_env.world import World

InfoLevel = Literal["episode", "step"]


class KuaiFairVecEnv(FixedSettings, VecEnv):
    """``n_envs`` sessions at once behind Stable-Baselines3's ``VecEnv``; see ``KuaiFairEnv`` for the world itself.

    Finished sessions are replaced in the same step; ``infos[i]`` then holds ``terminal_observation``,
    ``TimeLimit.truncated``, ``episode`` (``r``, ``l`` and the seconds ``t``, as ``Monitor`` writes them) and
    ``session`` (the record of :class:`~kuaifair_env.batch.EpisodeRecords`). ``set_options`` takes what
    ``KuaiFairEnv.reset`` does, for the next reset. With ``info_level="step"`` every step's info also has
    what ``KuaiFairEnv`` reports; the default leaves running sessions' infos empty, since filling thousands of
    dicts a second costs more than the simulation. ``batch.outcome`` has all of it as arrays either way.

    Args:
        world: Users, items and their response.
        config: How sessions run.
        n_envs: Number of concurrent sessions.
        seed: Row ``i`` plays the sessions of a single environment reset with ``seed + i``; None draws a seed.
        info_level: ``"episode"`` or ``"step"``.
    """

    def __init__(
        self,
        world: World,
        config: SessionConfig | None = None,
        n_envs: int = 64,
        seed: int | None = None,
        info_level: InfoLevel = "episode",
    ) -> None:
        if info_level not in ("episode", "step"):
            raise ValueError(f"info_level must be 'episode' or 'step', got {info_level!r}")
        self.config = SessionConfig() if config is None else config
        self.world = world
        self.batch = SessionBatch(world, self.config, n_envs)
        self.info_level = info_level
        # SB3's constructor already asks these for their render_mode.
        self._views = [SessionView(self, row) for row in range(n_envs)]
        self._actions: NDArray[Any] | None = None
        self._all = np.arange(n_envs)
        self._started = False
        self._made_at = time.perf_counter()
        super().__init__(n_envs, self.batch.observation_space, self.batch.action_space)
        self.seed(seed)
        self._apply_seeds()

    def __repr__(self) -> str:
        return f"KuaiFairVecEnv({self.num_envs} sessions, {self.config},\n{self.world})"

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds all rows at the next reset: row ``i`` gets ``seed + i``."""
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._seeds = [seed + row for row in range(self.num_envs)]
        return list(self._seeds)

    def reset(self) -> Any:
        """Starts new sessions in all rows and returns their observations.

        Raises:
            ValueError: If an option that :meth:`set_options` noted, or its user, is unknown.
        """
        self._apply_seeds()
        options = self._options
        self._reset_options()
        self.batch.reset(self._all, self.batch.chosen_sessions(self._all, options) if any(options) else None)
        self._started = True
        tempers = self.batch.simulator.temper.tolist()
        fingerprint = str(self.world.fingerprint)
        self.reset_infos = [
            {"user_id": user_id, "temper": temper, "fingerprint": fingerprint}
            for user_id, temper in zip(self.batch.user_ids.tolist(), tempers, strict=True)
        ]
        return self.batch.observe()

    def count_sessions_from(self, started: int) -> None:
        """Goes on with the count of sessions, by which blocks of a randomised world go, as if so many had started."""
        self._apply_seeds()  # which would start the count anew later on
        self.batch.simulator.started = started

    def play(self, batch: SessionBatch) -> None:
        """Plays the sessions of another batch of ``num_envs`` from the next reset on, instead of random users."""
        self.batch = batch
        self._reset_seeds()
        self._reset_options()

    def _apply_seeds(self) -> None:
        """Applies seeds that wait for the next reset, which would put random users in place of another source."""
        if any(seed is not None for seed in self._seeds):
            keys = [seeding.stream_key(int(seed)) for seed in self._seeds if seed is not None]
            self.batch.seed(np.asarray(keys, np.uint64))
            self._reset_seeds()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Notes the actions; see :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, NDArray[np.float32], BoolArray, list[dict[str, Any]]]:
        """Shows a slate in every session and replaces the finished ones.

        Raises:
            ValueError: If an action is not valid, or there was no reset or no :meth:`step_async`.
        """
        if self._actions is None:
            raise ValueError("step_wait() needs step_async(actions) first")
        if not self._started:
            raise ValueError("there are no sessions yet; call reset() before step()")
        outcome = self.batch.step(np.asarray(self._actions))
        self._actions = None
        infos = self._step_infos(outcome)
        observation = self.batch.observe()
        if self.batch.finished_records is not None:
            self._add_final_infos(self.batch.finished_records, outcome, observation, infos)
            self.batch.reset(self.batch.finished)
            observation = replace_rows(observation, self.batch.finished, self.batch.observe(self.batch.finished))
        return observation, outcome.reward.astype(np.float32), outcome.done, infos

    def history_window(self, length: int | None = None) -> HistoryWindow:
        """Returns what users saw; see ``KuaiFairEnv.history_window``."""
        return self.batch.history_window(length)

    def close(self) -> None:
        """Does nothing; there is nothing to close."""

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Returns no pictures; render a single environment instead."""
        return [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of each :class:`~kuaifair_env.session_view.SessionView`."""
        return [getattr(self._views[row], attr_name) for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuses: nothing that a running environment reads can be set.

        Raises:
            AttributeError: Always; see :func:`~kuaifair_env.session_view.refuse_to_set`.
        """
        refuse_to_set(attr_name)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method of each :class:`~kuaifair_env.session_view.SessionView`."""
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type[Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Says that no session is wrapped: wrap the whole ``VecEnv`` instead."""
        return [False for _ in self._get_indices(indices)]

    def _step_infos(self, outcome: Outcome) -> list[dict[str, Any]]:
        if self.info_level == "episode":
            return [{} for _ in range(self.num_envs)]
        return [step_info(outcome, self.batch, row) for row in range(self.num_envs)]

    def _add_final_infos(
        self, records: EpisodeRecords, outcome: Outcome, observation: Any, infos: list[dict[str, Any]]
    ) -> None:
        seconds = round(time.perf_counter() - self._made_at, 6)
        finished = self.batch.finished
        last = split_observations(take_rows(observation, finished))
        truncated = outcome.truncated[finished].tolist()
        sessions = zip(finished.tolist(), last, truncated, records.infos(), strict=True)
        for row, last_observation, is_truncated, session in sessions:
            infos[row] |= {
                "terminal_observation": last_observation,
                "TimeLimit.truncated": is_truncated,
                "episode": {"r": session["r_cum"], "l": session["len"], "t": seconds},
                "session": session,
            }


def world_beneath(env: VecEnv) -> World | None:
    """Returns the world of the KuaiFair sessions beneath a ``VecEnv``; None if there are none."""
    if isinstance(env.unwrapped, KuaiFairVecEnv):
        return env.unwrapped.world
    try:
        world = env.get_attr("world", indices=0)[0]
    except AttributeError:
        return None
    return world if isinstance(world, World) else None
