"""The response models of a data set's two worlds, each fitted on its own log, and reading any of them back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from kuaifair_env.data.cache import cache_dir
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import InteractionLog, Split
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import open_artifact
from kuaifair_env.progress import announce, announce_rebuilt
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.graded import GradedResponse, click_from, rounded_log
from kuaifair_env.response.known import ObservedResponse, TwinResponse, observed_block
from kuaifair_env.response.logged import LoggedResponse
from kuaifair_env.response.sequential import SequentialConfig, SequentialResponse

ResponseKind = Literal["auto", "observed", "factorised", "sequential"]
FittedResponse: TypeAlias = ObservedResponse | FactorisedResponse | SequentialResponse | GradedResponse

_CLASSES = (
    GradedResponse,
    LoggedResponse,
    ObservedResponse,
    FactorisedResponse,
    SequentialResponse,
    TwinResponse,
)
_FIT_VERSION = 7
_SEED = {"train": 101, "test": 202}
_FULL = 0.95


@dataclass(frozen=True)
class ResponseConfig:
    """Settings of :func:`fit_response`.

    Attributes:
        factorised: For factor models.
        sequential: For history-dependent models.
        context_share: Share of each user's rows, the earliest, that describe users and items when the training log is
            fitted; the model is fitted on the later ones.
    """

    factorised: FactorisedConfig = field(default_factory=FactorisedConfig)
    sequential: SequentialConfig = field(default_factory=SequentialConfig)
    context_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.context_share < 1:
            raise ValueError(f"context_share must lie within 0..1 (1 excluded), got {self.context_share}")


def fit_response(
    data: InteractionData,
    split: Split,
    kind: ResponseKind = "auto",
    *,
    config: ResponseConfig | None = None,
    seed: int | None = None,
) -> FittedResponse:
    """Fits the response model of one world on that world's log.

    The training world's model is fitted on the later part of each user's training log, with the earlier part as
    context. The test world's model is fitted on the test log, with the training log as context: a declared use, which
    says what users liked before, never what they do with a test row.

    ``kind="sequential"`` takes the order of the log's rows as the order in which users saw them. Where a test log has
    no time, set ``SequentialConfig(history_from="context")``.

    Args:
        data: The data set.
        split: ``"train"`` or ``"test"``.
        kind: ``"auto"`` looks feedback up where the test log covers 95 % of the pairs of its users and items, and fits
            a factor model otherwise.
        config: Settings; None takes the defaults.
        seed: Seed; None takes one of each split's own.

    Returns:
        The model; its ``describe()`` holds the fit report.

    Raises:
        DataError: If the log does not allow the kind that is asked for.
        ValueError: If ``split`` or ``kind`` is unknown.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    if kind not in get_args(ResponseKind):
        raise ValueError(f"kind must be one of {get_args(ResponseKind)}, got {kind!r}")
    config = config or ResponseConfig()
    seed = _SEED[split] if seed is None else seed
    log = data.test if split == "test" else data.train
    if kind == "auto":
        covered = split == "test" and not log.positives_only and observed_block(log).coverage >= _FULL
        kind = "observed" if covered else "factorised"
    if log.feedback is not None:
        return _fit_graded(data, split, kind, config, seed)
    if kind == "observed":
        return ObservedResponse.from_log(log, data)
    context: InteractionLog | None = data.train
    if split == "train":
        context, log = earlier_and_later(log, len(data.users), config.context_share)
    if kind == "factorised":
        from kuaifair_env.response.factorised_fit import fit_factorised  # needs scipy

        return fit_factorised(log, data, context_log=context, config=config.factorised, seed=seed)
    from kuaifair_env.response.sequential_fit import fit_sequential  # needs torch

    return fit_sequential(log, data, context_log=context, config=config.sequential, static=config.factorised, seed=seed)


def _fit_graded(
    data: InteractionData, split: Split, kind: ResponseKind, config: ResponseConfig, seed: int
) -> ObservedResponse | GradedResponse:
    """Looks graded feedback up, or fits its mean and spreads it around."""
    log = data.test if split == "test" else data.train
    feedback = [part.feedback for part in (data.train, data.test) if part.feedback is not None]
    largest = float(max(part.max() for part in feedback))
    if kind == "observed":
        return ObservedResponse.from_log(log, data, mode="watch_ratio", threshold=click_from(log), clip=largest)
    if kind == "sequential":
        raise DataError("graded feedback needs response='factorised', 'observed' or 'auto'")
    rounded = rounded_log(log, largest, seed)
    clicks = replace(data, train=rounded) if split == "train" else replace(data, test=rounded)
    inner = fit_response(clicks, split, kind, config=config, seed=seed)
    return GradedResponse.around(inner, log, largest, data.identity(log))


def earlier_and_later(log: InteractionLog, n_users: int, share: float) -> tuple[InteractionLog | None, InteractionLog]:
    """Splits a log by each user's time into an earlier part (None when it would be empty) and a later one.

    ``share`` of each user's rows, rounded down, go to the earlier part.
    """
    offsets = log.offsets(n_users)
    counts = np.diff(offsets)
    place = np.arange(len(log)) - offsets[log.users]
    earlier = place < np.floor(share * counts[log.users])
    if not earlier.any():
        return None, log
    return log.take(earlier), log.take(~earlier)


def load_response(path: str | Path) -> ResponseModel:
    """Reads any saved response model, whatever its kind.

    Raises:
        ArtifactError: If the file is corrupt, foreign, of another version or of an unknown kind.
    """
    with open_artifact(path) as (kind, tensors, settings):
        classes = {response_class.kind: response_class for response_class in _CLASSES}
        if kind not in classes:
            raise ValueError(f"the kind '{kind}' is unknown; known are {', '.join(classes)}")
        response: ResponseModel = classes[kind].restore(tensors, settings)
        return response


def cached_response(
    data: InteractionData, split: Split, kind: ResponseKind = "auto", folder: str | Path | None = None
) -> ResponseModel:
    """Returns :func:`fit_response` of a split from a cache folder, or from the default one; fits on first use."""
    if kind not in get_args(ResponseKind):
        raise ValueError(f"response must be one of {get_args(ResponseKind)}, got {kind!r}")
    contents = f"{data.data_hash}-{data.contents_hash}"
    name = f"{contents}-{split}-{kind}-v{_FIT_VERSION}.safetensors"
    path = cache_dir(folder) / "responses" / name
    if path.exists():
        try:
            return load_response(path)
        except ArtifactError as error:
            announce_rebuilt(error)
    announce(f"fitting what users of {data.provenance.name} answer in the {split} world (kept in {cache_dir(folder)})")
    response = fit_response(data, split, kind)
    response.save(path)
    return response
