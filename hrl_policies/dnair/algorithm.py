"""DNaIR: double DQN over items that resemble what a session liked, rewarded for novelty of good quality.

Shi et al., Relieving popularity bias in interactive recommendation: a diversity-novelty-aware reinforcement learning
approach, ACM TOIS 42(2), 2023. Their released code trains one network per user, squashes Q into (-1, 1), and computes
similarity, popularity and quality over the whole data set, test rows included. This is the online form over many
users, with all tables from the training log alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import polyak_update, update_learning_rate
from torch import Tensor, nn

from hrl_policies.common.buffers import Column, ExecutedSlates, SlateReplaySamples
from hrl_policies.common.item_agent import ItemAgent
from hrl_policies.common.sessions import allowed_items
from hrl_policies.common.slates import slate_shape
from hrl_policies.dnair.policies import ItemTables, QItemPolicy
from kuaifair_env.spaces import reached_observations
from kuaifair_env.world import World

DNaIRMode = Literal["native", "kuaisim"]
AccuracyKind = Literal["env", "itemcf"]

_CANDIDATES, _ACCURACY = "next_candidates", "accuracy"


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
        policy_kwargs: See :class:`~hrl_policies.dnair.policies.QItemPolicy`, without ``candidates`` and ``explore``.
        kwargs: All other arguments of :class:`~hrl_policies.common.item_agent.ItemAgent`.

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
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
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
        misplaced = {"candidates", "explore"} & set(policy_kwargs or {})
        if misplaced:
            raise ValueError(
                f"{', '.join(sorted(misplaced))}: give them to DNaIR itself, not in policy_kwargs"
            )
        super().__init__(
            policy,
            env,
            learning_starts=learning_starts,
            gamma=gamma,
            policy_kwargs={**(policy_kwargs or {}), "candidates": candidates, "explore": explore},
            **kwargs,
        )
        self.mode, self.acc = mode, acc
        self.novelty_coef = novelty_coef
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.replay_buffer_kwargs = {"columns": self._columns()}
        self.novelty = torch.zeros(0)
        super()._setup_model()
        if not len(self.novelty):
            if self.env is not None:
                raise TypeError("DNaIR reads items off a KuaiFair environment")
            self.novelty = torch.zeros(self.policy.n_items, device=self.device)

    def _columns(self) -> dict[str, Column]:
        """Returns the additional columns of the buffer."""
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

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Updates the network; see Stable-Baselines3."""
        self.policy.set_training_mode(True)
        update_learning_rate(self.policy.optimizer, self.lr_schedule(self._current_progress_remaining))
        losses, means = [], []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            values = self.policy.q_net.score_items(batch.observations, self.policy.embeddings, batch.items)
            if self.mode == "kuaisim":
                values = values.sum(dim=1, keepdim=True)
            loss = nn.functional.huber_loss(values, self._targets(batch), delta=self.huber_delta)
            self._minimize(self.policy.optimizer, loss)
            polyak_update(self.policy.q_net.parameters(), self.policy.target_net.parameters(), self.tau)
            losses.append(loss.detach())
            means.append(values.detach().mean())
        self._n_updates += gradient_steps
        self.logger.record("train/loss", float(torch.stack(losses).mean()))
        self.logger.record("train/q_mean", float(torch.stack(means).mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

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
