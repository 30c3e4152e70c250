"""Manager, worker and the item table that they share: their forms, what an observation holds, how items are scored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from stable_baselines3.common.torch_layers import create_mlp
from torch import Tensor, nn

from hrl_policies.common.slates import MASKED
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.observations import state_of
from kuaifair_env.world import World

if TYPE_CHECKING:
    from dsrm.click_scorer import ClickScorer

ManagerKind = Literal["learned", "constant", "flat"]
WeightForm = Literal["simplex", "paper", "her4if", "quota"]
WorkerKind = Literal["query", "strict", "her4if"]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]

CONTEXT = 5
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


class ItemTable(nn.Module):
    """Embeddings, popularity and click log-odds of the items, as buffers: a saved policy loads without an environment.

    The table's order of items puts the popular group first, so that each group is a slice; ``order`` and ``place`` lead
    from there to the environment's items and back.

    The accuracy term of an item is ``prior_i + cos(query, e_i) * similarity``: eq. 6's similarity alone without a click
    scorer, and the scorer's log-odds with one, which are what the greedy controls rank by.

    Args:
        items: Candidates ``N``.
        dimension: Size ``d`` of item embeddings.
        slate_size: Items ``K`` of a slate.
    """

    order: Tensor
    place: Tensor
    feasible: Tensor
    units: Tensor
    prior: Tensor
    similarity: Tensor
    popularity: Tensor
    popular: Tensor

    def __init__(self, items: int, dimension: int, slate_size: int) -> None:
        super().__init__()
        self.items, self.dimension, self.slate_size = items, dimension, slate_size
        self.register_buffer("order", torch.arange(items))
        self.register_buffer("place", torch.arange(items))
        self.register_buffer("feasible", torch.ones(slate_size + 1, dtype=torch.bool))
        self.register_buffer("units", torch.zeros(items, dimension))
        self.register_buffer("prior", torch.zeros(items))
        self.register_buffer("similarity", torch.ones(()))
        self.register_buffer("popularity", torch.zeros(items))
        self.register_buffer("popular", torch.zeros(items, dtype=torch.bool))

    def fill(self, world: World, scorer: ClickScorer | None) -> None:
        """Fills the table from a world.

        Args:
            world: The training world; its embeddings, popularity groups and training exposures are read.
            scorer: The click model to start from; None starts from similarity alone.
        """
        popular = world.groups.popular
        order = np.argsort(~popular, kind="stable")
        units = unit_rows(world.embeddings[: world.n_items][order])
        counts = np.arange(self.slate_size + 1)
        tail = self.items - int(popular.sum())
        feasible = (counts <= popular.sum()) & (self.slate_size - counts <= tail)
        prior = np.zeros(self.items, np.float32) if scorer is None else scorer.item_scores
        for buffer, values in (
            (self.order, order),
            (self.place, np.argsort(order)),
            (self.feasible, feasible),
            (self.units, units),
            (self.popularity, log_popularity(world.exposures)[order].astype(np.float32)),
            (self.popular, popular[order]),
            (self.prior, prior[order]),
        ):
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if scorer is not None:
            # Directions are unit embeddings times the coefficient, whose sign a norm would lose.
            along = np.einsum("dn,nd->n", scorer.directions[:, order], units)
            self.similarity.fill_(float(along[np.abs(along).argmax()]))

    def accuracy(self, queries: Tensor) -> Tensor:
        """Returns the accuracy term of all items, ``(B, N)``, for queries ``(B, d)``: ``prior + cos * similarity``."""
        return torch.addmm(self.prior, queries * self.similarity, self.units.T)

    def best_candidates(self, scores: Tensor, count: int) -> Tensor:
        """Returns the best items of each group, half of ``count`` from either, or all of a smaller group.

        Args:
            scores: ``(B, N)``.
            count: How many; 0 takes all items.

        Returns:
            ``int64 (B, C)``, places in the table's own order.
        """
        if count == 0 or count >= self.items:
            return torch.arange(self.items, device=scores.device).expand(len(scores), -1)
        n_popular, half = int(self.popular.sum()), self._group_size(count)
        groups = []
        for low, group in ((0, scores[:, :n_popular]), (n_popular, scores[:, n_popular:])):
            if group.shape[1]:
                groups.append(low + group.topk(min(half, group.shape[1]), dim=1, sorted=False).indices)
        return torch.cat(groups, dim=1)

    def group_scores(self, scores: Tensor, count: int = 0) -> Tensor:
        """Returns the mean of the best scores of both groups, half a slate of each, ``float32 (B, 2)``.

        Args:
            scores: ``(B, N)``, or ``(B, C)`` of the candidates of :meth:`best_candidates`, which hold the same best.
            count: The number of candidates that :meth:`best_candidates` was asked for.
        """
        n_popular = int(self.popular.sum())
        if scores.shape[1] < self.items:
            n_popular = min(n_popular, self._group_size(count))
        half = max(self.slate_size // 2, 1)
        means = [
            group.topk(min(half, group.shape[1]), dim=1).values.mean(dim=1)
            if group.shape[1]
            else scores.new_zeros(len(scores))
            for group in (scores[:, :n_popular], scores[:, n_popular:])
        ]
        return torch.stack(means, dim=1)

    def _group_size(self, count: int) -> int:
        """Returns how many candidates of each group stand for half of ``count``: at least a slate."""
        return max(count // 2, self.slate_size)


class Window:
    """Clicks and skips of an observation's window, ready to be counted by item.

    Args:
        items: ``int64 (B, H)``, item + 1, 0 where there is none (the observation's own coding).
        clicks: ``float32 (B, H)``.
        table: Items.
    """

    def __init__(self, items: Tensor, clicks: Tensor, table: ItemTable) -> None:
        # Items of the log that are no candidates are counted nowhere.
        self._known = (items > 0) & (items <= table.items)
        self._rows = table.place[torch.where(self._known, items - 1, 0)]
        self._clicks = clicks * self._known
        self._skips = (1.0 - clicks) * self._known
        self._table = table

    def add_memory(self, scores: Tensor, memory: Tensor) -> Tensor:
        """Returns scores ``(B, N)`` plus ``memory[0]`` for each click on an item and ``memory[1]`` for each skip."""
        return scores.scatter_add(1, self._rows, memory[0] * self._clicks + memory[1] * self._skips)

    def counts(self, candidates: Tensor) -> Tensor:
        """Returns clicks and skips of candidates ``int64 (B, C)``, ``float32 (B, C, 2)``."""
        same = (candidates[:, :, None] == self._rows[:, None, :]).to(torch.float32)
        return torch.stack([torch.einsum("bch,bh->bc", same, part) for part in (self._clicks, self._skips)], 2)

    def context(self) -> Tensor:
        """Returns what the manager sees of the window, ``float32 (B, 5)``.

        Share of places filled; click rate; popular share of what was shown, and of what was clicked; click rate of
        popular minus long-tail items.
        """
        popular = self._table.popular[self._rows] * self._known.to(torch.float32)
        shown = self._known.sum(1).to(torch.float32)
        clicked, head = self._clicks.sum(1), popular.sum(1)
        head_clicks = (popular * self._clicks).sum(1)
        of_head = head_clicks / head.clamp_min(1.0)
        of_tail = (clicked - head_clicks) / (shown - head).clamp_min(1.0)
        parts = (
            shown / self._known.shape[1],
            clicked / shown.clamp_min(1.0),
            head / shown.clamp_min(1.0),
            head_clicks / clicked.clamp_min(1.0),
            of_head - of_tail,
        )
        return torch.stack(parts, dim=1)


class Observed:
    """An observation as both levels take it: the state and, where there is one, the window.

    Args:
        observation: ``float32 (B, d_out)``, or a dict with ``state``, ``history_items`` and ``history_clicks``.
        table: Items; its device is where everything goes.
    """

    def __init__(self, observation: Any, table: ItemTable) -> None:
        device = table.units.device
        self.state = torch.as_tensor(state_of(observation), dtype=torch.float32, device=device)
        self.window: Window | None = None
        if isinstance(observation, dict) and "history_items" in observation:
            items = torch.as_tensor(observation["history_items"], dtype=torch.int64, device=device)
            clicks = torch.as_tensor(observation["history_clicks"], dtype=torch.float32, device=device)
            self.window = Window(items, clicks, table)
        context = self.state.new_zeros(len(self.state), CONTEXT)
        self.context = context if self.window is None else self.window.context()

    def __len__(self) -> int:
        return len(self.state)


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
