"""The Gymnasium vector environment: one batch of sessions, not a list of single environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig, step_infos
from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.observations import split_observations
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.session_view import FixedSettings, SessionView, refuse_to_set
from kuaifair_env.simulator import Outcome
from kuaifair_env.world import World


class KuaiFairVectorEnv(FixedSettings, VectorEnv[Any, Any, Any]):
    """``num_envs`` sessions at once behind Gymnasium's vector API; see :class:`KuaiFairEnv` for the world itself.

    With the same seeds, row ``i`` plays the same sessions as a single environment that was reset with
    ``seed + i``. ``infos`` holds what Gymnasium's ``SyncVectorEnv`` would: arrays with a leading axis of
    ``num_envs`` and their ``_name`` masks (what a mask leaves out means nothing); finished sessions come under
    ``session``. In ``NEXT_STEP`` mode (Gymnasium's default) the step after a session's end resets it and ignores
    its action; in ``SAME_STEP`` mode the same step does, and ``final_obs`` and ``final_info`` (with ``session``)
    belong to the session that ended; in ``DISABLED`` mode call ``reset(options={"reset_mask": mask})``.

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
        self._views = [SessionView(self, row) for row in range(num_envs)]
        self._all = np.arange(num_envs)
        self._over = np.ones(num_envs, np.bool_)
        self._started = False

    def __repr__(self) -> str:
        return f"KuaiFairVectorEnv({self.num_envs} sessions, {self.config},\n{self.world})"

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Starts new sessions in all rows, or in those of ``options["reset_mask"]``.

        Args:
            seed: One seed for all (row ``i`` gets ``seed + i``), or one for each row, where None lets the row's
                stream of sessions go on. Rows that are not reset keep theirs.
            options: ``{"reset_mask": bool (num_envs,)}``.

        Raises:
            ValueError: If an option is unknown, the seeds or the mask do not fit, or the first reset has a mask.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        rows = self._rows_to_reset(options or {})
        self._seed(seed, rows)
        self.batch.reset(rows)
        self._over[rows] = False
        self._started = True
        return self.batch.observe(), self._start_infos(rows)

    def play(self, batch: SessionBatch) -> None:
        """Plays the sessions of another batch of ``num_envs`` from the next reset on, instead of random users."""
        self.batch = batch
        self._started = True

    def step(self, actions: Any) -> tuple[Any, NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Shows a slate in every running session.

        Raises:
            ValueError: If an action is not valid, there was no reset, or in ``DISABLED`` mode a session is over.
        """
        if not self._started:
            raise ValueError("there are no sessions yet; call reset() before step()")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._over.any():
            raise ValueError(f"sessions {np.flatnonzero(self._over).tolist()} are over; reset them with 'reset_mask'")
        over = self._over.copy()
        outcome = self.batch.step(np.asarray(actions), over)
        self._over = outcome.done & ~over
        infos = self._infos(outcome, ~over)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._reset_finished(self.batch.finished, infos)
        elif over.any():
            self._replace(np.flatnonzero(over), infos)
        reward = np.where(over, 0.0, outcome.reward)
        return self.batch.observe(), reward, outcome.terminated & ~over, outcome.truncated & ~over, infos

    def history_window(self, length: int | None = None) -> HistoryWindow:
        """Returns what users saw; see :meth:`KuaiFairEnv.history_window`."""
        return self.batch.history_window(length)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Returns an attribute of each :class:`~kuaifair_env.session_view.SessionView`."""
        return tuple(getattr(view, name) for view in self._views)

    def set_attr(self, name: str, values: Any) -> None:
        """Refuses: nothing that a running environment reads can be set.

        Raises:
            AttributeError: Always; see :func:`~kuaifair_env.session_view.refuse_to_set`.
        """
        refuse_to_set(name)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls a method of each session, or reads an attribute, as ``SyncVectorEnv`` does."""
        values = self.get_attr(name)
        return tuple(value(*args, **kwargs) if callable(value) else value for value in values)

    def action_masks(self) -> BoolArray:
        """Returns ``bool (num_envs, N)``, the items that may be shown now; once for each slot in ``slate`` mode."""
        return np.stack([self.batch.action_mask(row) for row in range(self.num_envs)])

    def _seed(self, seed: int | Sequence[int | None] | None, rows: IntArray) -> None:
        if isinstance(seed, (int, np.integer)):
            seeds: list[int | None] = [int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"need one seed for each of {self.num_envs} sessions, got {len(seeds)}")
        if not self._started:
            drawn = self.np_random.integers(2**63, size=self.num_envs).tolist()
            seeds = [drawn[row] if given is None else given for row, given in enumerate(seeds)]
        seeded = [row for row in rows.tolist() if seeds[row] is not None]
        if seeded:
            keys = [seeding.stream_key(int(cast(int, seeds[row]))) for row in seeded]
            self.batch.seed(np.asarray(keys, np.uint64), np.asarray(seeded))

    def _rows_to_reset(self, options: dict[str, Any]) -> IntArray:
        unknown = set(options) - {"reset_mask"}
        if unknown:
            raise ValueError(f"the only reset option is 'reset_mask', got {sorted(unknown)}")
        if "reset_mask" not in options:
            return self._all
        mask = np.asarray(options["reset_mask"])
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"reset_mask must be bool ({self.num_envs},), got {mask.dtype} {mask.shape}")
        if not mask.any():
            raise ValueError("reset_mask picks no session; at least one entry must be True")
        if not self._started:
            raise ValueError("the first reset starts all sessions; give it no reset_mask")
        return np.flatnonzero(mask)

    def _reset_finished(self, finished: IntArray, infos: dict[str, Any]) -> None:
        if len(finished) == 0:
            return
        final_obs = np.full(self.num_envs, None, object)
        for row, last in zip(finished.tolist(), split_observations(self.batch.observe(finished)), strict=True):
            final_obs[row] = last
        ended = self._over.copy()
        running = ~ended
        final_info = {name: ended if name.startswith("_") else array for name, array in infos.items()}
        del infos["session"], infos["_session"]
        infos |= {name: running for name in infos if name.startswith("_")}
        self._replace(finished, infos)
        self._over[:] = False
        infos |= {"final_obs": final_obs, "_final_obs": ended, "final_info": final_info, "_final_info": ended}

    def _replace(self, rows: IntArray, infos: dict[str, Any]) -> None:
        """Starts new sessions in some rows and says so, as ``reset`` does."""
        self.batch.reset(rows)
        starts = self._start_infos(rows)
        infos["user_id"] = starts["user_id"]
        infos["temper"] = np.where(starts["_temper"], starts["temper"], infos["temper"])
        infos["_user_id"] = infos["_temper"] = infos["_user_id"] | starts["_user_id"]
        infos["fingerprint"], infos["_fingerprint"] = starts["fingerprint"], starts["_fingerprint"]

    def _start_infos(self, rows: IntArray) -> dict[str, Any]:
        mask = np.zeros(self.num_envs, np.bool_)
        mask[rows] = True
        return {
            "user_id": self.batch.user_ids,
            "_user_id": mask,
            "temper": self.batch.simulator.temper.copy(),
            "_temper": mask,
            "fingerprint": self._fingerprints(),
            "_fingerprint": mask,
        }

    def _fingerprints(self) -> NDArray[Any]:
        fingerprints = np.empty(self.num_envs, object)
        fingerprints[:] = str(self.world.fingerprint)
        return fingerprints

    def _infos(self, outcome: Outcome, live: BoolArray) -> dict[str, Any]:
        infos: dict[str, Any] = step_infos(outcome, self.batch)
        infos |= {f"_{name}": live for name in infos}
        if self.batch.finished_records is not None:
            infos["session"] = self._session_infos(self.batch.finished_records)
            infos["_session"] = self._over.copy()
        return infos

    def _session_infos(self, records: EpisodeRecords) -> dict[str, Any]:
        session: dict[str, Any] = {}
        over = self._over.copy()
        for name, column in records.columns().items():
            session[name] = np.zeros(self.num_envs, column.dtype)
            session[name][self.batch.finished] = column
            session[f"_{name}"] = over
        return session
