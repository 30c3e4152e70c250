"""The Gymnasium vector environment: a truly batched one, not a list of single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kuaifair_env import random_streams
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig
from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sessions import Outcome
from kuaifair_env.worlds import World


class KuaiFairVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` sessions at once behind Gymnasium's vector API; see :class:`KuaiFairEnv` for the world itself.

    With the same seeds, row ``i`` plays the same sessions as a single environment that was reset with
    ``seed + i``. ``infos`` holds arrays with a leading axis of ``num_envs`` and their ``_name`` masks; finished
    sessions come under ``session``. In ``SAME_STEP`` mode ``final_obs`` and ``final_info`` belong to the finished
    session, in ``NEXT_STEP`` mode (Gymnasium's default) the step after a session's end resets it and ignores its
    action, in ``DISABLED`` mode call ``reset(options={"reset_mask": mask})``.

    Args:
        world: Users, items and their response.
        config: How sessions run.
        num_envs: Number of concurrent sessions.
        autoreset_mode: When a finished session is replaced.
    """

    def __init__(
        self,
        world: World,
        config: SessionConfig | None = None,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        self.config = SessionConfig() if config is None else config
        self.world = world
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**KuaiFairEnv.metadata, "render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.batch = SessionBatch(world, self.config, num_envs)
        self.single_action_space = self.batch.action_space
        self.single_observation_space = self.batch.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._all = np.arange(num_envs)
        self._over = np.ones(num_envs, np.bool_)
        self._seeded = False

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Starts new sessions in all rows, or in those of ``options["reset_mask"]``.

        Args:
            seed: One seed for all (row ``i`` gets ``seed + i``), or one for each row.
            options: ``{"reset_mask": bool (num_envs,)}``.

        Raises:
            ValueError: If an option is unknown or the seeds or the mask have the wrong length.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        self._seed(seed)
        rows = self._rows_to_reset(options or {})
        self.batch.reset(rows)
        self._over[rows] = False
        return self.batch.observe(), self._start_infos(rows)

    def step(self, actions: Any) -> tuple[Any, NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Shows a slate in every running session.

        Raises:
            ValueError: If an action is not valid, or in ``DISABLED`` mode a session is over.
        """
        if self.autoreset_mode is AutoresetMode.DISABLED and self._over.any():
            raise ValueError(
                f"sessions {np.flatnonzero(self._over).tolist()} are over; reset them with 'reset_mask'"
            )
        over = self._over.copy()
        outcome = self.batch.step(np.asarray(actions), over)
        self._over = outcome.done & ~over
        infos = self._infos(outcome, ~over)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._reset_finished(self.batch.finished, infos)
        elif over.any():
            self.batch.reset(np.flatnonzero(over))
        reward = np.where(over, 0.0, outcome.reward)
        return self.batch.observe(), reward, outcome.terminated & ~over, outcome.truncated & ~over, infos

    def history_window(self) -> HistoryWindow:
        """Returns the windows of items and clicks behind the observations."""
        return self.batch.history_window()

    def action_masks(self) -> BoolArray:
        """Returns ``bool (num_envs, N)``, the items that may be shown now."""
        return self.batch.action_masks()

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None and self._seeded:
            return
        if seed is None or isinstance(seed, (int, np.integer)):
            first = int(self.np_random.integers(2**31)) if seed is None else int(seed)
            keys = random_streams.stream_keys(first, self.num_envs)
        else:
            if len(seed) != self.num_envs:
                raise ValueError(f"need one seed for each of {self.num_envs} sessions, got {len(seed)}")
            seeds = [int(self.np_random.integers(2**31)) if one is None else int(one) for one in seed]
            keys = np.asarray([random_streams.stream_key(one) for one in seeds], np.uint64)
        self.batch.seed(keys)
        self._seeded = True

    def _rows_to_reset(self, options: dict[str, Any]) -> IntArray:
        unknown = set(options) - {"reset_mask"}
        if unknown:
            raise ValueError(f"the only reset option is 'reset_mask', got {sorted(unknown)}")
        if "reset_mask" not in options:
            return self._all
        mask = np.asarray(options["reset_mask"])
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"reset_mask must be bool ({self.num_envs},), got {mask.dtype} {mask.shape}")
        return np.flatnonzero(mask)

    def _reset_finished(self, finished: IntArray, infos: dict[str, Any]) -> None:
        if len(finished) == 0:
            return
        last = self.batch.observe()
        infos["final_obs"] = np.full(self.num_envs, None, object)
        for row in finished:
            infos["final_obs"][row] = (
                {name: part[row] for name, part in last.items()} if isinstance(last, dict) else last[row]
            )
        mask = self._over.copy()
        infos["_final_obs"] = mask
        infos["final_info"] = {name: part for name, part in infos.items() if "final_obs" not in name}
        infos["_final_info"] = mask
        self.batch.reset(finished)
        self._over[:] = False

    def _start_infos(self, rows: IntArray) -> dict[str, Any]:
        mask = np.zeros(self.num_envs, np.bool_)
        mask[rows] = True
        return {
            "user_id": self.batch.user_ids,
            "_user_id": mask,
            "temper": self.batch.simulator.temper.copy(),
            "_temper": mask,
        }

    def _infos(self, outcome: Outcome, live: BoolArray) -> dict[str, Any]:
        infos: dict[str, Any] = {
            "items": outcome.items,
            "clicks": outcome.clicks,
            "feedback": outcome.feedback,
            "popular_share": outcome.popular_share,
            "disparity": outcome.disparity,
            "temper": outcome.temper,
            "violation": outcome.violation,
            "user_id": self.batch.user_ids,
        }
        infos |= {f"_{name}": live for name in infos}
        if self.batch.finished_records is not None:
            infos["session"] = self._session_infos(self.batch.finished_records)
            infos["_session"] = self._over.copy()
        return infos

    def _session_infos(self, records: EpisodeRecords) -> dict[str, Any]:
        session: dict[str, Any] = {}
        for name, column in records.columns().items():
            session[name] = np.zeros(self.num_envs, column.dtype)
            session[name][self.batch.finished] = column
            session[f"_{name}"] = self._over.copy()
        return session
