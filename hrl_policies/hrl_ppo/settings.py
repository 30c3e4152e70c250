"""What a hierarchical agent is: the forms of manager, worker and constraint, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

ManagerKind = Literal["learned", "constant", "flat"]
WeightForm = Literal["simplex", "paper", "her4if", "quota"]
WorkerKind = Literal["query", "strict", "her4if"]


@dataclass(frozen=True)
class HierarchySettings:
    """Forms of both levels.

    Attributes:
        manager: ``"learned"`` (``pi_h``, eq. 5), ``"constant"`` (the same weights always; if it ties with the learned
            one, the hierarchy is unsupported) or ``"flat"`` (one global weight, learned by the worker's own PPO).
        weights: How the manager's action ``x`` becomes weights ``z = (w_acc, w_fair)`` of eq. 6. ``"simplex"``:
            ``w_fair = sigmoid(x)``, ``w_acc = 1 - w_fair``. ``"paper"``: both by softplus. ``"her4if"``: Gaussian
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

    manager: ManagerKind = "learned"
    weights: WeightForm = "simplex"
    worker: WorkerKind = "query"
    reach: float = 0.3
    memory: bool = False
    candidates: int = 64
    interval: int = 1
    constant: float = 0.0
    width: int = 64
    start_temperature: float = 0.1
    start_deviation: float = 0.5

    def __post_init__(self) -> None:
        for name, kinds in (("manager", ManagerKind), ("weights", WeightForm), ("worker", WorkerKind)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}")
        if self.manager == "flat" and self.weights not in ("simplex", "paper"):
            raise ValueError(
                "a flat agent's weights are 'simplex' or 'paper'; the other forms need a manager"
            )
        if self.candidates < 0 or self.interval < 1 or self.width < 1:
            raise ValueError("candidates must not be negative; interval and width are at least 1")
        if not 0.0 <= self.reach < math.inf:
            raise ValueError(f"reach must be 0 or more, got {self.reach}")
        if self.start_temperature <= 0 or self.start_deviation <= 0:
            raise ValueError("start_temperature and start_deviation must be positive")

    @classmethod
    def of(cls, settings: dict[str, Any] | None) -> HierarchySettings:
        """Makes settings from a plain dict.

        Raises:
            ValueError: If a name is unknown or a value not valid.
        """
        given = {} if settings is None else settings
        unknown = set(given) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"unknown settings {sorted(unknown)} of the hierarchy; there are {sorted(cls.__dataclass_fields__)}"
            )
        return cls(**given)

    @property
    def action_size(self) -> int:
        """Components of the manager's action ``x``."""
        return 2 if self.weights in ("paper", "her4if") else 1
