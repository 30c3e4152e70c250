"""What several tests of environments share."""

from __future__ import annotations

import pytest
from helpers import registry_put_back

from kuaifair_env import ENVIRONMENTS
from kuaifair_env.data.cache import CACHE_VARIABLE


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Ids that a test registers are gone after it, and so is what was fitted."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with registry_put_back():
        yield ENVIRONMENTS
