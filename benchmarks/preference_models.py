"""Preference models of a world by kind and seed, trained once for all benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsrm import load_purifier, save_purifier
from dsrm.belief import BeliefScales
from dsrm.belief_purifier import BeliefPurifier
from dsrm.preference_sessions import PreferenceSessions
from dsrm.preference_training import PreferenceConfig, PreferenceKind, fit_preference
from dsrm.pretraining import PretrainConfig
from dsrm.purifier import WorldKey
from dsrm.targets import Examples
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.schema import IntArray


class RememberedSessions(PreferenceSessions):
    """Sessions of which those for the same random numbers are played once: all models of a seed learn from the same."""

    def __init__(self, pair: WorldPair) -> None:
        super().__init__(pair.train, pair.scorer)
        self._drawn: dict[str, Examples] = {}

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`~dsrm.targets.ExampleSource`."""
        key = f"{rng.bit_generator.state} {len(users)} {np.asarray(users).tobytes().hex()}"
        if key not in self._drawn:
            self._drawn[key] = super().draw(users, rng)
        return self._drawn[key]

    def forget(self) -> None:
        """Drops what was drawn."""
        self._drawn.clear()


class Models:
    """Fitted models, each a file of a folder; those it lacks are trained as :func:`dsrm.pretrain` does.

    Args:
        pair: The worlds.
        folder: Where the files are.
    """

    def __init__(self, pair: WorldPair, folder: Path) -> None:
        self._pair, self._folder = pair, folder
        self._source: RememberedSessions | None = None
        self._seed = 0

    @property
    def source(self) -> RememberedSessions:
        """What models learn from."""
        if self._source is None:
            self._source = RememberedSessions(self._pair)
        return self._source

    def path(self, kind: PreferenceKind, seed: int) -> Path:
        """Returns where a purifier that holds the model is."""
        return self._folder / f"{kind}-seed-{seed}.safetensors"

    def load(self, kind: PreferenceKind, seed: int) -> BeliefPurifier:
        """Returns a purifier that holds the model, trained now if there is none."""
        path = self.path(kind, seed)
        if not path.exists():
            trained = self._trained(kind, seed)
            print(f"{kind}, seed {seed}: {_shown(trained.report)}", flush=True)
            save_purifier(trained, path)
        purifier = load_purifier(path)
        assert isinstance(purifier, BeliefPurifier)
        return purifier

    def _trained(self, kind: PreferenceKind, seed: int) -> BeliefPurifier:
        if seed != self._seed:
            self.source.forget()
            self._seed = seed
        defaults = PretrainConfig(mode="belief", seed=seed)
        schedule = defaults.noise_schedule()
        size, training = (
            (defaults.network_width, defaults.network_blocks),
            (defaults.rounds_and_batches, defaults.student),
        )
        config = PreferenceConfig(kind, seed, schedule.kind, schedule.levels, *size, *training)
        fitted = fit_preference(self.source, config)
        key, scales = WorldKey.of_world(self._pair.train), BeliefScales.of_users(fitted.scales)
        return BeliefPurifier(self._pair.scorer, fitted.model, scales, key, fitted.report)


def _shown(report: Mapping[str, object]) -> dict[str, object]:
    """Returns the entries of a report that say how well a model fits."""
    return {name: report[name] for name in ("log_density", "validation_losses", "distillation") if name in report}
