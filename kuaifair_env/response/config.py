"""Settings of fitting response models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kuaifair_env.response.sequential import TransformerShape

HistorySource = Literal["log", "context"]


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the rows by role; the rest is fitted on.

    Attributes:
        stop: Rows that decide when to stop.
        calibrate: Rows that set the final offset and slopes.
        report: Rows that every reported figure comes from; nothing else touches them.
        max_rows: At most so many rows are used, drawn uniformly (a fit gains little from more); None takes all.
    """

    stop: float = 0.05
    calibrate: float = 0.05
    report: float = 0.10
    max_rows: int | None = 2_000_000

    def __post_init__(self) -> None:
        shares = (self.stop, self.calibrate, self.report)
        if min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"shares of rows must be above 0 and sum to less than 1, got {shares}")


@dataclass(frozen=True)
class NegativeSampling:
    """Settings of drawing non-clicks for a log that lists positives only.

    Repeats of a pair count once. For each positive of a user, ``per_positive`` items are drawn from the log's items
    with weight ``positives ** popularity_power``; draws that are positives of that user are dropped. Power 0 takes
    everything unseen as equally likely exposed, so that the model's item quality is the popularity of positives;
    power 1 takes exposure as proportional to positives, so that all items are equally good. Neither is known to be
    true; 0.5 lies between. The level of the click rate is not in such a log at all: ``positive_rate`` declares it
    (the intercept is shifted by prior correction, King and Zeng, "Logistic Regression in Rare Events Data", 2001,
    eq. 7), and None leaves the rate that the sampling happens to give.

    Attributes:
        per_positive: Negatives drawn for each positive.
        popularity_power: Exponent of the weights.
        positive_rate: Share of positives among exposures, if known from elsewhere.
    """

    per_positive: float = 4.0
    popularity_power: float = 0.5
    positive_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.per_positive > 0 or not 0 <= self.popularity_power <= 1:
            raise ValueError("per_positive must be above 0 and popularity_power within 0..1")
        if self.positive_rate is not None and not 0 < self.positive_rate < 1:
            raise ValueError(f"positive_rate must lie between 0 and 1, got {self.positive_rate}")


@dataclass(frozen=True)
class InputConfig:
    """Settings of the inputs: rank of the context log's SVD, and pseudo-counts that shrink small counts.

    Attributes:
        history_factors: Rank of the SVD whose item factors are pooled over a user's history; 0 leaves them out.
        item_pseudo_count: Exposures at the mean rate that are added to an item's click rate.
        user_pseudo_count: The same for a user's click rate and pooled history.
        tag_pseudo_count: The same for a user's clicks within one tag.
    """

    history_factors: int = 32
    item_pseudo_count: float = 20.0
    user_pseudo_count: float = 10.0
    tag_pseudo_count: float = 5.0


@dataclass(frozen=True)
class FactorisedConfig:
    """Settings of :func:`fit_factorised`; the defaults were chosen on held-out rows of KuaiRand-Pure.

    Precisions are those of normal priors around 0, in units of one row's log-likelihood: but for ``map_precision``
    they mean the same whatever the number of rows.

    Attributes:
        rank: Number of factors ``f``; 0 fits main effects alone.
        user_ids: Whether each user has an own bias ``b_u`` and factor ``p_u`` beside what the inputs say.
        inputs: How the context log is condensed.
        split: Which rows are held out for what.
        negatives: Used for logs of positives only.
        bias_precision: Prior precision of ``b_u`` and ``b_i``.
        factor_precision: Of ``p_u`` and ``q_i``.
        line_precision: Of ``w`` and ``v``.
        map_precision: Of ``P`` and ``Q``, times the square root of the number of fitted rows: with a product of two
            maps it is a nuclear-norm penalty, whose best weight grows as the noise does (Koltchinskii, Lounici and
            Tsybakov, "Nuclear-norm penalization and optimal rates", Annals of Statistics 2011).
        slope_prior: Standard deviation of the prior around 1 of the calibrating slopes.
        learning_rate: Of Adam, for factors, maps and lines.
        bias_learning_rate: Of Adam, for the biases.
        batch_size: Rows per step at most; small logs take smaller batches, see :func:`batch_size_for`.
        max_epochs: Passes at most.
        patience: Passes without a better held-out log loss before the end.
    """

    rank: int = 16
    user_ids: bool = True
    inputs: InputConfig = field(default_factory=InputConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    negatives: NegativeSampling = field(default_factory=NegativeSampling)
    bias_precision: float = 3.0
    factor_precision: float = 60.0
    line_precision: float = 50.0
    map_precision: float = 6.5
    slope_prior: float = 0.5
    learning_rate: float = 1e-3
    bias_learning_rate: float = 1e-2
    batch_size: int = 4096
    max_epochs: int = 40
    patience: int = 3


@dataclass(frozen=True)
class SequentialConfig:
    """Settings of :func:`fit_sequential`.

    Attributes:
        shape: Sizes of the transformer.
        history_from: ``"log"`` when the log's order is the order in which users saw things; ``"context"`` when its
            order is unknown, so that histories hold context rows only.
        dropout: While training.
        weight_decay: Of AdamW.
        learning_rate: Of AdamW.
        batch_size: Pieces of history per step at most.
        max_epochs: Passes at most.
        patience: Passes without a better held-out log loss before the end.
        slope_prior: Standard deviation of the prior around 1 of the slope of the history's part.
    """

    shape: TransformerShape = field(default_factory=TransformerShape)
    history_from: HistorySource = "log"
    dropout: float = 0.1
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 8
    patience: int = 2
    slope_prior: float = 0.5


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
