"""Agents that come with the package: small, with a card, and as good as they say."""

from __future__ import annotations

from math import isclose

import pytest

from hrl_policies import load_pretrained, pretrained_agents
from hrl_policies.pretrained import pretrained_folder
from kuaifair_env import evaluate
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import folder_size


@pytest.mark.parametrize("name", pretrained_agents())
def test_an_agent_is_small_and_its_card_says_what_it_is(name):
    folder = pretrained_folder(name)
    assert folder_size(folder) < 5_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Training", "## Results", "## Limits"):
        assert heading in card


def test_there_is_an_agent_of_the_paper_and_other_names_are_refused(tmp_path):
    assert "dsrm-hrl-kuairandtwin" in pretrained_agents()
    with pytest.raises(ArtifactError, match="there is no run folder dsrm-hrl-moon, and no agent of that name"):
        load_pretrained("dsrm-hrl-moon")
    with pytest.raises(ArtifactError, match="is not a run folder"):
        load_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained_agents())
def test_an_agent_earns_what_its_run_says(name):
    pretrained = load_pretrained(name)
    config = pretrained.run.config
    result = evaluate(pretrained.agent, pretrained.make_env(), n_users=config.n_users, seed=config.evaluation_seed)
    assert isclose(result.summary()["r_cum"], pretrained.run.summary["r_cum"], rel_tol=1e-3)
    assert result.summary()["violation_rate"] <= 0.01
