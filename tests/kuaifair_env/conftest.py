"""What several tests of environments share."""

from __future__ import annotations

import gymnasium as gym
import pytest

from kuaifair_env import ENVIRONMENTS
from kuaifair_env.data.cache import CACHE_VARIABLE


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Ids that a test registers are gone after it, and so is what was fitted."""
    before, known = dict(ENVIRONMENTS), set(gym.registry)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    yield ENVIRONMENTS
    ENVIRONMENTS.clear()
    ENVIRONMENTS.update(before)
    for env_id in set(gym.registry) - known:
        del gym.registry[env_id]
