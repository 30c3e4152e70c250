"""Gymnasium environments for fair interactive recommendation, with users who leave when exposure is unequal.

    import gymnasium as gym
    from stable_baselines3 import A2C
    import kuaifair_env

    model = A2C("MlpPolicy", kuaifair_env.make_sb3("KuaiFair-Toy-v0", n_envs=64, seed=11)).learn(50_000)
    test = gym.make("KuaiFair-Toy-v0", split="test")
    print(kuaifair_env.evaluate(model, test, episodes_per_user=2).table())

What is there:

* environments: ``gym.make`` with an id of :data:`ENVIRONMENTS` (:class:`KuaiFairEnv`), ``gym.make_vec``
  (:class:`KuaiFairVectorEnv`), :func:`make_sb3` (:class:`KuaiFairVecEnv`); :data:`SETTINGS` lists what they take;
* worlds (users, items and how users answer): :func:`make_world`; of your own log: :func:`register_world`,
  :class:`InteractionData` and :func:`build_world`; :func:`randomised` for training, :func:`build_replay_world` for real
  answers only;
* when users leave: :class:`TemperFairness`, :class:`CategoryBoredom`, :class:`NeverLeave`; a rule of your own follows
  :class:`LeaveRule`;
* agents evaluated: :func:`evaluate` gives an :class:`EvaluationResult`; agents that go on learning while they meet
  users: :func:`serve` gives a :class:`ServingResult`; :class:`ServingSummary` joins several;
* measures of engagement and fairness: :mod:`kuaifair_env.metrics`; data sets: :mod:`kuaifair_env.data`.

Importing this package registers the ids and nothing else: torch, Stable-Baselines3 and pandas are imported when
something needs them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from kuaifair_env.abandonment import (
    BoundLeaveRule,
    CategoryBoredom,
    LeaveDecision,
    LeaveRule,
    NeverLeave,
    TemperFairness,
    WorldFacts,
)
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import InteractionLog, Provenance
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import (
    ArtifactError,
    DataError,
    HiddenTruthError,
    KuaiFairError,
    MismatchError,
    TrainingError,
)
from kuaifair_env.evaluation import EvaluationResult, evaluate
from kuaifair_env.lazy_names import lazy_names
from kuaifair_env.observations import StateSpace
from kuaifair_env.origins import IncompleteDataWarning, TwinFallbackWarning
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.registration import (
    ENVIRONMENTS,
    make_env,
    make_sb3,
    make_vector_env,
    make_world,
    register_ids,
    register_world,
)
from kuaifair_env.replay import build_replay_world
from kuaifair_env.response.base import HistoryWindow, ResponseModel
from kuaifair_env.served_sessions import ServedStep
from kuaifair_env.serving import LearnsWhileServing, serve
from kuaifair_env.serving_results import ServingResult, ServingSummary
from kuaifair_env.settings import SETTINGS, Setting
from kuaifair_env.splits import held_out_users, serving_split
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import LeftOutWarning, World, build_world, candidate_rows

if TYPE_CHECKING:
    from kuaifair_env.randomised_worlds import randomised
    from kuaifair_env.sb3 import KuaiFairVecEnv

try:
    __version__ = version("kuaifair")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ENVIRONMENTS",
    "SETTINGS",
    "ArtifactError",
    "BoundLeaveRule",
    "CategoryBoredom",
    "DataError",
    "EpisodeRecords",
    "EvaluationResult",
    "HiddenTruthError",
    "HistoryWindow",
    "IncompleteDataWarning",
    "InteractionData",
    "InteractionLog",
    "KuaiFairEnv",
    "KuaiFairError",
    "KuaiFairVecEnv",
    "KuaiFairVectorEnv",
    "LearnsWhileServing",
    "LeaveDecision",
    "LeaveRule",
    "LeftOutWarning",
    "MismatchError",
    "NeverLeave",
    "Provenance",
    "Randomisation",
    "ResponseModel",
    "ServedStep",
    "ServingResult",
    "ServingSummary",
    "SessionBatch",
    "SessionConfig",
    "Setting",
    "StateSpace",
    "TemperFairness",
    "TrainingError",
    "TwinFallbackWarning",
    "World",
    "WorldFacts",
    "build_replay_world",
    "build_world",
    "candidate_rows",
    "evaluate",
    "held_out_users",
    "make_env",
    "make_sb3",
    "make_vector_env",
    "make_world",
    "randomised",
    "register_world",
    "serve",
    "serving_split",
]

__getattr__, __dir__ = lazy_names(
    __name__, {"kuaifair_env.randomised_worlds": ("randomised",), "kuaifair_env.sb3": ("KuaiFairVecEnv",)}
)

register_ids()
