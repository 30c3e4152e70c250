"""DNaIR: double DQN over items that resemble what a session liked, rewarded for novelty of good quality.

Shi et al., Relieving popularity bias in interactive recommendation: a diversity-novelty-aware reinforcement learning
approach, ACM TOIS 42(2), 2023. Their released code trains one network a user, squashes Q into (-1, 1), and counts
similarity, popularity and quality over the whole data set, test rows included. This is the online form over many
users, with all tables from the training log alone.

Where the time of training goes (cProfile; 7,583 items, 64 sessions, four updates of 256 transitions for each of their
steps): a quarter into values of 100 candidates, gathered embeddings first; a seventh into hidden layers, a tenth into
backward passes, an eighth into top-K of similarities and random items for acting. Nothing in an update grows with the
catalogue, so a step costs less than a third of one of discrete SAC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import polyak_update, update_learning_rate
from torch import Tensor, nn

from hrl_policies.baselines.item_agent import ItemAgent, allowed_items
from hrl_policies.baselines.item_heads import HeadKind, ItemNet
from hrl_policies.baselines.item_policy import ItemPolicy, catalogue_of
from hrl_policies.baselines.log_tables import NEIGHBOURS, ItemTables
from hrl_policies.baselines.similar_items import SimilarItems
from hrl_policies.baselines.slate_replay import Column, ExecutedSlates, SlateReplaySamples
from hrl_policies.hierarchical.algorithm import with_terminal
from hrl_policies.hierarchical.slate_distribution import MASKED
from kuaifair_env.worlds import World

SelfDNaIR = TypeVar("SelfDNaIR", bound="DNaIR")
DNaIRMode = Literal["native", "kuaisim"]
AccuracyKind = Literal["env", "itemcf"]

_CANDIDATES, _ACCURACY = "next_candidates", "accuracy"


class QItemPolicy(ItemPolicy):
    """``Q(s, .)`` and its target; slates by an action generator: each slot greedy, or now and then random.

    Args:
        observation_space: See :class:`~hrl_policies.baselines.item_policy.ItemPolicy`; with candidates a ``Dict`` that
            holds the window (``observation_mode="history"``).
        action_space: See there.
        lr_schedule: Learning rate.
        net_arch: See there.
        head: See there.
        dimension: See there.
        candidates: Items ``M``, at least ``K``, that greedy slots choose from: those that resemble what was liked last
            (see :class:`~hrl_policies.baselines.similar_items.SimilarItems`); 0 takes the whole catalogue.
        explore: Chance that a slot of a non-deterministic slate shows a uniformly random item.

    Raises:
        ValueError: If a setting does not fit.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256),
        head: HeadKind = "embedding",
        dimension: int = 0,
        candidates: int = 0,
        explore: float = 0.05,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, net_arch, head, dimension)
        if not 0.0 <= explore <= 1.0:
            raise ValueError(f"explore is a chance from 0 to 1, got {explore}")
        if candidates and not self.slate_size <= candidates:
            raise ValueError(f"candidates must be 0, or fill a slate of {self.slate_size}, got {candidates}")
        self.candidates, self.explore = min(candidates, self.items), explore
        self.q_net, self.target_net = self.net(), self.net().requires_grad_(False)
        self.target_net.load_state_dict(self.q_net.state_dict())
        self.optimizer = torch.optim.Adam(self.q_net.parameters(), lr=lr_schedule(1))
        self.similar: SimilarItems | None = None
        if candidates:
            known = _window_items(observation_space)
            self.similar = SimilarItems(self.items, known, min(NEIGHBOURS, self.items - 1))

    def near(self, observation: Any, allowed: Tensor | None = None) -> Tensor | None:
        """Returns the candidates of a batch of observations, ``int64 (B, M)``; None for the whole catalogue."""
        return None if self.similar is None else self.similar.best(observation, self.candidates, allowed)

    def best(
        self, net: ItemNet, states: Tensor, near: Tensor | None, allowed: Tensor | None = None
    ) -> Tensor:
        """Returns the slates that a network likes best, ``int64 (B, K)``, out of candidates."""
        values = net(states, self.units) if near is None else net.of(states, self.units, near)
        if allowed is not None:
            values = torch.where(allowed if near is None else allowed.gather(1, near), values, MASKED)
        places = values.topk(self.slate_size, dim=1).indices
        return places if near is None else near.gather(1, places)

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.baselines.item_policy.ItemPolicy`."""
        states = self.states(observation)
        best = self.best(self.q_net, states, self.near(observation, allowed), allowed)
        if deterministic or not self.explore:
            return best
        keys = torch.rand(len(states), self.items, device=best.device)
        keys = keys if allowed is None else torch.where(allowed, keys, -1.0)
        random = keys.topk(self.slate_size, dim=1).indices
        return mixed(best, random, torch.rand(best.shape, device=best.device) < self.explore)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"candidates": self.candidates, "explore": self.explore}
        return super()._get_constructor_parameters() | own


class DNaIR(ItemAgent):
    """Double DQN with a novelty reward and, in its native form, DNaIR's action generator.

    ``mode="native"``: slot ``k`` earns ``acc_k + w novelty_k``, and its value goes on with the mean target value of the
    next slate: the ``K`` candidates that the online network likes best (double DQN for one item a step).
    ``novelty = quality / log10(popularity + 1.1)``, divided by its maximum: on the paper's own scale it is several
    times the largest reward. Candidates are the ``M`` items most similar to the last ones clicked; in training each
    slot is a uniformly random item with chance ``explore``.
    ``mode="kuaisim"``: the version of the authors' group in KuaiSim: DQN with ``Q(slate) = sum_k Q(s, a_k)`` over the
    whole catalogue, the slate's reward and its mean novelty; no similarity, no candidates.

    Args:
        policy: ``"QItemPolicy"`` or a subclass of it.
        env: KuaiFair sessions with ``action_mode="slate"`` or ``"item"``; with candidates or ``acc="itemcf"``
            ``observation_mode="history"``.
        mode: ``"native"`` or ``"kuaisim"``.
        acc: ``"env"``, an item's feedback; ``"itemcf"``, its similarity to the last items clicked, as in the paper's
            offline form.
        novelty_coef: ``w``.
        candidates: ``M``; 0 takes the whole catalogue, which ``"kuaisim"`` asks for.
        explore: See above.
        learning_rate: A number or a schedule.
        buffer_size: Transitions kept, over all sessions.
        learning_starts: Steps with uniformly random slates before learning starts.
        batch_size: Transitions of an update.
        tau: How far the target network moves in an update.
        gamma: Discount.
        train_freq: Steps of all sessions between updates.
        gradient_steps: Updates each time; -1 as many as there were steps.
        huber_delta: See :class:`~hrl_policies.baselines.discrete_sac.DiscreteSAC`.
        max_grad_norm: Where the gradient is cut off.
        stats_window_size: See Stable-Baselines3.
        tensorboard_log: See Stable-Baselines3.
        policy_kwargs: See :class:`QItemPolicy`; ``candidates`` and ``explore`` are given above.
        verbose: See Stable-Baselines3.
        seed: Seed of everything random.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        _init_setup_model: See Stable-Baselines3.

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
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 100_000,
        learning_starts: int = 6_400,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.9,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        huber_delta: float = 10.0,
        max_grad_norm: float = 10.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
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
        given = {"candidates", "explore"} & set(policy_kwargs or {})
        if given:
            raise ValueError(f"{', '.join(sorted(given))}: give them to DNaIR itself, not in policy_kwargs")
        if not huber_delta > 0.0:
            raise ValueError(f"huber_delta must be positive, got {huber_delta}")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            max_grad_norm=max_grad_norm,
            columns=None,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={**(policy_kwargs or {}), "candidates": candidates, "explore": explore},
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.mode, self.acc = mode, acc
        self.novelty_coef = novelty_coef
        self.huber_delta = huber_delta
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.replay_buffer_kwargs = {"columns": self._columns()}
        self.novelty = torch.zeros(0)
        super()._setup_model()
        if not len(self.novelty):
            if self.env is not None:
                raise TypeError("DNaIR reads items off a KuaiFair environment")
            self.novelty = torch.zeros(self.policy.items, device=self.device)

    def _columns(self) -> dict[str, Column]:
        """Returns what the buffer keeps besides."""
        columns: dict[str, Column] = {}
        items, slate_size = catalogue_of(self.action_space)
        if self.policy_kwargs["candidates"]:
            columns[_CANDIDATES] = ((min(self.policy_kwargs["candidates"], items),), np.int32)
        if self.acc == "itemcf":
            columns[_ACCURACY] = ((slate_size,), np.float32)
        return columns

    def _fill(self, world: World) -> None:
        super()._fill(world)
        similar = self.policy.similar
        tables = ItemTables.of_world(world, 0 if similar is None else similar.near.shape[1])
        self.novelty = torch.from_numpy(tables.novelty[: world.n_items]).to(self.device)
        if similar is not None:
            similar.fill(tables)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Updates the network; see Stable-Baselines3."""
        self.policy.set_training_mode(True)
        update_learning_rate(self.policy.optimizer, self.lr_schedule(self._current_progress_remaining))
        losses, means = [], []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            values = self.policy.q_net.of(batch.observations, self.policy.units, batch.items)
            if self.mode == "kuaisim":
                values = values.sum(dim=1, keepdim=True)
            loss = nn.functional.huber_loss(values, self._targets(batch), delta=self.huber_delta)
            self._descend(self.policy.optimizer, loss)
            polyak_update(self.policy.q_net.parameters(), self.policy.target_net.parameters(), self.tau)
            losses.append(loss.detach())
            means.append(values.detach().mean())
        self._n_updates += gradient_steps
        self.logger.record("train/loss", float(torch.stack(losses).mean()))
        self.logger.record("train/q_mean", float(torch.stack(means).mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfDNaIR,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DNaIR",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDNaIR:
        """Trains the agent; see Stable-Baselines3."""
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _targets(self, batch: SlateReplaySamples) -> Tensor:
        """Returns what values should be: ``float32 (n, K)``, or of whole slates ``(n, 1)`` in ``"kuaisim"`` mode."""
        policy, discounts = self.policy, self.gamma * (1.0 - batch.dones)
        novelty = self.novelty_coef * self.novelty[batch.items]
        near = batch.extras.get(_CANDIDATES)
        near = None if near is None else near.to(torch.int64)
        whole = self.mode == "kuaisim"
        with torch.no_grad():
            chooser = policy.target_net if whole else policy.q_net
            slates = policy.best(chooser, batch.next_observations, near)
            following = policy.target_net.of(batch.next_observations, policy.units, slates)
        if whole:
            gained = batch.rewards + novelty.mean(dim=1, keepdim=True)
            return gained + discounts * following.sum(dim=1, keepdim=True)
        gained = batch.extras.get(_ACCURACY, self._slot_rewards(batch)) + novelty
        return gained + discounts * following.mean(dim=1, keepdim=True)

    def _extras(
        self,
        executed: ExecutedSlates,
        new_obs: Any,
        dones: NDArray[np.bool_],
        infos: list[dict[str, Any]],
    ) -> dict[str, NDArray[Any]]:
        similar = self.policy.similar
        if similar is None:
            return {}
        assert self.env is not None
        allowed = allowed_items(self.env)
        if allowed is not None:
            # What ended is masked no more: those masks are the next session's.
            allowed = allowed | dones[:, None]
        found: dict[str, NDArray[Any]] = {}
        with torch.inference_mode():
            after = with_terminal(new_obs, infos, np.flatnonzero(dones))
            near = self.policy.near(after, self.policy.masks(allowed))
            assert near is not None
            found[_CANDIDATES] = near.cpu().numpy()
            if self.acc == "itemcf":
                items = torch.as_tensor(executed.items, device=self.device)
                found[_ACCURACY] = similar.scores(self._last_obs).gather(1, items).cpu().numpy()
        return found

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "novelty"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], ["novelty"]


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
        # At most K - 1 of its K items were shown, so one is left.
        fresh = (source[:, :, None] != slates[:, None, :]).all(dim=2)
        first = fresh.to(torch.int8).argmax(dim=1, keepdim=True)
        slates[:, slot] = source.gather(1, first)[:, 0]
    return slates


def _window_items(observation_space: spaces.Space[Any]) -> int:
    """Returns how many items the window of an observation may name."""
    if isinstance(observation_space, spaces.Dict) and "history_items" in observation_space.spaces:
        window = observation_space["history_items"]
        assert isinstance(window, spaces.MultiDiscrete)
        return int(window.nvec[0]) - 1
    raise ValueError(
        "candidates resemble what was liked, which is in the window: make the environment with "
        "observation_mode='history', or set candidates=0"
    )
