"""Manager and worker over states and windows: their forms, and how items are scored."""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from stable_baselines3.common.torch_layers import create_mlp
from torch import Tensor, nn

from hrl_policies.common.slates import MASKED
from hrl_policies.hrl_ppo.items import CONTEXT, ItemTable, Observed

ManagerKind = Literal["learned", "constant", "flat"]
WeightForm = Literal["simplex", "paper", "her4if", "quota"]
WorkerKind = Literal["query", "strict", "her4if"]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]

GROUPS = 2
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.02, 2.0
_HER4IF_DEVIATION = 0.1
# Adam moves each parameter by about the learning rate a step, and these two have a long way to go.
_MEMORY_RATE = 10.0
_MIN_WEIGHT = 1e-3
# The weights w_acc and w_fair that softplus starts from (``weights="paper"``). With both terms standardised among the
# candidates, half of them popular, the prices of the groups lie 2 w_fair apart, and the log-odds of a popular slot are
# -2 h w_fair / w_acc, where h = 1.5 is the hazard rate of the normal at the best 10 of 64. The gradient of the popular
# share p = sigmoid(-3 w_fair) by x_fair, 3 p (1 - p) sigmoid(x_fair), is largest at w_fair = 0.45, and that by x_acc is
# of the same size there. Both at softplus(0) = 0.69, over terms standardised in the catalogue, showed no popular item
# whatever the manager tried.
_START_WEIGHTS = (1.0, 0.45)


class HierarchySettings(BaseModel):
    """Forms of both levels; the defaults are DSRM-HRL's.

    Attributes:
        manager: ``"learned"`` (``pi_h``, eq. 5), ``"constant"`` (the same weights always; if it ties with the learned
            one, the hierarchy is unsupported) or ``"flat"`` (one global weight, learned by the worker's own PPO).
        weights: How the manager's action ``x`` becomes weights ``z = (w_acc, w_fair)`` of eq. 6. ``"simplex"``:
            ``w_fair = sigmoid(x)``, ``w_acc = 1 - w_fair``. ``"paper"``: both by softplus, from 1 and 0.2 on, for
            accuracy and popularity in one unit, standard deviations among the candidates. ``"her4if"``: Gaussian
            around a softmax, rectified, and multiplied to the probabilities of popular and long-tail items.
            ``"quota"``: ``x`` is the number of popular items, and the price ``w_fair`` of eq. 6 is the one that makes
            the slate meet it exactly: eq. 5 as a constraint, solved for each slate, not as a penalty whose knife-edge
            both levels must learn.
        worker: ``"query"``: items are compared with ``s^ + reach * MLP(s^, z)``, whose last layer starts at zero, so
            that training starts at eq. 6. ``"strict"``: eq. 6 to the letter; only its temperature, and ``memory``, are
            trained. ``"her4if"``: a learned table of items.
        reach: How far from the state, of length 1, a ``query`` may move. Training users teach it their own world's
            tastes, which those of other worlds need not share; 0 leaves it how much similarity counts.
        memory: Whether the worker may learn what an item's clicks and skips in the window say of its next showing;
            needs ``observation_mode="history"``.
        candidates: Items ranked by chance for each slate, half of them the best popular, half the best long-tail ones;
            0 takes the whole catalogue.
        interval: Steps ``c`` for which the manager's action holds.
        constant: ``x`` of the constant manager.
        width: Width of all hidden layers.
        start_temperature: ``tau`` at the start, on scores standardised over the catalogue.
        start_deviation: Standard deviation of ``x`` at the start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    manager: ManagerKind = "learned"
    weights: WeightForm = "quota"
    worker: WorkerKind = "strict"
    reach: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3
    memory: bool = True
    candidates: Annotated[int, Field(ge=0)] = 64
    interval: _Count = 1
    constant: float = 0.0
    width: _Count = 64
    start_temperature: _Positive = 0.1
    start_deviation: _Positive = 0.5

    @model_validator(mode="after")
    def _need_weights(self) -> HierarchySettings:
        if self.manager == "flat" and self.weights not in ("simplex", "paper"):
            raise ValueError("a flat agent's weights are 'simplex' or 'paper'; the other forms need a manager")
        return self

    @property
    def action_size(self) -> int:
        """Components of the manager's action ``x``."""
        return 2 if self.weights in ("paper", "her4if") else 1


class Manager(nn.Module):
    """``pi_h(z | s^)`` and its critic ``V_h`` (eq. 5)."""

    def __init__(self, settings: HierarchySettings, state_size: int, slate_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.counts = slate_size + 1
        inputs = state_size + CONTEXT + GROUPS
        outputs = self.counts if settings.weights == "quota" else settings.action_size
        self.actor = _mlp(inputs, settings.width, outputs, gain=0.01)
        if settings.weights == "paper":
            with torch.no_grad():
                cast(nn.Linear, self.actor[-1]).bias.copy_(paper_start())
        self.critic = _mlp(inputs, settings.width, 1, gain=1.0)
        self.log_deviation = nn.Parameter(torch.full((settings.action_size,), math.log(settings.start_deviation)))

    def distribution(self, features: Tensor, feasible: Tensor) -> torch.distributions.Distribution:
        """Returns the distribution of ``x`` (before it is squashed into weights, so that no Jacobian is needed).

        Args:
            features: ``(B, inputs)``.
            feasible: ``bool (B, K + 1)``, numbers of popular items that both groups can fill.
        """
        mean = self.actor(features)
        if self.settings.weights == "quota":
            return torch.distributions.Categorical(logits=torch.where(feasible, mean, MASKED), validate_args=False)
        if self.settings.weights == "her4if":
            return _normal(mean.softmax(dim=1), torch.full_like(mean, _HER4IF_DEVIATION))
        return _normal(mean, self.log_deviation.exp().expand_as(mean))

    def act(self, features: Tensor, feasible: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """Returns ``x``, ``float32 (B, size)``, and its log-probability, ``float32 (B,)``."""
        distribution = self.distribution(features, feasible)
        sampled: Tensor = distribution.sample()
        if self.settings.weights == "quota":
            categorical = cast(torch.distributions.Categorical, distribution)
            count = categorical.probs.argmax(dim=1) if deterministic else sampled
            return count[:, None].to(torch.float32), distribution.log_prob(count)
        action = distribution.mean if deterministic else sampled
        return action, distribution.log_prob(action)

    def evaluate_actions(self, features: Tensor, feasible: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and entropies of actions, ``float32 (B,)`` each."""
        distribution = self.distribution(features, feasible)
        taken = actions[:, 0] if self.settings.weights == "quota" else actions
        return distribution.log_prob(taken), distribution.entropy()

    def value(self, features: Tensor) -> Tensor:
        """Returns ``V_h``, ``float32 (B,)``."""
        value: Tensor = self.critic(features)[:, 0]
        return value


class Worker(nn.Module):
    """``pi_l(L | s^, z)`` with its critics ``V_l`` and, for the constraint, ``V_c``."""

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
            start = paper_start() if settings.weights == "paper" else torch.zeros(settings.action_size)
            self.global_action = nn.Parameter(start)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.start_temperature)))
        self.critic = _mlp(inputs, settings.width, 1, gain=1.0)
        self.cost_critic = _mlp(inputs, settings.width, 1, gain=1.0)

    @property
    def temperature(self) -> Tensor:
        """``tau``."""
        return self.log_temperature.clamp(math.log(_MIN_TEMPERATURE), math.log(_MAX_TEMPERATURE)).exp()

    @property
    def memory(self) -> Tensor:
        """``float32 (2,)``, what a click on an item in the window adds to its accuracy term, and what a skip does."""
        return _MEMORY_RATE * self.slow_memory

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

    @torch.no_grad()
    def catalogue_accuracy(self, observed: Observed, table: ItemTable) -> Tensor:
        """Returns the accuracy term of all items at the state itself, ``(B, N)``; the candidates follow from it."""
        if self.settings.worker == "her4if":
            action = observed.state.new_zeros(len(observed), self.settings.action_size)
            scores = self.queries(torch.cat([observed.state, observed.context, action], dim=1)) @ self.items.weight.T
        else:
            state = observed.state[:, : self.dimension]
            scores = table.accuracy(nn.functional.normalize(state, dim=1, eps=1e-6))
        if self.settings.memory and observed.window is not None:
            scores = observed.window.add_memory(scores, self.memory)
        return scores

    def accuracy(self, features: Tensor, candidates: Tensor, window_counts: Tensor, table: ItemTable) -> Tensor:
        """Returns the accuracy term of candidates, ``(B, C)``, memory included.

        Args:
            features: ``(B, inputs)``.
            candidates: ``int64 (B, C)``.
            window_counts: ``(B, C, 2)``, clicks and skips of the candidates in the window.
            table: Items.
        """
        queries = self.queries(features)
        if self.settings.worker == "her4if":
            scores = torch.einsum("bw,bcw->bc", queries, self.items(candidates))
        else:
            similar = torch.einsum("bd,bcd->bc", queries, table.units[candidates])
            scores = table.prior[candidates] + table.similarity * similar
        return scores + window_counts @ self.memory if self.settings.memory else scores

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
        if form == "paper":
            popularity_scale = mean_and_deviation(popularity)
            popularity = (popularity - popularity_scale[:, :1]) / popularity_scale[:, 1:]
        if form == "quota":
            return scores / self.temperature
        chosen = self.global_action.expand(len(scores), -1) if self.settings.manager == "flat" else actions
        if form == "her4if":
            weights = chosen.relu() + _MIN_WEIGHT
            return scores / self.temperature + torch.where(popular, weights[:, :1], weights[:, 1:]).log()
        return item_scores(scores, popularity, *omegas(chosen, form)) / self.temperature


def item_scores(accuracy: Tensor, popularity: Tensor, w_acc: Tensor, w_fair: Tensor) -> Tensor:
    """Returns the item scores ``Psi`` of the paper's eq. 6: ``w_acc * accuracy - w_fair * popularity``.

    Args:
        accuracy: ``(B, C)``, the accuracy term of candidates (:meth:`Worker.accuracy`), standardised.
        popularity: ``(B, C)``, their standardised log-popularity ``p~``.
        w_acc: ``(B,)``, the manager's weight of accuracy.
        w_fair: ``(B,)``, the manager's weight of fairness.
    """
    return w_acc[:, None] * accuracy - w_fair[:, None] * popularity


def omegas(actions: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Returns ``w_acc`` and ``w_fair`` of the manager's ``x``, ``float32 (B,)`` each."""
    if form == "simplex":
        fairness = actions[:, 0].sigmoid()
        return 1.0 - fairness, fairness
    weights = nn.functional.softplus(actions)
    return weights[:, 0], weights[:, 1]


def paper_start() -> Tensor:
    """Returns the ``x`` whose softplus are the weights that ``weights="paper"`` starts from, ``float32 (2,)``."""
    return torch.tensor(_START_WEIGHTS).expm1().log()


def mean_and_deviation(values: Tensor) -> Tensor:
    """Returns mean and standard deviation of each row of ``(B, C)``, ``float32 (B, 2)``."""
    mean = values.mean(dim=1, keepdim=True)
    # torch.std takes several times as long as the norm.
    norm = torch.linalg.vector_norm(values - mean, dim=1, keepdim=True)
    deviation = (norm / math.sqrt(max(values.shape[1] - 1, 1))).clamp_min(1e-6)
    return torch.cat([mean, deviation], dim=1)


def _normal(mean: Tensor, deviation: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(
        torch.distributions.Normal(mean, deviation, validate_args=False), 1, validate_args=False
    )


def _mlp(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    layers = nn.Sequential(*create_mlp(inputs, outputs, [width, width], nn.Tanh))
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
