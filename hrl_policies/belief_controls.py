"""Controls that rank by a belief about users and items, in closed form: what trained methods have to leave behind.

In an evaluation the shared level stays as it is (at its prior, in a control that has served nobody) and the user's own
part is inferred from the session. While serving (:func:`kuaifair_env.serve`) the shared level learns from every answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsrm.belief import NOISE, Belief, BeliefItems, BeliefScales
from dsrm.click_scorer import ClickScorer
from dsrm.own_level import OwnScales
from dsrm.preference import PreferenceModel
from dsrm.session_evidence import SessionEvidence
from hrl_policies.controls import GreedyCTR, best_slates
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.fair_counts import fair_counts_now
from kuaifair_env.served_sessions import ServedStep
from kuaifair_env.world import World


class BeliefQuota(GreedyCTR):
    """The best slate inside the leave rule's bound by the posterior log-odds of clicks.

    The prior is the click scorer at the session's start. Evidence is what the session showed, be it read while serving
    or in an evaluation. It may take any number of popular items that the leave rule does not punish.

    Where it may explore (``deterministic=False``, as in serving) each session ranks by a draw of the items' shared
    offsets (Thompson sampling) whose spread is :data:`dsrm.belief.NOISE` times that of the posterior.

    In a randomised training world the shared level starts anew with each block (:mod:`kuaifair_env.randomisation`).

    Args:
        scorer: The click model.
        seed: Seed of the draws.
        scales: Where the scales of the belief begin.
        preference: Which distribution users' own parts have, given evidence; None takes the closed form.
    """

    def __init__(
        self,
        scorer: ClickScorer,
        *,
        seed: int = 0,
        scales: BeliefScales | None = None,
        preference: PreferenceModel | None = None,
    ) -> None:
        super().__init__(scorer)
        self._preference = preference
        self.seed = seed
        self._scales = scales
        self._generator = torch.Generator().manual_seed(seed)
        self._belief: Belief | None = None
        self._explores = False

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`~hrl_policies.controls.Control`; what was learned of the items stays.

        Raises:
            ValueError: If the belief is about other items.
        """
        super().bind(batch)
        items = self._items(batch.world)
        if self._belief is None:
            self._belief = Belief(items, self._scales)
        if not self._belief.items.same_as(items):
            raise ValueError(
                "this control holds a belief about other items than those of these sessions; use a new one"
            )
        self._evidence = SessionEvidence(self._belief, self._scorer, batch, self._preference)
        self._noise = NOISE[batch.config.repeats]
        self._draws = torch.zeros(batch.batch_size, batch.world.n_items)

    @property
    def belief(self) -> Belief:
        """What was learned of all users.

        Raises:
            ValueError: If the control is not bound, and knows no items.
        """
        if self._belief is None:
            raise ValueError("this control knows no items yet: call bind(batch) first, as evaluate() and serve() do")
        return self._belief

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """See :class:`~hrl_policies.controls.Control`; explores unless ``deterministic``."""
        self._explores = not deterministic
        return super().predict(observation, state, episode_start, deterministic)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`~hrl_policies.controls.Control`."""
        begun = self._evidence.begin()
        if self._explores and len(begun):
            shape = (len(begun), batch.world.n_items)
            self._draws[torch.from_numpy(begun)] = torch.randn(shape, generator=self._generator)
        logits = self._evidence.beliefs.logits(converged=self._evidence.take())
        if self._explores:
            logits.addcmul_(self.belief.shared.deviation, self._draws, value=self._noise)
        return best_slates(logits.numpy(), batch.world.groups.popular, self.counts(batch), batch.simulator.allowed)

    def counts(self, batch: SessionBatch) -> BoolArray:
        """Returns which numbers of popular items slates may have, ``bool (K + 1,)`` or ``(B, K + 1)``."""
        return fair_counts_now(batch)

    def learn(self, step: ServedStep) -> None:
        """Learns what the answers to the last slates say about the items; see ``LearnsWhileServing``."""
        self._evidence.learn(step.items, step.clicks, step.live, step.done, step.blocks)

    def save_served(self, path: Path) -> None:
        """Writes what was learned, the running sessions and the random generator; see ``LearnsWhileServing``."""
        tensors = self._evidence.tensors() | {"generator": self._generator.get_state(), "draws": self._draws}
        self.belief.save(path, tensors)

    def load_served(self, path: Path) -> None:
        """Takes the place of what :meth:`save_served` wrote; see ``LearnsWhileServing``."""
        tensors = self.belief.load(path)
        self._generator.set_state(tensors["generator"])
        self._draws = tensors["draws"]
        self._evidence.restore(tensors)

    def _items(self, world: World) -> BeliefItems:
        return BeliefItems.of_world(world, self._scorer)


class ItemQuota(BeliefQuota):
    """:class:`BeliefQuota` that knows each item by an offset all users share, and nothing of single users.

    The bandit that anybody would write: no embeddings, no own level.

    Args:
        scorer: The click model.
        seed: Seed of the draws.
    """

    def __init__(self, scorer: ClickScorer, *, seed: int = 0) -> None:
        super().__init__(scorer, seed=seed, scales=BeliefScales(own=OwnScales(0.0, 0.0, 0.0)))

    def _items(self, world: World) -> BeliefItems:
        return BeliefItems.of_world(world).without_columns()
