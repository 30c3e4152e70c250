"""DNaIR: double DQN over items that resemble what a session liked, rewarded for novelty of good quality.

Shi et al., Relieving popularity bias in interactive recommendation: a diversity-novelty-aware reinforcement learning
approach, ACM TOIS 42(2), 2023. Their released code trains one network per user, squashes Q into (-1, 1), and computes
similarity, popularity and quality over the whole data set, test rows included. This is the online form over many
users, with all tables from the training log alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from scipy import sparse
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update, update_learning_rate
from torch import Tensor, nn
from typing_extensions import Unpack

from hrl_policies.common.item_agent import ItemAgent, ItemAgentArguments, ItemNet, ItemPolicy, ItemPolicyArguments
from hrl_policies.common.sessions import allowed_items
from hrl_policies.common.slates import MASKED, Column, ExecutedSlates, SlateReplaySamples, slate_shape
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.observations import reached_observations
from kuaifair_env.ranking import top_k
from kuaifair_env.world import World

DNaIRMode = Literal["native", "kuaisim"]
AccuracyKind = Literal["env", "itemcf"]

_CANDIDATES, _ACCURACY = "next_candidates", "accuracy"

NEIGHBOURS = 50
LIKED = 10
_DECAY = 0.9
_ITEMS_AT_ONCE = 512
# Small against any similarity: it only orders items that resemble none of the liked ones.
_QUALITY_WEIGHT = 1e-6


@dataclass(frozen=True)
class ItemTables:
    """Statistics of items in the training log of a world.

    The first ``N`` of ``M`` items are the candidates, in the environment's order.

    Attributes:
        exposures: ``int64 (M,)``, how often each item was shown.
        clicks: ``int64 (M,)``, how often it was clicked.
        neighbours: ``int64 (M, S)``, the ``S`` candidates most similar to each item, best first, never the item itself.
        similarities: ``float32 (M, S)``, their item-CF cosine; 0 where no user clicked both.
    """

    exposures: NDArray[np.int64]
    clicks: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    similarities: FloatArray

    @classmethod
    def of_world(cls, world: World, neighbours: int = NEIGHBOURS) -> ItemTables:
        """Counts a world's training log.

        Args:
            world: Either world of a pair; both hold the same training log.
            neighbours: Similar candidates ``S`` to keep of each item; fewer where there are not as many. 0 keeps
                none, and saves the time to find them.

        Raises:
            ValueError: If ``neighbours`` is negative.
        """
        if neighbours < 0:
            raise ValueError(f"neighbours must not be negative, got {neighbours}")
        log, items = world.data.train, len(world.data.items)
        near, similarities = _neighbours(world, min(neighbours, world.n_items - 1))
        return cls(log.exposures(items), log.click_counts(items), near, similarities)

    @property
    def popularity(self) -> FloatArray:
        """``float32 (M,)``, exposures scaled to [0, 1]; 0 throughout if all items were shown as often."""
        spread = max(int(self.exposures.max() - self.exposures.min()), 1)
        scaled: FloatArray = ((self.exposures - self.exposures.min()) / spread).astype(np.float32)
        return scaled

    @property
    def quality(self) -> FloatArray:
        """``float32 (M,)``, the smoothed click rate ``(clicks + 1) / (exposures + 2)``."""
        rate: FloatArray = ((self.clicks + 1.0) / (self.exposures + 2.0)).astype(np.float32)
        return rate

    @property
    def novelty(self) -> FloatArray:
        """``float32 (M,)``, DNaIR's ``quality / log10(popularity + 1.1)``, divided by its maximum."""
        raw = self.quality / np.log10(self.popularity + 1.1)
        scaled: FloatArray = (raw / raw.max()).astype(np.float32)
        return scaled


def _neighbours(world: World, count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Returns the most similar candidates of every item by ``|U_i & U_j| / sqrt(|U_i| |U_j|)``, ``U`` who clicked."""
    if not count:
        none = np.zeros((len(world.data.items), 0))
        return none.astype(np.int64), none.astype(np.float32)
    log = world.data.train
    clicked = sparse.csr_matrix(
        (np.ones(int(log.clicks.sum()), np.float32), (log.items[log.clicks], log.users[log.clicks])),
        shape=(len(world.data.items), len(world.data.users)),
    )
    # A user who clicked an item twice counts once.
    clicked.data[:] = 1.0
    norms = np.sqrt(np.maximum(np.asarray(clicked.sum(axis=1), np.float32)[:, 0], 1.0))
    scaled = sparse.diags(1.0 / norms).dot(clicked).tocsr().astype(np.float32)
    candidates = scaled[: world.n_items].T.tocsr()
    near = np.empty((scaled.shape[0], count), np.int64)
    similarities = np.empty(near.shape, np.float32)
    for low in range(0, len(near), _ITEMS_AT_ONCE):
        rows = slice(low, min(low + _ITEMS_AT_ONCE, len(near)))
        block = (scaled[rows] @ candidates).toarray()
        own = np.arange(rows.start, min(rows.stop, world.n_items))
        block[own - low, own] = -1.0
        near[rows] = top_k(block, count)
        similarities[rows] = np.take_along_axis(block, near[rows], axis=1)
    return near, similarities


class SimilarItems(nn.Module):
    """Scores candidates ``a`` by ``sum_i 0.9^i sim(s_i, a)`` over the last ten items ``s_i`` that were clicked.

    Tables are buffers, so that a saved policy is loaded without an environment. Similarities beyond an item's nearest
    neighbours count as 0; items that resemble nothing liked are ordered by quality.

    Args:
        items: Candidates ``N``.
        known: Items ``M`` of the window, candidates first.
        neighbours: Neighbours ``S`` of each item.
    """

    near: Tensor
    similarities: Tensor
    quality: Tensor

    def __init__(self, items: int, known: int, neighbours: int) -> None:
        super().__init__()
        self.register_buffer("near", torch.zeros(known, neighbours, dtype=torch.int32))
        self.register_buffer("similarities", torch.zeros(known, neighbours))
        self.register_buffer("quality", torch.zeros(items))

    def fill(self, tables: ItemTables) -> None:
        """Takes similarities and quality from a training log."""
        self.near.copy_(torch.from_numpy(tables.neighbours))
        self.similarities.copy_(torch.from_numpy(tables.similarities))
        self.quality.copy_(torch.from_numpy(tables.quality[: len(self.quality)]))

    def scores(self, observation: Any) -> Tensor:
        """Returns the similarity of every candidate, ``float32 (B, N)``.

        Args:
            observation: A batch of dicts with ``history_items`` and ``history_clicks``.
        """
        device = self.near.device
        items = torch.as_tensor(np.asarray(observation["history_items"]), device=device).to(torch.int64)
        clicks = torch.as_tensor(np.asarray(observation["history_clicks"]), device=device) > 0
        places = torch.arange(1, items.shape[1] + 1, device=device)
        newest = torch.where(clicks & (items > 0), places, 0).topk(min(LIKED, items.shape[1]), dim=1)
        liked = (items.gather(1, newest.indices) - 1).clamp_min(0)
        weights = _DECAY ** torch.arange(liked.shape[1], device=device) * (newest.values > 0)
        values = self.similarities[liked] * weights[:, :, None]
        scores = values.new_zeros(len(items), len(self.quality))
        return scores.scatter_add_(1, self.near[liked].to(torch.int64).flatten(1), values.flatten(1))

    def best(self, observation: Any, count: int, allowed: Tensor | None = None) -> Tensor:
        """Returns the most similar candidates, ``int64 (B, min(count, N))``; items not allowed come last.

        Args:
            observation: See :meth:`scores`.
            count: How many.
            allowed: ``bool (B, N)``; None allows all.
        """
        ranked = self.scores(observation).add_(self.quality, alpha=_QUALITY_WEIGHT)
        if allowed is not None:
            ranked = torch.where(allowed, ranked, MASKED)
        return ranked.topk(min(count, ranked.shape[1]), dim=1).indices


class QItemPolicy(ItemPolicy):
    """``Q(s, .)`` and its target network; each slot of a slate is greedy, or at times random.

    Args:
        observation_space: As in :class:`~hrl_policies.common.item_agent.ItemPolicy`; with candidates a ``Dict`` that
            holds the window (``observation_mode="history"``).
        action_space: As in ``ItemPolicy``.
        lr_schedule: Learning rate.
        candidates: Items ``M``, at least ``K``, that greedy slots choose from: those that resemble what was liked last
            (see :class:`SimilarItems`); 0 takes the whole catalogue.
        explore: Probability that a slot of a non-deterministic slate shows a uniformly random item.
        **kwargs: See :class:`~hrl_policies.common.item_agent.ItemPolicy`.

    Raises:
        ValueError: If a setting does not fit.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        candidates: int = 0,
        explore: float = 0.05,
        **kwargs: Unpack[ItemPolicyArguments],
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        if not 0.0 <= explore <= 1.0:
            raise ValueError(f"explore is a probability from 0 to 1, got {explore}")
        if candidates and not self.slate_size <= candidates:
            raise ValueError(f"candidates must be 0, or fill a slate of {self.slate_size}, got {candidates}")
        self.candidates, self.explore = min(candidates, self.n_items), explore
        self.q_net, self.target_net = self.make_net(), self.make_net().requires_grad_(False)
        self.target_net.load_state_dict(self.q_net.state_dict())
        self.optimizer = torch.optim.Adam(self.q_net.parameters(), lr=lr_schedule(1))
        self.similar: SimilarItems | None = None
        if candidates:
            known = _window_items(observation_space)
            self.similar = SimilarItems(self.n_items, known, min(NEIGHBOURS, self.n_items - 1))

    def near(self, observation: Any, allowed: Tensor | None = None) -> Tensor | None:
        """Returns the candidates of a batch of observations, ``int64 (B, M)``; None for the whole catalogue."""
        return None if self.similar is None else self.similar.best(observation, self.candidates, allowed)

    def best(self, net: ItemNet, states: Tensor, near: Tensor | None, allowed: Tensor | None = None) -> Tensor:
        """Returns the slates of the largest values ``int64 (B, K)``, out of candidates."""
        embeddings = self.embeddings
        values = net(states, embeddings) if near is None else net.score_items(states, embeddings, near)
        if allowed is not None:
            values = torch.where(allowed if near is None else allowed.gather(1, near), values, MASKED)
        best = values.topk(self.slate_size, dim=1).indices
        return best if near is None else near.gather(1, best)

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_agent.ItemPolicy`."""
        states = self.states(observation)
        best = self.best(self.q_net, states, self.near(observation, allowed), allowed)
        if deterministic or not self.explore:
            return best
        keys = torch.rand(len(states), self.n_items, device=best.device)
        keys = keys if allowed is None else torch.where(allowed, keys, -1.0)
        random = keys.topk(self.slate_size, dim=1).indices
        return mixed(best, random, torch.rand(best.shape, device=best.device) < self.explore)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"candidates": self.candidates, "explore": self.explore}


def mixed(best: Tensor, random: Tensor, explore: Tensor) -> Tensor:
    """Returns slates whose slots take the first item not yet shown, of ``random`` where they explore, else of ``best``.

    Args:
        best: ``int64 (B, K)``, distinct items, best first.
        random: ``int64 (B, K)``, distinct items.
        explore: ``bool (B, K)``.
    """
    slates = torch.full_like(best, -1)
    for slot in range(best.shape[1]):
        source = torch.where(explore[:, slot, None], random, best)
        # At most K - 1 of the K items were shown, so one is left.
        fresh = (source[:, :, None] != slates[:, None, :]).all(dim=2)
        first = fresh.to(torch.int8).argmax(dim=1, keepdim=True)
        slates[:, slot] = source.gather(1, first)[:, 0]
    return slates


def _window_items(observation_space: spaces.Space[Any]) -> int:
    """Returns the number of items ``M`` that the window of an observation may hold."""
    if isinstance(observation_space, spaces.Dict) and "history_items" in observation_space.spaces:
        window = observation_space["history_items"]
        assert isinstance(window, spaces.MultiDiscrete)
        return int(window.nvec[0]) - 1
    raise ValueError(
        "candidates resemble what was liked, which is in the window: make the environment with "
        "observation_mode='history', or set candidates=0"
    )


class DNaIR(ItemAgent):
    """Double DQN with a novelty reward and, in its native form, DNaIR's action generator.

    In ``mode="native"`` slot ``k`` earns ``acc_k + w novelty_k``, and its target goes on with the mean target value of
    the next slate: the ``K`` candidates of the largest online values (double DQN for slates of one item).
    ``novelty = quality / log10(popularity + 1.1)`` is divided by its maximum, because on the paper's scale it is
    several times the largest reward. Candidates are the ``M`` items most similar to the last ones clicked; in training
    each slot is a uniformly random item with probability ``explore``.
    ``mode="kuaisim"`` is the version of the authors' group in KuaiSim: DQN with ``Q(slate) = sum_k Q(s, a_k)`` over the
    whole catalogue, the slate's reward and its mean novelty; no similarity, no candidates.

    Args:
        policy: ``"QItemPolicy"`` or a subclass of it.
        env: KuaiFair sessions with ``action_mode="slate"`` or ``"item"``; with candidates or ``acc="itemcf"``
            ``observation_mode="history"``.
        mode: ``"native"`` or ``"kuaisim"``.
        acc: What ``acc_k`` is: ``"env"``, the feedback on the item; ``"itemcf"``, its similarity to the last items
            clicked, as in the paper's offline form.
        novelty_coef: ``w``.
        candidates: ``M``; 0 takes the whole catalogue, which ``"kuaisim"`` asks for.
        explore: Probability of a random item in each slot.
        learning_starts: Steps with uniformly random slates before learning starts.
        gamma: Discount.
        **kwargs: See :class:`~hrl_policies.common.item_agent.ItemAgent`; ``policy_kwargs`` are those of
            :class:`QItemPolicy`, without ``candidates`` and ``explore``.

    Raises:
        TypeError: If the environment is not a KuaiFair environment.
        ValueError: If a setting is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"QItemPolicy": QItemPolicy}
    policy: QItemPolicy

    def __init__(
        self,
        policy: str | type[QItemPolicy],
        env: GymEnv | str,
        *,
        mode: DNaIRMode = "native",
        acc: AccuracyKind = "env",
        novelty_coef: float = 0.1,
        candidates: int = 100,
        explore: float = 0.05,
        learning_starts: int = 6_400,
        gamma: float = 0.9,
        **kwargs: Unpack[ItemAgentArguments],
    ) -> None:
        for name, value, kinds in (("mode", mode, DNaIRMode), ("acc", acc, AccuracyKind)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        if mode == "kuaisim" and (candidates or acc != "env"):
            raise ValueError("mode='kuaisim' has candidates=0 and acc='env'; use mode='native' for others")
        if acc == "itemcf" and not candidates:
            raise ValueError("acc='itemcf' measures similarity, which candidates=0 leaves out")
        if novelty_coef < 0.0:
            raise ValueError(f"novelty_coef must not be negative, got {novelty_coef}")
        policy_kwargs = kwargs.pop("policy_kwargs", None) or {}
        misplaced = {"candidates", "explore"} & set(policy_kwargs)
        if misplaced:
            raise ValueError(f"{', '.join(sorted(misplaced))}: give them to DNaIR itself, not in policy_kwargs")
        self.mode, self.acc, self.novelty_coef = mode, acc, novelty_coef
        kwargs["policy_kwargs"] = {**policy_kwargs, "candidates": candidates, "explore": explore}
        super().__init__(policy, env, learning_starts=learning_starts, gamma=gamma, **kwargs)

    def _setup_model(self) -> None:
        self.replay_buffer_kwargs = {"columns": self._columns()}
        self.novelty = torch.zeros(0)
        super()._setup_model()
        if not len(self.novelty):
            if self.env is not None:
                raise TypeError("DNaIR reads items off a KuaiFair environment")
            self.novelty = torch.zeros(self.policy.n_items, device=self.device)

    def _columns(self) -> dict[str, Column]:
        columns: dict[str, Column] = {}
        n_items, slate_size = slate_shape(self.action_space)
        if self.policy_kwargs["candidates"]:
            columns[_CANDIDATES] = ((min(self.policy_kwargs["candidates"], n_items),), np.int32)
        if self.acc == "itemcf":
            columns[_ACCURACY] = ((slate_size,), np.float32)
        return columns

    def _read_items(self, world: World) -> None:
        super()._read_items(world)
        similar = self.policy.similar
        tables = ItemTables.of_world(world, 0 if similar is None else similar.near.shape[1])
        self.novelty = torch.from_numpy(tables.novelty[: world.n_items]).to(self.device)
        if similar is not None:
            similar.fill(tables)

    def _update_learning_rates(self) -> None:
        update_learning_rate(self.policy.optimizer, self.lr_schedule(self._current_progress_remaining))

    def _update(self, batch: SlateReplaySamples) -> Mapping[str, Tensor]:
        values = self.policy.q_net.score_items(batch.observations, self.policy.embeddings, batch.items)
        if self.mode == "kuaisim":
            values = values.sum(dim=1, keepdim=True)
        loss = nn.functional.huber_loss(values, self._targets(batch), delta=self.huber_delta)
        self._minimize(self.policy.optimizer, loss)
        polyak_update(self.policy.q_net.parameters(), self.policy.target_net.parameters(), self.tau)
        return {"loss": loss.detach(), "q_mean": values.detach().mean()}

    def _targets(self, batch: SlateReplaySamples) -> Tensor:
        """Returns the targets of values ``float32 (n, K)``, or of whole slates ``(n, 1)`` in ``"kuaisim"`` mode."""
        policy, discounts = self.policy, self.gamma * (1.0 - batch.dones)
        novelty = self.novelty_coef * self.novelty[batch.items]
        near = batch.extras.get(_CANDIDATES)
        near = None if near is None else near.to(torch.int64)
        whole = self.mode == "kuaisim"
        with torch.no_grad():
            chooser = policy.target_net if whole else policy.q_net
            slates = policy.best(chooser, batch.next_observations, near)
            following = policy.target_net.score_items(batch.next_observations, policy.embeddings, slates)
        if whole:
            gained = batch.rewards + novelty.mean(dim=1, keepdim=True)
            return gained + discounts * following.sum(dim=1, keepdim=True)
        gained = batch.extras.get(_ACCURACY, self._slot_rewards(batch)) + novelty
        return gained + discounts * following.mean(dim=1, keepdim=True)

    def _extra_columns(
        self, executed: ExecutedSlates, new_obs: Any, dones: NDArray[np.bool_], infos: list[dict[str, Any]]
    ) -> dict[str, NDArray[Any]]:
        similar = self.policy.similar
        if similar is None:
            return {}
        assert self.env is not None
        allowed = allowed_items(self.env)
        if allowed is not None:
            # Masks of sessions that ended are already those of the next session.
            allowed = allowed | dones[:, None]
        columns: dict[str, NDArray[Any]] = {}
        with torch.inference_mode():
            after = reached_observations(new_obs, infos, dones)
            near = self.policy.near(after, self.policy.masks(allowed))
            assert near is not None
            columns[_CANDIDATES] = near.cpu().numpy()
            if self.acc == "itemcf":
                items = torch.as_tensor(executed.items, device=self.device)
                columns[_ACCURACY] = similar.scores(self._last_obs).gather(1, items).cpu().numpy()
        return columns

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "novelty"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], ["novelty"]
