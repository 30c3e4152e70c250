"""Where the data of an environment id come from: official files, a twin, or tables of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from kuaifair_env.data.clicks import Clicks, kuairand_clicks, kuairec_clicks
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.own import MIN_TEST_EXPOSURES, OwnTables
from kuaifair_env.errors import DataError
from kuaifair_env.response.known import TwinResponse

if TYPE_CHECKING:
    from kuaifair_env.data.published import DatasetName
    from kuaifair_env.synthetic.config import TasteStrength

Source = Literal["auto", "real", "twin"]
TwinName: TypeAlias = Literal["KuaiRec", "KuaiRand", "Toy"]

CLICK_SETTINGS = ("positive", "feedback", "clip")
"""Settings of a world that say what counts as a click."""

TWIN_SETTINGS = ("taste", "conformity")
"""Settings of a world that only a twin has."""


class IncompleteDataWarning(UserWarning):
    """Files in the official format are not the whole official ones: a part of them, or a twin that was written."""


class TwinFallbackWarning(UserWarning):
    """A world was asked for by the name of a real data set and made from its synthetic twin."""


@dataclass(frozen=True)
class WorldData:
    """What a world is built from.

    Attributes:
        data: The data set.
        truth: The true response of a twin's users, where it is known.
        largest: Largest feedback.
        graded: Whether feedback is more than whether there was a click.
        min_test_exposures: Test-log exposures that a candidate needs.
        canonical: Whether what is left out is part of what the id means, so that nobody needs to be told.
    """

    data: InteractionData
    truth: TwinResponse | None = None
    largest: float = 1.0
    graded: bool = False
    min_test_exposures: int = MIN_TEST_EXPOSURES
    canonical: bool = True


class DataSource(Protocol):
    """Data that are found and can be read; equal sources are equal keys."""

    def __hash__(self) -> int: ...

    def load(self) -> WorldData:
        """Reads or makes the data."""
        ...


class Origin(Protocol):
    """Where the data of an environment id come from."""

    @property
    def description(self) -> str:
        """One line for tables."""
        ...

    @property
    def official(self) -> DatasetName | None:
        """Name of the official data set that is used when its files are found, or None."""
        ...

    @property
    def twin(self) -> TwinName | None:
        """Name of the synthetic twin, or None."""
        ...

    @property
    def replay(self) -> bool:
        """Whether the test world replays the test log (see :mod:`kuaifair_env.replay`)."""
        ...

    def check_settings(self, env_id: str, settings: Mapping[str, Any]) -> None:
        """Checks what can be said of settings before any data are found.

        Raises:
            DataError: If they do not say what a click of these data is.
            ValueError: If a setting does not fit.
        """
        ...

    def source(self, env_id: str, settings: Mapping[str, Any]) -> DataSource:
        """Finds the data that an id's settings name, and checks the settings.

        Raises:
            DataError: If they are missing or not what is demanded.
            ValueError: If a setting does not fit.
        """
        ...


@dataclass(frozen=True)
class TwinData:
    """A synthetic twin.

    Attributes:
        name: Its name.
        clicks: What counts as a click.
        taste: Strength of tastes.
        conformity: Share of the training world's conformity that the test world's users have.
    """

    name: TwinName
    clicks: Clicks
    taste: TasteStrength | float
    conformity: float

    def load(self) -> WorldData:
        """See :class:`DataSource`."""
        from kuaifair_env.synthetic.config import twin_config
        from kuaifair_env.synthetic.twin import load_twin

        twin = load_twin(twin_config(self.name, taste_strength=self.taste, clicks=self.clicks))
        truth = TwinResponse(twin.truth, self.conformity, twin.data.provenance.as_dict())
        return WorldData(twin.data, truth, self.clicks.largest, self.clicks.graded)


@dataclass(frozen=True)
class OfficialFiles:
    """Official files.

    Attributes:
        name: Name of the data set.
        path: Where they lie.
        clicks: What counts as a click.
        min_test_exposures: Test-log exposures that a candidate needs.
    """

    name: DatasetName
    path: Path
    clicks: Clicks
    min_test_exposures: int = MIN_TEST_EXPOSURES

    def load(self) -> WorldData:
        """See :class:`DataSource`."""
        return WorldData(_official_data(self), None, self.clicks.largest, self.clicks.graded, self.min_test_exposures)


@dataclass(frozen=True)
class TwinOrigin:
    """A twin, whatever files there are.

    Attributes:
        twin: See :class:`Origin`, also for the others.
        description: One line.
    """

    twin: TwinName
    description: str
    official: None = None
    replay: Literal[False] = False

    def check_settings(self, env_id: str, settings: Mapping[str, Any]) -> None:
        """See :class:`Origin`."""
        if settings.get("source") == "real":
            raise ValueError(f"{env_id} is synthetic, there are no real files behind it; drop source='real'")
        _check_replay(self, env_id, settings)
        _clicks_of(self.twin, settings)

    def source(self, env_id: str, settings: Mapping[str, Any]) -> DataSource:
        """See :class:`Origin`."""
        self.check_settings(env_id, settings)
        return _twin_data(self.twin, settings)


@dataclass(frozen=True)
class OfficialOrigin:
    """Official files where they are found, else the twin, where there is one.

    Attributes:
        twin: See :class:`Origin`, also for the next two.
        official: The data set.
        description: One line.
        min_test_exposures: Test-log exposures that a candidate needs.
        replay: See :class:`Origin`.
    """

    twin: TwinName | None
    official: DatasetName
    description: str
    min_test_exposures: int = MIN_TEST_EXPOSURES
    replay: bool = False

    def check_settings(self, env_id: str, settings: Mapping[str, Any]) -> None:
        """See :class:`Origin`."""
        if self.twin is None and settings.get("source") == "twin":
            raise ValueError(f"{env_id} has no synthetic twin; drop source='twin'")
        _check_replay(self, env_id, settings)
        _clicks_of(self.official, settings)

    def source(self, env_id: str, settings: Mapping[str, Any]) -> DataSource:
        """See :class:`Origin`."""
        from kuaifair_env.data import find_source

        self.check_settings(env_id, settings)

        source: Source = settings.get("source", "auto")
        path = None if source == "twin" else find_source(self.official, settings.get("data_dir"))
        if path is None:
            if self.twin is None:
                raise DataError(
                    f"{env_id} has no synthetic twin and needs the official files, which were not found; get them "
                    f"with: kuaifair data fetch {self.official}, or name their place by data_dir or KUAIFAIR_DATA"
                )
            if source == "real":
                raise DataError(
                    f"{env_id} with source='real' needs the official files, and the cache does not hold them; "
                    f"get them with: kuaifair data fetch {self.official}"
                )
            if source == "auto":
                _warn_of_twin(env_id, self.official)
            return _twin_data(self.twin, settings)
        if not set(TWIN_SETTINGS).isdisjoint(settings):
            raise ValueError(f"'taste' and 'conformity' are settings of twins, but {env_id} reads {path}; drop them")
        files = OfficialFiles(self.official, path, _clicks_of(self.official, settings), self.min_test_exposures)
        _check_provenance(files, source, settings.get("allow_partial", False))
        return files


@dataclass(frozen=True, eq=False)
class OwnOrigin:
    """A data set of one's own: in memory, or in files that are read when a world is first made.

    Attributes:
        name: The id, which the data set is called by.
        tables: The data set, or where its files lie.
        min_test_exposures: Test-log exposures that a candidate needs.
        replay: See :class:`Origin`.
    """

    name: str
    tables: InteractionData | OwnTables
    min_test_exposures: int = MIN_TEST_EXPOSURES
    replay: bool = False
    official: None = None
    twin: None = None

    @classmethod
    def of_tables(cls, name: str, tables: OwnTables) -> OwnOrigin:
        """Returns the origin of an id whose data lie in files."""
        return cls(name, tables, tables.min_test_exposures, tables.replay)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes read files themselves.
        return {name: value for name, value in vars(self).items() if name != "data"}

    @property
    def description(self) -> str:
        """See :class:`Origin`."""
        if isinstance(self.tables, OwnTables):
            return f"your own: {self.tables.data}"
        return f"your own: {self.tables.provenance.name}, {self.tables.provenance.description}"

    @cached_property
    def data(self) -> InteractionData:
        """The data set, read on first use."""
        return self.tables.load(self.name) if isinstance(self.tables, OwnTables) else self.tables

    def same_as(self, other: OwnOrigin) -> bool:
        """Whether another origin has the same data."""
        if (self.min_test_exposures, self.replay) != (other.min_test_exposures, other.replay):
            return False
        if isinstance(self.tables, OwnTables) and isinstance(other.tables, OwnTables):
            return self.tables == other.tables
        hashes = {(origin.data.data_hash, origin.data.contents_hash) for origin in (self, other)}
        return len(hashes) == 1

    def check_settings(self, env_id: str, settings: Mapping[str, Any]) -> None:
        """See :class:`Origin`; ``data_dir``, which names official files, does not matter."""
        foreign = [name for name in (*CLICK_SETTINGS, *TWIN_SETTINGS, "allow_partial") if settings.get(name)]
        if settings.get("source", "auto") != "auto":
            foreign.append("source")
        if foreign:
            raise ValueError(
                f"{foreign[0]!r} is no setting of {env_id}, which has data of your own: what a click is, and what is "
                "read, was said when it was registered"
            )
        _check_replay(self, env_id, settings)

    def source(self, env_id: str, settings: Mapping[str, Any]) -> DataSource:
        """See :class:`Origin`."""
        self.check_settings(env_id, settings)
        return self

    def load(self) -> WorldData:
        """See :class:`DataSource`."""
        return WorldData(self.data, min_test_exposures=self.min_test_exposures, canonical=False)


def _check_replay(origin: Origin, env_id: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings of replays elsewhere, and those of models in replays."""
    if not origin.replay and settings.get("min_candidates") is not None:
        raise ValueError(
            f"'min_candidates' is a setting of replays, whose users have candidates of their own; {env_id} is none"
        )
    if origin.replay and settings.get("response", "auto") != "auto":
        raise ValueError(
            f"users of {env_id} answer what was logged, and nothing is modelled; drop response={settings['response']!r}"
        )


def _twin_data(twin: TwinName, settings: Mapping[str, Any]) -> TwinData:
    clicks = _clicks_of(twin, settings)
    return TwinData(twin, clicks, settings.get("taste", "measured"), settings.get("conformity", 0.0))


def _clicks_of(data: TwinName | DatasetName, settings: Mapping[str, Any]) -> Clicks:
    """Returns what counts as a click by an id's settings: ``positive``, ``feedback`` and ``clip``."""
    given = {name: settings[name] for name in CLICK_SETTINGS if name in settings}
    return kuairec_clicks(**given) if data in ("KuaiRec", "kuairec") else kuairand_clicks(**given)


@lru_cache(maxsize=4)
def _official_data(files: OfficialFiles) -> InteractionData:
    from kuaifair_env.data import load_kuairand, load_kuairec

    if files.name == "kuairec":
        return load_kuairec(files.path, **files.clicks.describe())
    return load_kuairand(files.path, version=files.name, positive=dict(files.clicks.positive))


def _check_provenance(files: OfficialFiles, source: Source, allow_partial: bool) -> None:
    """Refuses, or warns of, files that are not the whole official ones."""
    provenance = _official_data(files).provenance
    if provenance.origin == "real" or (provenance.origin == "partial" and allow_partial):
        return
    found = f"this is {provenance.name} ({provenance.origin}: {provenance.description})"
    if source == "real":
        hint = "; allow_partial=True takes a part, labelled as such" if provenance.origin == "partial" else ""
        raise DataError(
            f"source='real' needs the whole official files of {files.name}, but {found}{hint}", file=files.path
        )
    warnings.warn(f"{files.path}: {found}, not the whole official files", IncompleteDataWarning, stacklevel=4)


def _warn_of_twin(env_id: str, official: str) -> None:
    warnings.warn(
        f"\n{'*' * 88}\n"
        f"*  {env_id}: the official files were not found, so this is the SYNTHETIC TWIN.\n"
        f"*  Do not publish its numbers as results on the real data.\n"
        f"*  Get the files: kuaifair data fetch {official}   |  forbid this: source='real'  |  "
        f"silence it: source='twin'\n"
        f"{'*' * 88}",
        TwinFallbackWarning,
        stacklevel=4,
    )
