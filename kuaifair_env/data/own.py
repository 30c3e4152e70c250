"""Where the tables of one's own data set lie, and how they are read: plain data that a study or a run can store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.errors import DataError
from kuaifair_env.files import parse_as, problem_of

MIN_TEST_EXPOSURES = 20
"""Test-log exposures that an item needs to be a candidate, where nothing else is said."""

TABLES = ("data", "test", "items", "users")
"""Fields of :class:`OwnTables` that name files."""

_READING = (
    "columns",
    "positive",
    "drop_duplicates",
    "positives_only",
    "negatives_per_positive",
    "negatives_seed",
)


@dataclass(frozen=True)
class OwnTables:
    """Files of one's own data set; see :meth:`~kuaifair_env.data.dataset.InteractionData.from_frames` for settings.

    Attributes:
        data: The training log, or the one log where there is no test log.
        test: The test log; None splits the log.
        items: Table of items, or None.
        users: Table of users, or None.
        columns: Names of columns (``user``, ``item``, ``click``, ``time``, ...), where they are not the usual ones.
        split: How one log is split, by ``"time"`` or by ``"user"``.
        test_share: Share of one log that the test log gets.
        positive: A column, and the value from which a row is a click.
        positives_only: Which logs list clicks only.
        negatives_per_positive: Non-clicks drawn for each click of such a log.
        negatives_seed: Seed of the draws.
        drop_duplicates: Whether repeated rows are dropped.
        min_test_exposures: Test-log exposures that an item needs to be a candidate.
        replay: Whether the test world replays the test log (see :mod:`kuaifair_env.replay`).
    """

    data: str
    test: str | None = None
    items: str | None = None
    users: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "time"
    test_share: float = 0.2
    positive: Mapping[str, float] | None = None
    positives_only: str | bool = False
    negatives_per_positive: float | None = None
    negatives_seed: int = 0
    drop_duplicates: bool | None = None
    min_test_exposures: int = MIN_TEST_EXPOSURES
    replay: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> OwnTables:
        """Reads what :meth:`as_dict` wrote, or what a user did.

        Raises:
            DataError: If a key is missing or unknown, or its value of another type.
        """
        known = [column.name for column in fields(cls)]
        unknown = sorted(set(content) - set(known))
        if unknown or "data" not in content:
            raise DataError(
                f"a data set of one's own has 'data' and maybe {', '.join(known[1:])}; got {', '.join(content)}"
            )
        try:
            return parse_as(cls, dict(content))
        except (TypeError, ValueError) as error:
            raise DataError(f"a data set of one's own: {problem_of(error)}") from error

    def as_dict(self) -> dict[str, Any]:
        """Returns what differs from the defaults, JSON-able."""
        whole = asdict(self)
        usual = OwnTables(self.data)
        return {name: value for name, value in whole.items() if name == "data" or value != getattr(usual, name)}

    def resolved(self, folder: str | Path = ".") -> OwnTables:
        """Returns the same with absolute paths; relative ones start from a folder.

        Of the files their headers are read: a column that is missing is an error here already.

        Raises:
            DataError: If a file is missing or lacks a column that is read.
            ValueError: If the log cannot be split in this way.
        """
        files: dict[str, str] = {}
        for name in TABLES:
            given = getattr(self, name)
            if given is None:
                continue
            path = (Path(folder) / Path(given).expanduser()).resolve()
            if not path.is_file():
                raise DataError(f"there is no such file for '{name}'", file=path)
            files[name] = str(path)
        resolved = OwnTables.from_dict({**self.as_dict(), **files})
        resolved._check_columns()
        return resolved

    def load(self, name: str) -> InteractionData:
        """Reads the data set; its provenance says where the tables lie.

        Raises:
            DataError: If the tables cannot be read; see ``InteractionData.from_frames``.
        """
        settings: dict[str, Any] = {"name": name, **self._reading()}
        if self.test is None:
            split: dict[str, Any] = {"split": self.split, "test_share": self.test_share}
            data = InteractionData.from_log(self.data, self.items, self.users, **split, **settings)
        else:
            data = InteractionData.from_frames(self.data, self.test, self.items, self.users, **settings)
        stored = {**data.provenance.settings, "tables": self.as_dict()}
        return replace(data, provenance=replace(data.provenance, settings=stored))

    def _reading(self) -> dict[str, Any]:
        """Returns how frames are read, as keywords of ``InteractionData.from_frames``."""
        return {name: getattr(self, name) for name in _READING}

    def _check_columns(self) -> None:
        from kuaifair_env.data.frames import FrameReading, check_columns  # needs pandas
        from kuaifair_env.data.tables import check_split, read_header

        reading = FrameReading.of(**self._reading())
        headers = {name: read_header(path) for name in TABLES if (path := getattr(self, name)) is not None}
        log = headers["data"]
        if self.test is None:
            check_split(log, self.split, self.test_share, reading.columns)
        logs = {"train": log, "test": headers.get("test", log)}
        check_columns(logs, headers.get("items"), headers.get("users"), reading)
