"""Beliefs about the users of a batch of sessions, kept up to date with what the sessions show."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrm.belief import Belief, SessionBeliefs
from dsrm.click_scorer import ClickScorer
from dsrm.preference import LogContexts, PreferenceModel
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import PADDING, HistoryWindow


class SessionEvidence:
    """Hands what running sessions showed to the beliefs about their users, each slate once.

    The prior of a session is the click scorer at its start. A session that is taken up in its middle is read from its
    window.

    Args:
        belief: What all sessions share.
        scorer: The click model.
        batch: The sessions.
        preference: Which distribution users' own parts have, given evidence.
        kept: Share of what answers say of a user that is left after each later slate.

    Attributes:
        beliefs: About the users of the sessions.
        states: ``float32 (B, d)``, the observed states ``s~`` at the sessions' start.
        steps: ``int64 (B,)``, slates of each session that were taken.
    """

    def __init__(
        self,
        belief: Belief,
        scorer: ClickScorer,
        batch: SessionBatch,
        preference: PreferenceModel | None = None,
        kept: float = 1.0,
    ) -> None:
        self.beliefs = SessionBeliefs(belief, batch.batch_size, preference, kept)
        self._contexts = None if preference is None else LogContexts(batch.world)
        self._scorer = scorer
        self._batch = batch
        self._belief = belief
        self.states = np.zeros((batch.batch_size, batch.world.dimension), np.float32)
        self.steps = np.full(batch.batch_size, -1)
        self._users = np.full(batch.batch_size, -1)

    def begin(self) -> NDArray[np.int64]:
        """Starts the beliefs about users whose session began since the last call, and returns their rows."""
        simulator = self._batch.simulator
        steps, users = simulator.steps, simulator.users
        same = users == self._users
        begun = np.flatnonzero(~(same & ((steps == self.steps) | ((steps == self.steps + 1) & (steps > 0)))))
        if len(begun):
            window = self.context(begun)
            self.states[begun] = observed_states(self._batch.world, window)
            prior = torch.from_numpy(self._scorer.score(self.states[begun]))
            contexts = None if self._contexts is None else torch.from_numpy(self._contexts.summarise(window))
            self.beliefs.start(torch.from_numpy(begun), prior, contexts)
            self.steps[begun], self._users[begun] = 0, users[begun]
        return begun

    def take(self) -> bool:
        """Adds what each session showed since the last call, and returns whether any was behind by several slates."""
        simulator = self._batch.simulator
        steps, slate_size = simulator.steps, simulator.slate_size
        behind = steps - self.steps
        n_slates = int(behind.max())
        window = self._batch.history_window(n_slates * slate_size)
        shape = (len(steps), n_slates, slate_size)
        items, clicks = window.items.reshape(shape).astype(np.int64), window.clicks.reshape(shape)
        for back in range(n_slates, 0, -1):
            if back < n_slates:  # steady users are known by what was predicted of their next answers
                self.beliefs.move()
            rows = np.flatnonzero(behind >= back)
            shown, clicked = torch.from_numpy(items[rows, -back]), torch.from_numpy(clicks[rows, -back])
            self.beliefs.observe(torch.from_numpy(rows), shown, clicked)
        self.steps = steps.copy()
        return n_slates > 1

    def take_step(self, rows: IntArray) -> None:
        """Adds what the last step of the batch showed in some rows, be their sessions over, or replaced already."""
        outcome = self._batch.outcome
        assert outcome is not None
        items, clicks = (torch.from_numpy(array[rows]) for array in (outcome.items, outcome.clicks))
        self.beliefs.observe(torch.from_numpy(rows), items, clicks)
        self.steps[rows] += 1

    def learn(
        self, items: NDArray[np.int64], clicks: BoolArray, live: BoolArray, done: BoolArray, blocks: NDArray[np.int64]
    ) -> None:
        """Hands on what the answers to slates say about what all users share; see :meth:`SessionBeliefs.learn`.

        In a randomised training world the shared level starts anew with each block.

        Args:
            items: ``int64 (B, K)``.
            clicks: ``bool (B, K)``.
            live: ``bool (B,)``, sessions to learn from.
            done: ``bool (B,)``, sessions that have ended.
            blocks: ``int64 (B,)``, the block of each session.
        """
        block = int(blocks.max())
        if block != self._belief.block:
            # What was predicted of these answers rests on what was learned in the last block.
            self._belief.start_block(block)
            return
        arrays = (items, clicks, live & (blocks == block), done)
        self.beliefs.learn(*(torch.from_numpy(array) for array in arrays))

    def context(self, rows: IntArray) -> HistoryWindow:
        """Returns what the log shows of the users of some rows before their session."""
        window = self._batch.world.initial_history.take(self._batch.simulator.users[rows])
        if self._batch.config.initial_history == "empty":
            return HistoryWindow(np.full_like(window.items, PADDING), np.zeros_like(window.clicks))
        return window

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that is known of the running sessions, by name; :meth:`restore` takes it."""
        arrays = {"steps": self.steps, "users": self._users, "states": self.states}
        counters = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return counters | {f"session.{name}": tensor for name, tensor in self.beliefs.tensors().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`tensors` returned, for as many sessions over the same items."""
        self.steps, self._users, self.states = (tensors[name].numpy().copy() for name in ("steps", "users", "states"))
        of_sessions = {name: tensor for name, tensor in tensors.items() if name.startswith("session.")}
        self.beliefs.restore({name.removeprefix("session."): tensor for name, tensor in of_sessions.items()})
