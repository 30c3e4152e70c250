"""Settings of a hierarchical agent: the forms of manager and worker, by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ManagerKind = Literal["learned", "constant", "flat"]
WeightForm = Literal["simplex", "paper", "her4if", "quota"]
WorkerKind = Literal["query", "strict", "her4if"]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class HierarchySettings(BaseModel):
    """Forms of both levels; the defaults are DSRM-HRL's.

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
            raise ValueError(
                "a flat agent's weights are 'simplex' or 'paper'; the other forms need a manager"
            )
        return self

    @property
    def action_size(self) -> int:
        """Components of the manager's action ``x``."""
        return 2 if self.weights in ("paper", "her4if") else 1


LITERAL: dict[str, Any] = {
    "hierarchy": {"weights": "paper", "memory": False},
    "click_scorer": None,
    "slot_credit": 0.0,
}
"""Arguments of ``HierarchicalPPO`` that make it the paper's equations 4 to 6 as they stand."""
