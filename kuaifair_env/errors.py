"""Errors that say what is wrong, where, and what would be right."""

from __future__ import annotations

from pathlib import Path

# What torch says where a processor's memory or that of a GPU does not suffice.
_SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory")


class KuaiFairError(Exception):
    """Base of every error that this library raises on purpose."""


class DataError(KuaiFairError, ValueError):
    """A log, a table or a file does not hold what it must.

    Args:
        problem: What is wrong and what would be right.
        file: The file in which it was found.
        line: 1-based line in that file (the header is line 1).
        column: Name of the column.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        column: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.line = line
        self.column = column
        places = (
            self.file,
            None if line is None else f"line {line}",
            None if column is None else f"column '{column}'",
        )
        where = ", ".join(place for place in places if place)
        super().__init__(f"{where}: {problem}" if where else problem)


def lack_of_memory(error: BaseException) -> MemoryError | None:
    """Returns what an error says of memory that could not be had, or None; torch says it with a ``RuntimeError``."""
    if isinstance(error, MemoryError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and any(words in text for words in _SHORTAGES):
        return MemoryError(text)
    return None


class HiddenTruthError(KuaiFairError):
    """An agent asked for what only the users of a world know."""


class TrainingError(KuaiFairError, ValueError):
    """Training diverged: what was learned is NaN or infinite."""


class ArtifactError(KuaiFairError, ValueError):
    """A saved model, cache or run is corrupt, foreign, or of another version."""


class SettingsError(ArtifactError):
    """A file of settings that a user wrote is missing, cannot be read, or does not say what it has to."""


class MismatchError(ArtifactError):
    """An agent, purifier or encoder was made for another world: other data, catalogue or embeddings."""
