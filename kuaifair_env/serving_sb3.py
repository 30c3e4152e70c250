"""Algorithms of Stable-Baselines3 that learn while they serve, as in their own ``learn``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from kuaifair_env.checkpoints import plain_attributes, set_attributes
from kuaifair_env.sb3_files import restore_parameters, restore_replay_buffer, save_replay_buffer

if TYPE_CHECKING:
    from kuaifair_env.served_sessions import Service

_MODEL, _REPLAY = "model.zip", "replay.npz"


def parameters_hash(policy: Any, beliefs: Sequence[Any] = ()) -> str:
    """Returns a hash of the parameters of an algorithm's networks, if there are any, and of what wrappers believe."""
    digest = hashlib.sha256()
    tensors = policy.policy.state_dict() if isinstance(policy, BaseAlgorithm) else {}
    arrays = [(name, value.cpu().numpy()) for name, value in tensors.items()]
    for belief in beliefs:
        arrays += belief.tensors().items()
    for name, array in arrays:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()[:16]


def check_n_envs(model: BaseAlgorithm, n_envs: int) -> None:
    """Checks that an algorithm learns from as many sessions at a time as it is to serve.

    Raises:
        ValueError: If not; says how to make them agree.
    """
    if model.n_envs != n_envs:
        name = type(model).__name__
        raise ValueError(
            f"the {name} learns from {model.n_envs} sessions at a time, and here are {n_envs}; serve as many "
            f"(n_envs={model.n_envs}), or load it over others: {name}.load(path, env=...)"
        )


def serve_learning(model: BaseAlgorithm, service: Service) -> None:
    """Serves all sessions, learning as in ``model.learn(..., reset_num_timesteps=False)``.

    Sessions that are not counted, at the end, are learned from as well. The last rollout may end unlearned.
    Afterwards the algorithm has the environment that it had before, and will start new sessions there.
    """
    before = model.get_env()
    model.set_env(service.env.vec_env)
    entropy = [service.source.seed, service.source.order, model.seed or 0]
    model.set_random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    # No service is longer; learning rates that fall do so over this number.
    steps = (len(service.source) + service.n_envs) * service.batch.config.max_len
    try:
        model.learn(steps, callback=_Serve(service), log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
    finally:
        if before is not None:
            model.set_env(before)


class _Serve(BaseCallback):
    """Records every step, writes checkpoints between rollouts, and stops after the last session that is counted."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self._started = False

    def _on_rollout_start(self) -> None:
        if self._started:
            self._service.checkpoint(lambda: _algorithm_state(self.model), self._save)
            return
        self._started = True
        state = self._service.resume(self._load, _algorithm_state(self.model))
        if state is not None:
            _set_state(self.model, state)
        self._service.expect_step()

    def _on_step(self) -> bool:
        self._service.record_step(self.locals["dones"])
        if self._service.over:
            return False
        self._service.expect_step()
        return True

    def _save(self, path: Path) -> None:
        path.mkdir()
        self.model.save(path / _MODEL)
        buffer = getattr(self.model, "replay_buffer", None)
        if buffer is not None:
            save_replay_buffer(buffer, path / _REPLAY)

    def _load(self, path: Path) -> None:
        restore_parameters(self.model, path / _MODEL)
        buffer = getattr(self.model, "replay_buffer", None)
        if buffer is not None:
            restore_replay_buffer(buffer, path / _REPLAY)


def _stateful(model: BaseAlgorithm) -> dict[str, Any]:
    """Returns the algorithm, and the objects that it says hold state of their own (``stateful_parts``)."""
    return {"": model} | {name: getattr(model, name) for name in getattr(model, "stateful_parts", ())}


def _algorithm_state(model: BaseAlgorithm) -> dict[str, Any]:
    """Returns what an algorithm keeps besides parameters and replay buffer: counters, observations, generators."""
    return {part: plain_attributes(owner) for part, owner in _stateful(model).items()}


def _set_state(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    for part, owner in _stateful(model).items():
        set_attributes(owner, state[part])
