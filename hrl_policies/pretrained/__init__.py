"""Agents that come with the package, so that nobody has to train before seeing one act.

Each is a run folder, as ``kuaifair train`` writes it, with a model card: data, training, results and limits. Loading
one executes nothing that is in its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuaifair_env.errors import ArtifactError

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from dsrm.purifier import StatePurifier
    from hrl_policies.study.store import StoredRun
    from hrl_policies.worlds import WorldPair

CARD = "README.md"


@dataclass(frozen=True)
class PretrainedAgent:
    """An agent with all that it needs to act.

    Attributes:
        agent: What :func:`kuaifair_env.evaluate` takes.
        purifier: The purifier of its states; None if it acts on observed ones.
        worlds: The worlds that it was trained and evaluated in.
        run: Its configuration, results, versions and provenance.
        card: Its model card, Markdown.
    """

    agent: Any
    purifier: StatePurifier | None
    worlds: WorldPair
    run: StoredRun
    card: str

    def make_env(self, n_envs: int = 64, seed: int = 0) -> VecEnv:
        """Returns sessions of the test world as the agent observes them.

        Args:
            n_envs: Concurrent sessions.
            seed: Seed of the sessions, where ``evaluate`` does not set it.
        """
        from hrl_policies.worlds import purified_sessions

        return purified_sessions(self.worlds.test, self.run.config.session, n_envs, seed, self.purifier)


def pretrained_agents() -> tuple[str, ...]:
    """Returns the names of the agents that come with the package."""
    folder = resources.files(__package__)
    return tuple(sorted(path.name for path in folder.iterdir() if path.joinpath(CARD).is_file()))


def pretrained_folder(name: str | Path) -> Path:
    """Returns the folder of an agent: one that comes with the package, or an explicit path.

    Raises:
        ArtifactError: If there is neither.
    """
    if str(name) in pretrained_agents():
        return Path(str(resources.files(__package__).joinpath(str(name))))
    if Path(name).exists():
        return Path(name)
    raise ArtifactError(
        f"there is no run folder {name}, and no agent of that name comes with the package; it has "
        f"{', '.join(pretrained_agents())}"
    )


def load_pretrained(name: str | Path, *, data_dir: str | Path | None = None) -> PretrainedAgent:
    """Loads an agent that comes with the package, or one from a run folder.

    Makes its worlds, which takes some seconds the first time and is cached then.

    Args:
        name: One of :func:`pretrained_agents`, or the path of a run folder.
        data_dir: Folder with the official files, for runs on these.

    Raises:
        ArtifactError: If there is no such agent, its files are damaged, or its worlds are others here.
    """
    from hrl_policies.study.loading import load_policy, purifier_of, register_data_of, worlds_of
    from hrl_policies.study.store import load_run

    folder = pretrained_folder(name)
    run = load_run(folder)
    register_data_of(run)
    worlds = worlds_of(run.config, None, data_dir)
    card = folder / CARD
    return PretrainedAgent(
        agent=load_policy(run, worlds),
        purifier=purifier_of(run),
        worlds=worlds,
        run=run,
        card=card.read_text(encoding="utf-8") if card.exists() else "",
    )
