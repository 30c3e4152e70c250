"""First slates of a policy: what it would show each user at the start of a session, as a distribution over items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrl_policies.ope.clicks import ClickModel
from kuaifair_env.adapters import Actor, check_agent, inference_mode, played, playing_sessions_of
from kuaifair_env.data.schema import IntArray
from kuaifair_env.errors import DataError
from kuaifair_env.evaluation import DEFAULT_SEED, binding
from kuaifair_env.simulator import FixedSessions

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.vector import VectorEnv
    from stable_baselines3.common.vec_env import VecEnv

    from kuaifair_env.adapters import Policy

_USERS_AT_ONCE = 256


class SlateDistribution(Protocol):
    """Items in the first slates of some users.

    The probability of an item is that of finding it at a place of the slate drawn at random: its probability of being
    in the slate over K. Over the items of a user these sum to 1.

    Attributes:
        users: ``int64 (U,)``, increasing user rows.
    """

    @property
    def users(self) -> NDArray[np.int64]:
        """``int64 (U,)``, increasing user rows."""
        ...

    def probabilities(self, places: IntArray, items: IntArray) -> NDArray[np.float64]:
        """Returns ``float64 (R,)``, the probability of ``items (R,)`` for the users at ``places (R,)`` of the list."""
        ...

    def mean(self, model: ClickModel) -> NDArray[np.float64]:
        """Returns ``float64 (U,)``, the mean over each user's distribution of what a model predicts."""
        ...

    def item_shares(self, weights: NDArray[np.float64], n_items: int) -> NDArray[np.float64]:
        """Returns ``float64 (N,)``, each item's probability over all users, who weigh ``weights (U,)``."""
        ...


@dataclass(frozen=True)
class SampledSlates:
    """Slates that a policy has drawn: one for each user where it is deterministic.

    Attributes:
        users: ``int64 (U,)``, increasing user rows.
        items: ``int64 (U, S, K)``, S slates of each user.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]

    def probabilities(self, places: IntArray, items: IntArray) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        flat = self._of_user()
        width = max(int(flat.max()), int(items.max(initial=0))) + 1
        keys, counts = np.unique(np.arange(len(flat))[:, None] * width + flat, return_counts=True)
        wanted = np.asarray(places, np.int64) * width + items
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, counts[at] / flat.shape[1], 0.0)

    def mean(self, model: ClickModel) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        return np.asarray(model.predict(self.users, self._of_user()).mean(axis=1, dtype=np.float64))

    def item_shares(self, weights: NDArray[np.float64], n_items: int) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        flat = self._of_user()
        shares = np.bincount(flat.ravel(), np.repeat(weights / weights.sum(), flat.shape[1]), n_items)
        return np.asarray(shares / flat.shape[1])

    def _of_user(self) -> NDArray[np.int64]:
        return self.items.reshape(len(self.users), -1)


@dataclass(frozen=True)
class SlateMarginals:
    """Probabilities of all items in first slates, for policies that know them.

    Attributes:
        users: ``int64 (U,)``, increasing user rows.
        table: ``(U, N)``, see :class:`SlateDistribution`; rows sum to 1.

    Raises:
        ValueError: If rows do not sum to 1, or an entry is negative.
    """

    users: NDArray[np.int64]
    table: NDArray[Any]

    def __post_init__(self) -> None:
        if not np.allclose(self.table.sum(axis=1, dtype=np.float64), 1.0, atol=1e-4) or self.table.min() < 0:
            raise ValueError("probabilities of a user's items are not negative and sum to 1; divide inclusion by K")

    @classmethod
    def uniform(cls, users: NDArray[np.int64], n_items: int) -> SlateMarginals:
        """Returns those of slates drawn uniformly at random."""
        return cls(users, np.broadcast_to(np.float64(1.0 / n_items), (len(users), n_items)))

    def probabilities(self, places: IntArray, items: IntArray) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        return np.asarray(self.table[places, items], np.float64)

    def mean(self, model: ClickModel) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        n_users, n_items = self.table.shape
        means = np.empty(n_users)
        for low in range(0, n_users, _USERS_AT_ONCE):
            part = slice(low, low + _USERS_AT_ONCE)
            users = self.users[part]
            predicted = model.predict(users, np.broadcast_to(np.arange(n_items), (len(users), n_items)))
            means[part] = np.einsum("un,un->u", self.table[part], predicted)
        return means

    def item_shares(self, weights: NDArray[np.float64], n_items: int) -> NDArray[np.float64]:
        """See :class:`SlateDistribution`."""
        return np.asarray(weights / weights.sum() @ self.table)


def first_slates(
    policy: Policy,
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
    users: IntArray,
    *,
    samples: int = 1,
    deterministic: bool = True,
    seed: int = DEFAULT_SEED,
    n_envs: int = 256,
    progress: bool = False,
) -> SampledSlates:
    """Has a policy choose the first slates of sessions; nobody's answer is read.

    Args:
        policy: As :func:`kuaifair_env.evaluate` takes it, controls included.
        env: Sessions as the policy observes them, in any form that ``evaluate`` takes.
        users: ``int (U,)``, increasing user rows of the data set.
        samples: Slates of each user. More than one helps where slates are random.
        deterministic: Passed to ``predict``.
        seed: Seed of the sessions; policies that draw slates by session follow it.
        n_envs: Concurrent sessions where the environment leaves it open.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If users of the world answer only what was logged, so that they have candidates of their own.
        ValueError: If the agent was trained on other observations or actions.
    """
    played_env = played(env, n_envs)
    if played_env.world.user_candidates is not None:
        raise DataError(
            "in a replay world users have candidates of their own, and no first slate is the policy's; give sessions "
            "of a world in which all candidates can be shown"
        )
    agent = getattr(policy, "__self__", policy)
    check_agent(agent, played_env)
    actor = Actor(policy, deterministic)
    sessions = FixedSessions.of_users(users, samples, seed)
    starts = np.ones(len(played_env.over), np.bool_)
    slates: list[NDArray[np.int64]] = []
    with (
        playing_sessions_of(played_env, sessions) as batches,
        inference_mode(agent),
        binding(policy, actor, batches, played_env.own_batch) as reads_masks,
        tqdm(total=len(sessions), unit="slate", disable=not progress, leave=False) as bar,
    ):
        while len(slates) * len(starts) < len(sessions):
            observation = played_env.reset()
            actor.state = None
            played_env.step(actor.act(observation, starts, played_env.action_masks() if reads_masks else None))
            slates.append(np.concatenate([batch.outcome.items for batch in batches if batch.outcome is not None]))
            bar.update(len(starts))
    shown = np.concatenate(slates)[: len(sessions)]
    return SampledSlates(np.asarray(users, np.int64), shown.reshape(len(users), samples, -1))
