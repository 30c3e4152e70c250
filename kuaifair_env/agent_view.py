"""A world and its sessions as agents may see them: what users truly like and tolerate raises on access."""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from typing import Any, NoReturn, cast

from kuaifair_env import seeding
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import IntArray
from kuaifair_env.errors import HiddenTruthError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.simulator import SessionSimulator
from kuaifair_env.world import World

# What says how users answer or would answer, and who comes next.
_OF_SIMULATOR = frozenset(("expected_catalogue", "source", "step", "reset", "state", "restore"))
_OF_SESSIONS = frozenset(("take_sessions_from", "chosen_sessions", "step", "reset", "state", "restore"))
_OF_PLAYED_SESSIONS = frozenset(("take_sessions_from", "state", "restore"))


def world_for_agents(world: World) -> World:
    """Returns a world without its truth: users, items, training log, embeddings and groups stay as they are.

    Response model, test log, true tastes and tolerated shares raise a ``HiddenTruthError`` when something of them is
    read.
    """
    given: dict[str, Any] = {field.name: getattr(world, field.name) for field in fields(world)}
    given |= {"data": _without_test_log(world.data), "response": cast(ResponseModel, _HiddenResponse(world.response))}
    if world.randomisation is not None:
        given["randomisation"] = _Hidden("how training users deviate")
    if world.true_preference is not None:
        given["true_preference"] = _Hidden("the true tastes of users")
    view = _WorldForAgents(**given)
    # The fingerprint is made from the truth, but does not tell it.
    vars(view)["fingerprint"] = world.fingerprint
    # Masks tell what may be shown to users.
    vars(view)["user_candidates"] = world.user_candidates
    return view


def sessions_for_agents(batch: SessionBatch) -> SessionBatch:
    """Returns running sessions without the truth of their world; they go on with those that are given.

    Everything that agents are told is there: users, slates, feedback, clicks, masks, temper, the settings. They are
    there to be looked at: nothing can be shown to users.
    """
    return cast(SessionBatch, _SessionsForAgents(batch, _OF_SESSIONS))


def played_by_agents(batch: SessionBatch) -> SessionBatch:
    """Returns the same for environments that agents hold, which show slates (:func:`sessions_for_agents`)."""
    return cast(SessionBatch, _SessionsForAgents(batch, _OF_PLAYED_SESSIONS))


class _Hidden:
    """Stands in the place of a truth and raises on every access."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy and inspect look for
            raise AttributeError(name)
        raise HiddenTruthError(
            f"agents are not told {self._what} (asked for {name!r}); a control that may know declares privileged = True"
        )

    def __getitem__(self, place: Any) -> NoReturn:
        self.__getattr__(f"[{place}]")

    def __len__(self) -> NoReturn:
        self.__getattr__("len")

    def __repr__(self) -> str:
        return f"<hidden: {self._what}>"


class _HiddenResponse(_Hidden):
    """A response model of which only sizes, kind and provenance are known."""

    def __init__(self, response: ResponseModel) -> None:
        super().__init__("how users respond")
        self.n_users, self.n_items = response.n_users, response.n_items
        self.uses_history = response.uses_history
        self._described = response.describe()

    def describe(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._described


class _WorldForAgents(World):
    @property
    def tolerated_shares(self) -> NoReturn:
        raise HiddenTruthError("agents are not told what popular share users tolerate")


def _without_test_log(data: InteractionData) -> InteractionData:
    view = copy(data)
    # The hash is made from both logs.
    vars(view).update(data_hash=data.data_hash, test=_Hidden("the test log"))
    return view


class _SimulatorForAgents:
    def __init__(self, simulator: SessionSimulator, world: World) -> None:
        self._simulator = simulator
        self.world = world

    def __getattr__(self, name: str) -> Any:
        return _looked_up(self._simulator, name, _OF_SIMULATOR)


class _SessionsForAgents:
    def __init__(self, batch: SessionBatch, hidden: frozenset[str]) -> None:
        self._batch, self._hidden = batch, hidden
        self.world = world_for_agents(batch.world)
        self.simulator = _SimulatorForAgents(batch.simulator, self.world)

    def __getattr__(self, name: str) -> Any:
        return _looked_up(self._batch, name, self._hidden)

    def seed(self, keys: seeding.Keys, rows: IntArray | None = None) -> None:
        """Does nothing: which sessions come is not for agents to say."""


def _looked_up(owner: Any, name: str, hidden: frozenset[str]) -> Any:
    if name in hidden or name.startswith("_"):
        _Hidden("how users respond and who comes next").__getattr__(name)
    return getattr(owner, name)
