"""DSRM-HRL's policy: a worker that ranks candidates and a manager that ranks numbers of popular items, from a belief.

Both start at the belief: untrained they show what :class:`~hrl_policies.belief_controls.BeliefQuota` shows, and they
leave it only where that pays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from gymnasium import spaces
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from dsrm.candidates import CANDIDATE_FEATURES, COUNT_FEATURES, SESSION_FEATURES
from hrl_policies.common.slates import MASKED, QuotaSlateDistribution, slate_shape
from hrl_policies.common.yaml_files import validated
from hrl_policies.hrl_ppo.levels import LevelActions, ManagerState, TwoLevelPolicy

_Positive = Annotated[float, Field(gt=0)]
_LOGIT, _POPULAR = CANDIDATE_FEATURES.index("logit"), CANDIDATE_FEATURES.index("popular")
_ALLOWED = COUNT_FEATURES.index("allowed")
_SIZES = {
    "logit": 2.0, "prior": 2.0, "exposures": 8.0,
    "shows": 5.0, "best_popular": 2.0, "best_tail": 2.0, "taste_size": 2.0,
}  # fmt: skip
"""What features are divided by before networks read them; 1 where nothing is said."""
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0
_COUNT_INPUTS = 3
_RISK, _RISK_READ = COUNT_FEATURES.index("risk"), 0


class RankingSettings(BaseModel):
    """Forms of both levels.

    Attributes:
        manager: ``"learned"``, or ``"constant"``: the same number of popular items always, as far as the leave rule and
            what is left of the groups allow it. If a constant manager ties with the learned one, the hierarchy is
            unsupported.
        constant: Popular items of the constant manager's slates; None is half a slate.
        interval: Steps for which the manager's number holds, as long as it is allowed.
        width: Width of all hidden layers.
        start_temperature: Temperature of the worker's draws in log-odds, at the start.
        manager_temperature: Log-odds by which the best slates of two numbers of popular items have to differ for one
            to be e times as likely as the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    manager: Literal["learned", "constant"] = "learned"
    constant: Annotated[int, Field(ge=0)] | None = None
    interval: Annotated[int, Field(ge=1)] = 1
    width: Annotated[int, Field(ge=1)] = 32
    start_temperature: _Positive = 0.1
    manager_temperature: _Positive = 0.1


@dataclass(frozen=True)
class RankingActions(LevelActions):
    """Actions of both levels, with the observations that they are evaluated again from.

    Attributes:
        slots: ``int64 (B, K)``, places of the slate's items among the candidates, popular items first.
        features: ``float32 (B, C, F)``, of candidates.
        present: ``bool (B, C)``, whether there is a candidate in each place.
        session: ``float32 (B, S)``, features of sessions.
        numbers: ``float32 (B, K + 1, G)``, what the manager reads of each number of popular items.
        worths: ``float32 (B, K + 1)``, summed log-odds of the best slate with each number, less those of the best of
            all; masked where a number is not allowed.
        information: ``float32 (B, K + 1)``, log-odds that all later slates together gain by what a slate with each
            number tells of the user's tolerance.
    """

    slots: Tensor
    features: Tensor
    present: Tensor
    session: Tensor
    numbers: Tensor
    worths: Tensor
    information: Tensor


class CandidateRanker(nn.Module):
    """The worker: adds to the belief's log-odds of each candidate, at the start nothing.

    Args:
        width: Width of hidden layers.
        start_temperature: Temperature of draws at the start.
    """

    scales: Tensor
    session_scales: Tensor

    def __init__(self, width: int, start_temperature: float) -> None:
        super().__init__()
        self.register_buffer("scales", _scales(CANDIDATE_FEATURES))
        self.register_buffer("session_scales", _scales(SESSION_FEATURES))
        n_session = len(SESSION_FEATURES)
        # The first layer of a network over both, of which the session's part is computed once for all candidates.
        # ReLU: over all candidates, tanh takes longer than the layers' products.
        self.of_candidate = nn.Linear(len(CANDIDATE_FEATURES), width)
        self.of_session = nn.Linear(n_session, width, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        _zero_last(self.rest)
        self.critic = nn.Sequential(*create_mlp(n_session + 1, 1, [width, width], nn.Tanh))
        self.cost_critic = nn.Sequential(*create_mlp(n_session + 1, 1, [width, width], nn.Tanh))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(start_temperature)))

    @property
    def temperature(self) -> Tensor:
        """Temperature of draws, in log-odds."""
        return self.log_temperature.clamp(math.log(_MIN_TEMPERATURE), math.log(_MAX_TEMPERATURE)).exp()

    def logits(self, features: Tensor, session: Tensor, present: Tensor) -> Tensor:
        """Returns the log-odds of candidates, ``(B, C)``: the belief's and what the network adds."""
        hidden = self.of_candidate(features / self.scales) + self.of_session(session / self.session_scales)[:, None]
        return torch.where(present, features[..., _LOGIT] + self.rest(hidden)[..., 0], MASKED)

    def values(self, session: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``V_l`` and ``V_c``, ``float32 (B,)`` each, given the popular share of the slate, ``(B,)``."""
        inputs = torch.cat([session / self.session_scales, shares[:, None]], dim=1)
        return self.critic(inputs)[:, 0], self.cost_critic(inputs)[:, 0]


class CountRanker(nn.Module):
    """The manager: adds to the worth of each number of popular items, at the start nothing.

    A number's worth is the summed log-odds of its best slate, less a price for the chance that the user does not
    tolerate it. Where the leave rule's bound is known there is no such chance. Where users have bounds of their own the
    price begins at what a punished slate costs. It takes 1 of temper, and a slate of which a share ``r`` is clicked
    takes ``2 - r``, so that more clicks save temper too: a punishment is worth ``K r / 2`` clicks. One unit of log-odds
    is ``r (1 - r)`` clicks, which makes ``K / (2 (1 - r))`` units of it: ``K`` where half of all items are clicked.

    A slate also tells whether its number is tolerated. What later slates gain by that is added: a step is looked ahead
    (:meth:`information`), as a knowledge gradient does (Frazier, Powell and Dayanik, 2008).

    Args:
        width: Width of hidden layers.
        slate_size: Items ``K`` of a slate.
        temperature: Log-odds by which two slates have to differ for one to be e times as likely as the other.
    """

    session_scales: Tensor

    def __init__(self, width: int, slate_size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.price = nn.Parameter(torch.tensor(float(slate_size)))
        self.register_buffer("session_scales", _scales(SESSION_FEATURES))
        n_session = len(SESSION_FEATURES)
        n_inputs = len(COUNT_FEATURES) - 1 + _COUNT_INPUTS
        self.of_count = nn.Linear(n_inputs, width)
        self.of_session = nn.Linear(n_session, width, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        _zero_last(self.rest)
        self.critic = nn.Sequential(*create_mlp(n_session + n_inputs * (slate_size + 1), 1, [width, width], nn.Tanh))

    def logits(self, session: Tensor, numbers: Tensor, worths: Tensor, information: Tensor) -> Tensor:
        """Returns the log-odds of each number of popular items, ``(B, K + 1)``."""
        hidden = self.of_count(numbers) + self.of_session(session / self.session_scales)[:, None]
        worths = worths - self.price * numbers[..., _RISK_READ] + information + self.rest(hidden)[..., 0]
        return torch.where(worths > MASKED / 2, worths / self.temperature, MASKED)

    def information(self, worths: Tensor, risks: Tensor, joint_risks: Tensor, slates_left: Tensor) -> Tensor:
        """Returns what is gained later by knowing whether a number of popular items is tolerated, ``(B, K + 1)``.

        That is how much better the best slate of a known answer is than the best one now, on average over both answers,
        for all slates that are left. Never negative; 0 where nothing is left, or no answer changes what is best.

        Args:
            worths: ``(B, K + 1)``, of numbers; masked where one is not allowed.
            risks: ``(B, K + 1)``, by what chance each is not tolerated.
            joint_risks: ``(B, K + 1, K + 1)``, by what chance neither of two is.
            slates_left: ``(B, 1)``, after this one.
        """
        price = self.price.detach().to(torch.float64)
        worths, risks, joint_risks = (tensor.to(torch.float64) for tensor in (worths, risks, joint_risks))
        allowed = (worths > MASKED / 2)[:, None]

        def best(chance: Tensor, punished: Tensor) -> Tensor:
            """By each answer, times its chance: of ``(B, n)`` and ``(B, n, K + 1)``, ``(B, n)``."""
            worth = chance[..., None] * worths[:, None] - price * punished
            return torch.where(allowed, worth, MASKED).max(dim=2).values

        now = best(torch.ones_like(risks[:, :1]), risks[:, None])
        then = best(risks, joint_risks) + best(1.0 - risks, risks[:, None] - joint_risks)
        return (slates_left * (then - now).clamp_min(0.0)).to(torch.float32)

    def value(self, session: Tensor, numbers: Tensor) -> Tensor:
        """Returns ``V_h``, ``float32 (B,)``."""
        value: Tensor = self.critic(torch.cat([session / self.session_scales, numbers.flatten(1)], dim=1))[:, 0]
        return value


class RankingPolicy(TwoLevelPolicy):
    """Manager and worker over the candidates that a belief shows (:class:`dsrm.candidates.CandidatePurifier`).

    The manager chooses how many items of a slate are popular, of the numbers that the leave rule allows and all of them
    where nobody knows. Its log-odds are those of the best slate with each number, less a price for the risk that the
    user does not tolerate it, with what the answer is worth later, and what its network adds, over a temperature. The
    worker ranks the candidates of each group by the belief's log-odds and what its network adds.
    Slates thus stay inside the bound by construction.

    Args:
        observation_space: Of candidates.
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``).
        lr_schedule: Learning rate of the worker.
        hierarchy: Arguments of :class:`RankingSettings`.
        manager_lr_schedule: Learning rate of the manager; None takes the worker's.

    Raises:
        ValueError: If a setting is not valid, or the spaces are not those above.
    """

    manager: CountRanker
    worker: CandidateRanker
    reads_masks = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        hierarchy: dict[str, Any] | None = None,
        manager_lr_schedule: Schedule | None = None,
        use_sde: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, use_sde)
        if not isinstance(observation_space, spaces.Dict) or "candidates" not in observation_space.spaces:
            raise ValueError(
                "RankingPolicy ranks candidates; put them around the sessions: "
                "VecDSRM(env, dsrm.pretrain(world, PretrainConfig(mode='candidates')))"
            )
        self.settings = validated(RankingSettings, hierarchy or {}, "hierarchy")
        _, self.slate_size = slate_shape(action_space)
        self._constant = self.slate_size // 2 if self.settings.constant is None else self.settings.constant
        if self._constant > self.slate_size:
            raise ValueError(f"hierarchy.constant is at most the slate size {self.slate_size}")
        self._make_levels(
            CountRanker(self.settings.width, self.slate_size, self.settings.manager_temperature),
            CandidateRanker(self.settings.width, self.settings.start_temperature),
            lr_schedule,
            manager_lr_schedule,
        )

    @property
    def interval(self) -> int:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return self.settings.interval

    @property
    def manager_learns(self) -> bool:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return self.settings.manager == "learned"

    def act(
        self,
        observation: Any,
        deterministic: bool = False,
        manager_state: ManagerState | None = None,
        allowed: Tensor | None = None,
    ) -> RankingActions:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`; candidates may all be shown."""
        candidates, features, session, counts = (
            torch.as_tensor(observation[name], device=self.device)
            for name in ("candidates", "features", "state", "counts")
        )
        present = candidates >= 0
        logits = self.worker.logits(features, session, present)
        popular = features[..., _POPULAR] > 0.5
        numbers, worths = self._worths(logits, popular, counts)
        joint_risks, slates_left = (
            torch.as_tensor(observation[name], device=self.device) for name in ("joint_risks", "slates_left")
        )
        information = self.manager.information(worths, counts[..., _RISK], joint_risks, slates_left)
        asked, manager_log_probs = self._ask(session, numbers, worths, information, deterministic)
        possible = None
        if manager_state is not None:
            possible = worths.gather(1, manager_state.actions.to(torch.int64))[:, 0] > MASKED / 2
        manager_actions, decided, steps_left = self._hold(asked[:, None].to(torch.float32), manager_state, possible)
        asked = manager_actions[:, 0].to(torch.int64)
        distribution = self._slate_distribution(logits, popular, asked)
        slots = distribution.mode() if deterministic else distribution.sample()
        shown = slots
        if deterministic:  # best first, as the controls show their slates
            shown = slots.gather(1, logits.gather(1, slots).argsort(dim=1, descending=True, stable=True))
        engagement, cost = self.worker.values(session, asked / self.slate_size)
        return RankingActions(
            slates=candidates.gather(1, shown),
            manager_actions=manager_actions,
            decided=decided,
            steps_left=steps_left,
            manager_log_probs=manager_log_probs,
            worker_log_probs=distribution.slot_log_probs(slots),
            values=torch.stack([self.manager.value(session, numbers), engagement, cost], dim=1),
            entropies=distribution.entropy(),
            slots=slots,
            features=features,
            present=present,
            session=session,
            numbers=numbers,
            worths=worths,
            information=information,
        )

    def evaluate_worker(self, actions: RankingActions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        logits = self.worker.logits(actions.features, actions.session, actions.present)
        asked = actions.manager_actions[:, 0]
        distribution = self._slate_distribution(logits, actions.features[..., _POPULAR] > 0.5, asked.to(torch.int64))
        values = self.worker.values(actions.session, asked / self.slate_size)
        return distribution.slot_log_probs(actions.slots), distribution.entropy(), *values

    def evaluate_manager(self, actions: RankingActions, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        session, numbers = actions.session[rows], actions.numbers[rows]
        odds = self.manager.logits(session, numbers, actions.worths[rows], actions.information[rows])
        logs = odds.log_softmax(dim=1)
        asked = actions.manager_actions[rows].to(torch.int64)
        entropy = -(logs.exp() * logs.clamp_min(MASKED / 10)).sum(dim=1)
        return logs.gather(1, asked)[:, 0], entropy, self.manager.value(session, numbers)

    def forms(self) -> str:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return f"manager={self.settings.manager!r}"

    def diagnostics(self, manager_actions: Tensor) -> dict[str, float]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        values = {
            "temperature": self.worker.temperature,
            "popular_count_mean": manager_actions.mean(),
            "popular_count_std": manager_actions.std(),
        }
        return {name: float(value.detach()) for name, value in values.items()}

    def _worths(self, logits: Tensor, popular: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the manager reads of each number of popular items, and their worths.

        The worker's log-odds are data here: no gradient of the manager reaches the worker.
        """
        logits = logits.detach()
        size = self.slate_size
        groups = [torch.where(group, logits, MASKED) for group in (popular, ~popular)]
        totals = [
            nn.functional.pad(group.topk(size, dim=1).values.to(torch.float64).cumsum(dim=1), (1, 0))
            for group in groups
        ]
        worth = totals[0] + totals[1].flip(1)
        allowed = counts[..., _ALLOWED] > 0.5
        best = torch.where(allowed, worth, 2 * MASKED * size).max(dim=1, keepdim=True).values
        below = torch.where(allowed, (worth - best).to(torch.float32), MASKED)
        shares = torch.linspace(0.0, 1.0, size + 1, device=logits.device).expand_as(below)
        read = torch.stack(
            [counts[..., _RISK], shares, (below / size).clamp_min(-5.0), allowed.to(torch.float32)], dim=2
        )
        return read, below

    def _ask(
        self, session: Tensor, numbers: Tensor, worths: Tensor, information: Tensor, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the manager's numbers as if it decided everywhere, ``int64 (B,)``, and their log-probabilities."""
        if not self.manager_learns:
            distance = (torch.arange(self.slate_size + 1, device=worths.device) - self._constant).abs()
            distance = torch.where(worths > MASKED / 2, distance, 2 * self.slate_size)
            return distance.argmin(dim=1), worths.new_zeros(len(worths))
        logs = self.manager.logits(session, numbers, worths, information).log_softmax(dim=1)
        asked = logs.argmax(dim=1) if deterministic else torch.multinomial(logs.exp(), 1)[:, 0]
        return asked, logs.gather(1, asked[:, None])[:, 0]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "hierarchy": self.settings.model_dump(),
        }

    def _slate_distribution(self, logits: Tensor, popular: Tensor, asked: Tensor) -> QuotaSlateDistribution:
        return QuotaSlateDistribution(logits / self.worker.temperature, popular, asked, self.slate_size)


def _scales(names: tuple[str, ...]) -> Tensor:
    return torch.tensor([_SIZES.get(name, 1.0) for name in names])


def _zero_last(layers: nn.Sequential) -> None:
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
