"""Small twins that several tests read."""

from __future__ import annotations

import pytest
from twin_measures import PANEL

from kuaifair_env.synthetic.config import TOY
from kuaifair_env.synthetic.twin import Twin, generate_twin


@pytest.fixture(scope="session")
def toy() -> Twin:
    """The KuaiRand layout."""
    return generate_twin(TOY)


@pytest.fixture(scope="session")
def panel() -> Twin:
    """The KuaiRec layout."""
    return generate_twin(PANEL)
