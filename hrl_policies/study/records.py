"""A finished run as tables and figures need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrl_policies.study.config import RunConfig
from hrl_policies.study.store import StoredRun
from kuaifair_env.evaluation import EvaluationResult


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as tables need it.

    Attributes:
        config: What was run.
        summary: The headline figures.
        data: Name of the data set.
        origin: ``"real"``, ``"partial"``, ``"twin"`` or ``"own"``.
        data_hash: Of the data set.
        candidates: Number of candidates ``N``.
        users: Users that it was judged on.
        response: Kind of the test world's response model.
    """

    config: RunConfig
    summary: Mapping[str, float]
    data: str
    origin: str
    data_hash: str
    candidates: int
    users: int
    response: str

    @property
    def purifier(self) -> str:
        """Name of the purifier, empty without one."""
        return "" if self.config.purifier is None else self.config.purifier.name

    @classmethod
    def of_evaluation(cls, config: RunConfig, evaluation: EvaluationResult) -> RunRecord:
        """Returns the record of a run in memory."""
        users = len(np.unique(evaluation.sessions.user_ids))
        return cls._of_world(config, evaluation.summary(), evaluation.world, users)

    @classmethod
    def of_run(cls, run: StoredRun) -> RunRecord:
        """Returns the record of a run folder.

        Raises:
            ArtifactError: If the run was interrupted.
        """
        return cls._of_world(run.config, run.summary, run.provenance["test"], int(run.result["users"]))

    @classmethod
    def _of_world(
        cls, config: RunConfig, summary: Mapping[str, float], world: Mapping[str, Any], users: int
    ) -> RunRecord:
        data = world["data"]
        return cls(
            config=config,
            summary={name: float(value) for name, value in summary.items()},
            data=data["name"],
            origin=data["origin"],
            data_hash=data["hash"],
            candidates=int(world["candidates"]),
            users=users,
            response=str(world["response"].get("kind", "unknown")),
        )
