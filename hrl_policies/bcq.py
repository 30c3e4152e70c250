"""BCQ: offline Q-learning that stays near the actions of a log, for continuous actions and for items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor, create_mlp
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss, mse_loss
from typing_extensions import Unpack

from hrl_policies.common.item_agent import ItemPolicy, ItemPolicyArguments
from hrl_policies.common.offline import OfflineAlgorithm, OfflineArguments, TensorBatch, minimize
from hrl_policies.common.slates import slate_shape
from hrl_policies.common.transitions import LoggedTransitions
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.ranking import top_k

_LATENT_BOUND = 0.5
_LOG_STD_RANGE = (-4.0, 15.0)
_PREDICTION_SEED = 0


class ActionModel(nn.Module):
    """``G_omega(s)``: a conditional variational autoencoder of logged actions, scaled to unit variance.

    An error of 1/8 of that variance weighs as much as the information that would mend it: with ``R`` nats for each
    coordinate, ``exp(-2 R) + R / 4`` is least there. Unscaled queries, with components of about ``1 / sqrt(d)``, would
    be decoded to their mean, whatever the latent.

    Attributes:
        limit: ``float32 ()``, largest component of a scaled action.
    """

    limit: Tensor

    def __init__(self, state_size: int, action_size: int, net_arch: Sequence[int], latent_size: int) -> None:
        super().__init__()
        *hidden, last = net_arch
        self.encoder = nn.Sequential(*create_mlp(state_size + action_size, last, list(hidden)), nn.ReLU())
        self.mean = nn.Linear(last, latent_size)
        self.log_std = nn.Linear(last, latent_size)
        self.decoder = nn.Sequential(*create_mlp(state_size + latent_size, action_size, list(net_arch)))
        self.latent_size = latent_size
        self.register_buffer("limit", torch.ones(()))

    def forward(self, states: Tensor, actions: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructed actions, means and deviations of ``z``; ``noise`` is standard normal."""
        hidden = self.encoder(torch.cat([states, actions], dim=1))
        mean, std = self.mean(hidden), self.log_std(hidden).clamp(*_LOG_STD_RANGE).exp()
        return self.decode(states, mean + std * noise), mean, std

    def decode(self, states: Tensor, latents: Tensor) -> Tensor:
        """Returns ``(B, m)`` actions within the limit."""
        actions: Tensor = self.decoder(torch.cat([states, latents], dim=1))
        return self.limit * (actions / self.limit).tanh()

    def likely(self, states: Tensor, latents: Tensor) -> Tensor:
        """Decodes latents clipped to ``[-0.5, 0.5]``, which gives actions that the log makes likely."""
        return self.decode(states, latents.clamp(-_LATENT_BOUND, _LATENT_BOUND))

    def loss(self, states: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Returns the negative evidence bound as BCQ weighs it: mean squared error plus half the mean KL."""
        reconstructed, mean, std = self(states, actions, noise)
        divergence = -0.5 * (1.0 + 2.0 * std.log() - mean.square() - std.square()).mean()
        loss: Tensor = mse_loss(reconstructed, actions) + 0.5 * divergence
        return loss


class Perturbation(nn.Module):
    """``xi_phi(s, a)``: moves a scaled action by at most ``Phi`` in each coordinate, and keeps it within its limit."""

    def __init__(self, state_size: int, action_size: int, net_arch: Sequence[int], bound: float) -> None:
        super().__init__()
        self.net = nn.Sequential(*create_mlp(state_size + action_size, action_size, list(net_arch), squash_output=True))
        self.bound = bound

    def forward(self, states: Tensor, actions: Tensor, limit: Tensor) -> Tensor:
        """Returns the moved actions, ``(B, m)``; ``limit`` is that of :class:`ActionModel`."""
        moved: Tensor = actions + self.bound * self.net(torch.cat([states, actions], dim=1))
        return torch.clamp(moved, -limit, limit)


class BCQPolicy(BasePolicy):
    """Chooses the action of largest value among some that the log makes likely (Fujimoto, Meger and Precup, ICML 2019).

    Deterministic predictions decode one fixed set of latents, which is saved with the policy, so that an action
    depends on its own observation alone; others draw new latents.

    Args:
        observation_space: ``Box``.
        action_space: ``Box``.
        lr_schedule: Learning rate of all three optimisers.
        net_arch: Hidden layers of critics and perturbation.
        action_net_arch: Hidden layers of the generative model.
        latent_size: Size of its latent; None takes twice the action's.
        perturbation: ``Phi``, in root mean square deviations of a component of logged actions.
        samples: Actions among which a prediction chooses.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (400, 300),
        action_net_arch: Sequence[int] = (750, 750),
        latent_size: int | None = None,
        perturbation: float = 0.05,
        samples: int = 100,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        if not net_arch or not action_net_arch:
            raise ValueError("net_arch and action_net_arch need at least one layer")
        if samples < 1 or perturbation < 0:
            raise ValueError(f"samples is at least 1 and perturbation not negative, got {samples} and {perturbation}")
        state_size, action_size = int(np.prod(observation_space.shape)), int(np.prod(action_space.shape))
        self.net_arch, self.action_net_arch = list(net_arch), list(action_net_arch)
        self.latent_size = 2 * action_size if latent_size is None else latent_size
        self.perturbation, self.samples = perturbation, samples
        self.vae = ActionModel(state_size, action_size, self.action_net_arch, self.latent_size)
        self.actor = Perturbation(state_size, action_size, self.net_arch, perturbation)
        self.critic = ContinuousCritic(
            observation_space,
            action_space,
            self.net_arch,
            FlattenExtractor(observation_space),
            state_size,
            normalize_images=False,
            share_features_extractor=False,
        )
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        rate = lr_schedule(1)
        self.vae_optimizer = torch.optim.Adam(self.vae.parameters(), lr=rate)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=rate)
        # Stable-Baselines3 expects a policy to have one optimiser of this name.
        self.optimizer = self.critic_optimizer
        fixed = torch.Generator().manual_seed(_PREDICTION_SEED)
        self.register_buffer("latents", torch.randn(samples, self.latent_size, generator=fixed))
        self.latents: Tensor

    def scale(self, actions: Tensor) -> None:
        """Takes as unit of all networks the root mean square deviation of a component of ``actions (n, m)``.

        Actions that are all the same stay as they are.
        """
        deviation = actions.std(dim=0, correction=0).square().mean().sqrt()
        self.vae.limit.copy_(torch.where(deviation > 0, 1.0 / deviation, 1.0))

    def propose(self, states: Tensor, latents: Tensor, target: bool = False) -> Tensor:
        """Returns decoded and perturbed actions, scaled as networks see them.

        Args:
            states: ``(B, d)``.
            latents: ``(B, latent)``, standard normal.
            target: Whether the target network perturbs.
        """
        actions = self.vae.likely(states, latents)
        moved: Tensor = (self.actor_target if target else self.actor)(states, actions, self.vae.limit)
        return moved

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor)
        states = observation.flatten(1).float()
        latents = self.latents if deterministic else torch.randn_like(self.latents)
        repeated = states.repeat_interleave(self.samples, dim=0)
        actions = self.propose(repeated, latents.repeat(len(states), 1))
        values = self.critic.q1_forward(repeated, actions).view(len(states), self.samples)
        best = values.argmax(dim=1)
        return actions.view(len(states), self.samples, -1)[torch.arange(len(states)), best] / self.vae.limit

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "net_arch": self.net_arch,
            "action_net_arch": self.action_net_arch,
            "latent_size": self.latent_size,
            "perturbation": self.perturbation,
            "samples": self.samples,
        }


class DiscreteBCQPolicy(ItemPolicy):
    """Shows the items of largest value among those that the log makes likely (Fujimoto et al., 2019).

    Item ``a`` is allowed in state ``s`` if ``pi_b(a | s) >= threshold * max_a' pi_b(a' | s)``; so that a slate can
    always be filled, its ``K`` likeliest items are allowed too, which for ``K = 1`` changes nothing. Predictions are
    deterministic.

    Args:
        observation_space: ``Box``.
        action_space: ``Discrete``, or ``MultiDiscrete`` of ``K`` times ``N``.
        lr_schedule: Learning rate.
        threshold: ``tau`` of BCQ; 0 allows all items, 1 only the likeliest.
        **kwargs: See :class:`~hrl_policies.common.item_agent.ItemPolicy`; the default ``head`` is ``"linear"``.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        threshold: float = 0.3,
        **kwargs: Unpack[ItemPolicyArguments],
    ) -> None:
        kwargs.setdefault("head", "linear")
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold lies in [0, 1], got {threshold}")
        self.threshold = threshold
        self.values, self.behaviour = self.make_net(), self.make_net()
        self.values_target = deepcopy(self.values).requires_grad_(False)
        trained = [*self.values.parameters(), *self.behaviour.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=lr_schedule(1))

    def likely(self, logits: Tensor, slots: int) -> Tensor:
        """Returns ``bool (B, N)``, the items that the log makes likely.

        Args:
            logits: ``float32 (B, N)``, of the behaviour model.
            slots: Items ``K`` of a slate.
        """
        best = logits.amax(dim=1, keepdim=True)
        # exp(logits - best) >= threshold, without an exponential for every item.
        likely = logits >= best + (math.log(self.threshold) if self.threshold else -math.inf)
        return likely.scatter(1, logits.topk(slots, dim=1).indices, True)

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_agent.ItemPolicy`."""
        states = self.states(observation)
        logits = self.behaviour(states, self.embeddings)
        if allowed is not None:
            logits = torch.where(allowed, logits, -torch.inf)
        likely = self.likely(logits, self.slate_size)
        # Unlike torch's, this top_k breaks ties by the smaller item.
        values = self.values(states, self.embeddings).cpu().numpy()
        return torch.from_numpy(top_k(values, self.slate_size, likely.cpu().numpy()))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"threshold": self.threshold}


class BCQ(OfflineAlgorithm):
    """BCQ (Fujimoto, Meger and Precup, Off-policy deep reinforcement learning without exploration, ICML 2019).

    A generative model proposes actions that the log makes likely, a perturbation moves them a little towards larger
    values, and critics only evaluate such actions. The target of a transition is
    ``r + gamma (1 - terminated) max_n [lambda min_j Q'_j + (1 - lambda) max_j Q'_j]`` over ``n`` proposals; truncated
    sessions are bootstrapped. Defaults are those of the article and of the authors' code. All networks see actions
    scaled to unit variance, in the first transitions that are set.

    Args:
        policy: ``"BCQPolicy"`` (``"MlpPolicy"`` is the same) or a subclass of it, which takes ``policy_kwargs``.
        env: As in :class:`~hrl_policies.common.offline.OfflineAlgorithm`; actions must be a ``Box``.
        transitions: As in ``OfflineAlgorithm``.
        learning_rate: Learning rate of all networks; a number or a schedule.
        batch_size: Transitions of a gradient step.
        minimum_weight: ``lambda``, weight of the smaller critic.
        target_samples: Proposals ``n`` of the target.
        **kwargs: See ``OfflineAlgorithm``.

    Raises:
        ValueError: If a setting is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"BCQPolicy": BCQPolicy, "MlpPolicy": BCQPolicy}
    supported_action_spaces = (spaces.Box,)
    policy: BCQPolicy

    def __init__(
        self,
        policy: str | type[BCQPolicy],
        env: GymEnv | str | None = None,
        transitions: LoggedTransitions | None = None,
        *,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 100,
        minimum_weight: float = 0.75,
        target_samples: int = 10,
        **kwargs: Unpack[OfflineArguments],
    ) -> None:
        if target_samples < 1 or not 0.0 <= minimum_weight <= 1.0:
            raise ValueError(
                "target_samples is at least 1 and minimum_weight lies in [0, 1], "
                f"got {target_samples} and {minimum_weight}"
            )
        self.minimum_weight, self.target_samples = minimum_weight, target_samples
        super().__init__(policy, env, transitions, learning_rate=learning_rate, batch_size=batch_size, **kwargs)

    def set_transitions(self, transitions: LoggedTransitions) -> None:
        """See :class:`~hrl_policies.common.offline.OfflineAlgorithm`."""
        super().set_transitions(transitions)
        assert self._tensors is not None
        # Networks that have learned keep their unit.
        if not self._n_updates:
            self.policy.scale(self._tensors.actions)
        self._tensors = self._tensors._replace(actions=self._tensors.actions * self.policy.vae.limit)

    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        policy = self.policy
        states = batch.observations.flatten(1)
        latent = (len(states), policy.latent_size)
        action_loss = policy.vae.loss(states, batch.actions, self._standard_normal(latent, noise))
        minimize(policy.vae_optimizer, action_loss)

        targets = self._targets(batch, noise)
        values = policy.critic(states, batch.actions)
        critic_loss = torch.stack([mse_loss(value, targets) for value in values]).sum()
        minimize(policy.critic_optimizer, critic_loss)

        with torch.no_grad():
            proposed = policy.vae.likely(states, self._standard_normal(latent, noise))
        actor_loss = -policy.critic.q1_forward(states, policy.actor(states, proposed, policy.vae.limit)).mean()
        minimize(policy.actor_optimizer, actor_loss)

        polyak_update(policy.critic.parameters(), policy.critic_target.parameters(), self.tau)
        polyak_update(policy.actor.parameters(), policy.actor_target.parameters(), self.tau)
        return {
            "action_model_loss": float(action_loss.detach()),
            "critic_loss": float(critic_loss.detach()),
            "actor_loss": float(actor_loss.detach()),
            "mean_value": float(values[0].detach().mean()),
        }

    @torch.no_grad()
    def _targets(self, batch: TensorBatch, noise: torch.Generator) -> Tensor:
        states = batch.next_observations.flatten(1).repeat_interleave(self.target_samples, dim=0)
        latents = self._standard_normal((len(states), self.policy.latent_size), noise)
        actions = self.policy.propose(states, latents, target=True)
        values = torch.cat(self.policy.critic_target(states, actions), dim=1)
        weight = self.minimum_weight
        mixed = weight * values.amin(dim=1) + (1.0 - weight) * values.amax(dim=1)
        best = mixed.view(-1, self.target_samples).amax(dim=1, keepdim=True)
        return batch.rewards + self.gamma * batch.not_terminated * self.possible(best)

    def _standard_normal(self, shape: tuple[int, int], noise: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=noise).to(self.device)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.policy.vae_optimizer, self.policy.actor_optimizer, self.policy.critic_optimizer]

    def _check_actions(self, transitions: LoggedTransitions) -> None:
        own, given = self.action_space, transitions.action_space
        assert isinstance(own, spaces.Box)
        if (
            not isinstance(given, spaces.Box)
            or own.shape != given.shape
            or not (np.array_equal(own.low, given.low) and np.array_equal(own.high, given.high))
        ):
            raise ValueError(f"transitions act in {given}, the algorithm in {own}")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = [f"policy.{name}_optimizer" for name in ("vae", "actor", "critic")]
        return ["policy", *optimizers], []


class DiscreteBCQ(OfflineAlgorithm):
    """Discrete BCQ (Fujimoto, Conti, Ghavamzadeh and Pineau, Benchmarking batch deep RL algorithms, 2019).

    For slates of one item this is double DQN whose maximum ranges over the items that a model of the log allows, with
    the loss ``Huber(Q) + NLL(i) + penalty mean(i^2)`` of values and behaviour logits ``i``. In slates of ``K`` items
    the target of item ``k`` is the feedback on it plus the discounted mean value of the ``K`` items that would be shown
    next. Logged slates and shown ones may differ in size.

    ``train/allowed_items`` logs the mean number of items that the threshold allows.

    Args:
        policy: ``"DiscreteBCQPolicy"`` (``"MlpPolicy"`` is the same) or a subclass of it, which takes
            ``policy_kwargs``.
        env: As in :class:`~hrl_policies.common.offline.OfflineAlgorithm`; actions must be item ids.
        transitions: As in ``OfflineAlgorithm``; slates need ``slot_rewards``.
        item_embeddings: ``float32 (N, d)``, which both heads score by; None gives each item weights of its own.
        learning_rate: A number or a schedule.
        batch_size: Transitions of a gradient step.
        logit_penalty: Weight of ``mean(i^2)``.
        **kwargs: See ``OfflineAlgorithm``.

    Raises:
        ValueError: If a setting is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "DiscreteBCQPolicy": DiscreteBCQPolicy,
        "MlpPolicy": DiscreteBCQPolicy,
    }
    supported_action_spaces = (spaces.Discrete, spaces.MultiDiscrete)
    policy: DiscreteBCQPolicy

    def __init__(
        self,
        policy: str | type[DiscreteBCQPolicy],
        env: GymEnv | str | None = None,
        transitions: LoggedTransitions | None = None,
        *,
        item_embeddings: FloatArray | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 64,
        logit_penalty: float = 1e-2,
        **kwargs: Unpack[OfflineArguments],
    ) -> None:
        if logit_penalty < 0:
            raise ValueError(f"logit_penalty is not negative, got {logit_penalty}")
        self.logit_penalty = logit_penalty
        self._item_embeddings = item_embeddings
        if item_embeddings is not None:
            head = {"head": "embedding", "dimension": int(item_embeddings.shape[1])}
            kwargs["policy_kwargs"] = {**(kwargs.get("policy_kwargs") or {}), **head}
        super().__init__(policy, env, transitions, learning_rate=learning_rate, batch_size=batch_size, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self._item_embeddings is not None:
            rows = len(self._item_embeddings)
            if rows != self.policy.n_items:
                raise ValueError(f"item_embeddings has {rows} rows for {self.policy.n_items} items")
            self.policy.embeddings.copy_(torch.from_numpy(self._item_embeddings))
        # The policy holds them from here on and is saved with them.
        self._item_embeddings = None

    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        policy, items = self.policy, batch.actions
        states = batch.observations.flatten(1)
        targets, allowed = self._targets(batch)
        values = policy.values.score_items(states, policy.embeddings, items)
        logits = policy.behaviour(states, policy.embeddings)
        value_loss = huber_loss(values, targets)
        slots = items.shape[1]
        behaviour_loss = cross_entropy(logits.repeat_interleave(slots, dim=0), items.reshape(-1))
        loss = value_loss + behaviour_loss + self.logit_penalty * logits.square().mean()
        minimize(policy.optimizer, loss)
        polyak_update(policy.values.parameters(), policy.values_target.parameters(), self.tau)
        return {
            "value_loss": float(value_loss.detach()),
            "behaviour_loss": float(behaviour_loss.detach()),
            "mean_value": float(values.detach().mean()),
            "allowed_items": allowed,
        }

    @torch.no_grad()
    def _targets(self, batch: TensorBatch) -> tuple[Tensor, float]:
        """Returns the target of each slot ``float32 (B, K)``, and the mean number of allowed items."""
        policy, states = self.policy, batch.next_observations.flatten(1)
        slots = batch.actions.shape[1]
        allowed = policy.likely(policy.behaviour(states, policy.embeddings), slots)
        online = torch.where(allowed, policy.values(states, policy.embeddings), -torch.inf)
        shown = online.topk(slots, dim=1).indices
        after = policy.values_target.score_items(states, policy.embeddings, shown).mean(dim=1, keepdim=True)
        rewards = batch.rewards if batch.slot_rewards is None else batch.slot_rewards
        after = self.possible(after)
        return rewards + self.gamma * batch.not_terminated * after, float(allowed.sum(dim=1).float().mean())

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.policy.optimizer]

    def _check_actions(self, transitions: LoggedTransitions) -> None:
        items, slots = slate_shape(transitions.action_space)
        if items != self.policy.n_items:
            raise ValueError(f"transitions are over {items} items, the algorithm over {self.policy.n_items}")
        if slots > 1 and transitions.slot_rewards is None:
            raise ValueError("slates of several items need slot_rewards, the feedback on each item")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_item_embeddings"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
