"""The two levels: a manager that weighs accuracy against fairness, a worker that ranks items. They share nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrl_policies.hierarchical.catalogue import CONTEXT, ItemTable
from hrl_policies.hierarchical.settings import HierarchySettings
from hrl_policies.hierarchical.slate_distribution import MASKED

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.02, 2.0
_HER4IF_DEVIATION = 0.1
# Adam moves each parameter by about the learning rate a step, and these two have a long way to go.
_MEMORY_PACE = 10.0
_LEAST_WEIGHT = 1e-3
OFFER = 2


class Manager(nn.Module):
    """``pi_h(z | s^)`` and its critic ``V_h`` (eq. 5).

    Args:
        settings: Forms.
        state_size: Size of a purified state.
        slate_size: Items ``K`` of a slate.
    """

    def __init__(self, settings: HierarchySettings, state_size: int, slate_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.counts = slate_size + 1
        inputs = state_size + CONTEXT + OFFER
        outputs = self.counts if settings.weights == "quota" else settings.action_size
        self.actor = _mlp(inputs, settings.width, outputs, gain=0.01)
        self.critic = _mlp(inputs, settings.width, 1, gain=1.0)
        self.log_deviation = nn.Parameter(
            torch.full((settings.action_size,), math.log(settings.start_deviation))
        )

    def distribution(self, features: Tensor, feasible: Tensor) -> torch.distributions.Distribution:
        """Returns the law of ``x`` (before it is squashed into weights, so that no Jacobian is needed).

        Args:
            features: ``(B, inputs)``.
            feasible: ``bool (K + 1,)``, numbers of popular items that both groups can fill.
        """
        mean = self.actor(features)
        if self.settings.weights == "quota":
            return torch.distributions.Categorical(
                logits=torch.where(feasible, mean, MASKED), validate_args=False
            )
        if self.settings.weights == "her4if":
            return _normal(mean.softmax(dim=1), torch.full_like(mean, _HER4IF_DEVIATION))
        return _normal(mean, self.log_deviation.exp().expand_as(mean))

    def act(self, features: Tensor, feasible: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """Returns ``x``, ``float32 (B, size)``, and its log-probability, ``float32 (B,)``."""
        law = self.distribution(features, feasible)
        sampled: Tensor = law.sample()
        if self.settings.weights == "quota":
            assert isinstance(law, torch.distributions.Categorical)
            count = law.probs.argmax(dim=1) if deterministic else sampled
            return count[:, None].to(torch.float32), _log_prob(law, count)
        action = law.mean if deterministic else sampled
        return action, _log_prob(law, action)

    def judge(self, features: Tensor, feasible: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and entropies of actions, ``float32 (B,)`` each."""
        law = self.distribution(features, feasible)
        if self.settings.weights == "quota":
            return _log_prob(law, actions[:, 0]), _entropy(law)
        return _log_prob(law, actions), _entropy(law)

    def value(self, features: Tensor) -> Tensor:
        """Returns ``V_h``, ``float32 (B,)``."""
        value: Tensor = self.critic(features)[:, 0]
        return value


class Worker(nn.Module):
    """``pi_l(L | s^, z)`` with its critics ``V_l`` and, for the constraint, ``V_c``.

    Args:
        settings: Forms.
        state_size: Size of a purified state, ``d`` or more.
        table: Items.
    """

    def __init__(self, settings: HierarchySettings, state_size: int, table: ItemTable) -> None:
        super().__init__()
        self.settings = settings
        self.dimension = table.dimension
        inputs = state_size + CONTEXT + settings.action_size
        if settings.worker == "query":
            self.query = _mlp(inputs, settings.width, table.dimension, gain=0.0)
            self.log_similarity = nn.Parameter(torch.zeros(()))
        elif settings.worker == "her4if":
            self.query = _mlp(inputs, settings.width, settings.width, gain=1.0)
            self.items = nn.Embedding(table.items, settings.width)
            nn.init.normal_(self.items.weight, std=1.0 / math.sqrt(settings.width))
        if settings.memory:
            self.slow_memory = nn.Parameter(torch.zeros(2))
        if settings.manager == "flat":
            self.global_action = nn.Parameter(torch.zeros(settings.action_size))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.start_temperature)))
        self.critic = _mlp(inputs, settings.width, 1, gain=1.0)
        self.cost_critic = _mlp(inputs, settings.width, 1, gain=1.0)

    @property
    def temperature(self) -> Tensor:
        """``tau``."""
        return self.log_temperature.clamp(math.log(_LEAST_TEMPERATURE), math.log(_MOST_TEMPERATURE)).exp()

    @property
    def memory(self) -> Tensor:
        """``float32 (2,)``, what a click on an item in the window adds to its accuracy term, and what a skip does."""
        return _MEMORY_PACE * self.slow_memory

    def queries(self, features: Tensor) -> Tensor:
        """Returns what items are compared with, ``(B, d)``, or the hidden layer of ``her4if``."""
        state = features[:, : self.dimension]
        if self.settings.worker == "her4if":
            hidden: Tensor = self.query(features)
            return hidden
        units: Tensor = nn.functional.normalize(state, dim=1, eps=1e-6)
        if self.settings.worker == "strict":
            return units
        moved = self.query(features)
        moved = moved / (1.0 + moved.norm(dim=1, keepdim=True))
        aimed: Tensor = nn.functional.normalize(units + self.settings.reach * moved, dim=1, eps=1e-6)
        return aimed * self.log_similarity.exp()

    def catalogue(self, features: Tensor, table: ItemTable) -> Tensor:
        """Returns the accuracy term of all items, ``(B, N)``, without memory."""
        queries = self.queries(features)
        if self.settings.worker == "her4if":
            return queries @ self.items.weight.T
        scores: Tensor = torch.addmm(table.prior, queries * table.similarity, table.units.T)
        return scores

    def accuracy(self, features: Tensor, candidates: Tensor, counts: Tensor, table: ItemTable) -> Tensor:
        """Returns the accuracy term of candidates, ``(B, C)``, memory included.

        Args:
            features: ``(B, inputs)``.
            candidates: ``int64 (B, C)``.
            counts: ``(B, C, 2)``, clicks and skips in the window.
            table: Items.
        """
        queries = self.queries(features)
        if self.settings.worker == "her4if":
            scores = torch.einsum("bw,bcw->bc", queries, self.items(candidates))
        else:
            similar = torch.einsum("bd,bcd->bc", queries, table.units[candidates])
            scores = table.prior[candidates] + table.similarity * similar
        return scores + counts @ self.memory if self.settings.memory else scores

    def values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``V_l`` and ``V_c``, ``float32 (B,)`` each."""
        return self.critic(features)[:, 0], self.cost_critic(features)[:, 0]

    def logits(self, scores: Tensor, actions: Tensor, popularity: Tensor, popular: Tensor) -> Tensor:
        """Returns ``Psi`` of eq. 6 for standardised accuracy terms.

        Args:
            scores: ``(B, C)``, standardised accuracy.
            actions: ``(B, size)``, the manager's ``x``; not used by ``flat``.
            popularity: ``(B, C)``, standardised log-popularity.
            popular: ``bool (B, C)``.
        """
        form = self.settings.weights
        if form == "quota":
            return scores / self.temperature
        chosen = self.global_action.expand(len(scores), -1) if self.settings.manager == "flat" else actions
        if form == "her4if":
            weights = chosen.relu() + _LEAST_WEIGHT
            return scores / self.temperature + torch.where(popular, weights[:, :1], weights[:, 1:]).log()
        accuracy, fairness = omegas(chosen, form)
        return (accuracy[:, None] * scores - fairness[:, None] * popularity) / self.temperature


def omegas(actions: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Returns ``w_acc`` and ``w_fair`` of the manager's ``x``, ``float32 (B,)`` each."""
    if form == "simplex":
        fairness = actions[:, 0].sigmoid()
        return 1.0 - fairness, fairness
    weights = nn.functional.softplus(actions)
    return weights[:, 0], weights[:, 1]


def _log_prob(law: torch.distributions.Distribution, actions: Tensor) -> Tensor:
    found: Tensor = law.log_prob(actions)
    return found


def _entropy(law: torch.distributions.Distribution) -> Tensor:
    found: Tensor = law.entropy()
    return found


def _normal(mean: Tensor, deviation: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(
        torch.distributions.Normal(mean, deviation, validate_args=False), 1, validate_args=False
    )


def _mlp(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2.0))
            nn.init.zeros_(layer.bias)
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    if gain:
        nn.init.orthogonal_(last.weight, gain)
    else:
        nn.init.zeros_(last.weight)
    return layers
