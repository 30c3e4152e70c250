"""Probes: whether purified states hold more interest and less popularity than observed ones, and are of more use.

Low popularity decodability alone proves nothing, since a constant state has it; interest must rise while popularity
falls. Every probe is cross-validated over users, with bootstrap intervals over users. All states are measured on the
same users, folds and resamples, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dsrm.probe_data import ProbeSet
from dsrm.purifier import StatePurifier
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.world import World

RAW = "raw"

MEASURES = {
    "recovery_cosine": "recovery cosine to s* (+)",
    "recovery_mse": "recovery error (-)",
    "taste_r2": "true taste, R2 (+)",
    "auc": "AUC within users (+)",
    "top_click_rate": "click rate of top 10 (+)",
    "ndcg": "NDCG@10 (+)",
    "interest": "interest, accuracy (+)",
    "interest_f1": "interest, macro F1 (+)",
    "interest_purity": "interest among neighbours (+)",
    "interest_silhouette": "interest silhouette (+)",
    "popularity_r2": "popularity, R2 (-)",
    "popularity_knn_r2": "popularity, kNN R2 (-)",
    "popularity_r2_given_interest": "popularity given interest, R2 (-)",
    "level_r2": "long-run popularity, R2 (-)",
    "popularity_purity": "popularity among neighbours (-)",
    "popularity_silhouette": "popularity silhouette (-)",
    "effective_rank": "effective rank",
    "participation": "participation ratio",
    "raw_cosine": "cosine to the raw state",
    "raw_r2": "raw state explained, R2",
}
"""Measures and their titles; ``+``: higher is better, ``-``: lower is better. See :func:`probe`."""

_FOLDS = 5
_NEIGHBOURS = 15
_RESAMPLES, _STATISTIC_RESAMPLES, _SPECTRUM_RESAMPLES = 500, 200, 50
_DECILES = 10
_TOP = 10
_MAX_FOR_SILHOUETTE = 2_000
_RIDGE = 1e-2

Statistic = Callable[[NDArray[np.int64]], float]
"""A figure of chosen users, which may repeat."""


@dataclass(frozen=True)
class Measure:
    """A figure with its bootstrap distribution.

    Attributes:
        value: Over all users.
        resampled: ``float64 (resamples,)``, over resampled users.
    """

    value: float
    resampled: NDArray[np.float64]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval over users."""
        low, high = np.percentile(self.resampled, [2.5, 97.5])
        return float(low), float(high)

    def gain_over(self, other: Measure) -> Measure:
        """Returns the paired difference; both must come from the same probe set and seed."""
        return Measure(self.value - other.value, self.resampled - other.resampled)

    def as_dict(self) -> dict[str, float]:
        """Returns value and interval, JSON-able."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class ProbeReport:
    """The measures of several states on one probe set.

    Attributes:
        kind: Kind of windows.
        users: Number of users.
        classes: Number of interests, and the accuracy of always guessing the most frequent.
        measures: Name of the state -> name of the measure -> figure.
    """

    kind: str
    users: int
    classes: tuple[int, float]
    measures: Mapping[str, Mapping[str, Measure]]

    def as_dict(self) -> dict[str, Any]:
        """Returns figures, intervals and paired gains over the raw state, JSON-able."""
        raw = self.measures[RAW]
        return {
            "kind": self.kind,
            "users": self.users,
            "interests": self.classes[0],
            "majority_accuracy": self.classes[1],
            "purifiers": {
                state: {
                    name: measure.as_dict() | {"gain": measure.gain_over(raw[name]).as_dict()}
                    for name, measure in measures.items()
                }
                for state, measures in self.measures.items()
            },
        }


def purified_states(probes: ProbeSet, world: World, purifiers: Mapping[str, StatePurifier]) -> dict[str, FloatArray]:
    """Returns the states to compare, the observed ones first, ``float32 (n, d)`` each.

    Components beyond ``d``, which some purifiers append, are left out.
    """
    states = {RAW: probes.states}
    for name, purifier in purifiers.items():
        purifier.bind(world)
        states[name] = purifier.purify(probes.states, probes.window)[:, : world.dimension]
    return states


def probe(probes: ProbeSet, states: Mapping[str, FloatArray], seed: int = 0) -> ProbeReport:
    """Measures every state; :data:`MEASURES` holds the titles.

    ``interest`` and ``interest_f1`` are of a logistic probe. ``popularity_r2`` and ``popularity_knn_r2`` are of the
    window's mean log-popularity, ``level_r2`` of the user's long-run level, ``popularity_r2_given_interest`` after
    interest is taken out of both sides. Purities are among 15 neighbours. ``auc`` is within users, of ``cos(z, e_i)``
    on unbiased feedback; ``top_click_rate`` and ``ndcg`` are of the ten best items with known feedback. In twins,
    ``recovery_cosine`` and ``recovery_mse`` compare with the clean state, and ``taste_r2`` is of the true taste.
    ``raw_cosine`` and ``raw_r2`` compare with the observed state (both 1 for the identity).

    Args:
        probes: Windows and labels.
        states: ``float32 (n, d)`` by name; ``"raw"`` must be among them.
        seed: Seed of folds and resamples.

    Raises:
        ValueError: If the observed states are missing.
    """
    if RAW not in states:
        raise ValueError(f"the observed states must be given as {RAW!r}")
    evaluation = _ProbeEvaluation(probes, np.random.default_rng(seed))
    labels = probes.interest[probes.interest >= 0]
    majority = float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0
    return ProbeReport(
        probes.kind,
        len(probes),
        (len(np.unique(labels)), majority),
        {name: evaluation.measures(vectors) for name, vectors in states.items()},
    )


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Returns the mean F1 of the classes that are there; the checks of scikit-learn take a hundred times as long.

    Args:
        truth: ``int64 (n,)``, classes from 0.
        predicted: ``int64 (n,)``, classes from 0.
    """
    n_classes = int(max(truth.max(), predicted.max())) + 1
    sizes, guesses = (np.bincount(labels, minlength=n_classes) for labels in (truth, predicted))
    hits = np.bincount(truth[truth == predicted], minlength=n_classes)
    there = sizes > 0
    return float((2.0 * hits[there] / (sizes + guesses)[there]).mean())


def report_table(report: ProbeReport) -> str:
    """Returns all measures, one column for each state; ``*`` marks a difference from raw whose interval excludes 0."""
    raw = report.measures[RAW]
    titles = {name: title for name, title in MEASURES.items() if name in raw}
    columns = [["", *titles.values()]]
    for state, measures in report.measures.items():
        columns.append([state, *(_cell(measures[name], raw[name]) for name in titles)])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for title, *cells in zip(*columns, strict=True):
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    classes, majority = report.classes
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"{report.users} held-out users, {report.kind} windows; [95 % bootstrap over users]; * differs from raw.",
        f"{classes} interests; always guessing the most frequent gives {majority:.3f}.",
    ]
    return "\n".join(lines)


def _cell(measure: Measure, raw: Measure) -> str:
    low, high = measure.interval
    gain_low, gain_high = measure.gain_over(raw).interval
    mark = "*" if gain_low > 0 or gain_high < 0 else " "
    return f"{measure.value:.3f} [{low:.3f}, {high:.3f}]{mark}"


class _ProbeEvaluation:
    """Applies all probes to one state after another, on the same folds and resamples."""

    def __init__(self, probes: ProbeSet, rng: np.random.Generator) -> None:
        self._probes = probes
        self._resamples = rng.integers(len(probes), size=(_RESAMPLES, len(probes)))
        self._folds = rng.permutation(len(probes)) % _FOLDS
        edges = np.quantile(probes.popularity, np.linspace(0, 1, _DECILES + 1)[1:-1])
        self._decile = np.searchsorted(edges, probes.popularity)

    def measures(self, states: FloatArray) -> dict[str, Measure]:
        features = states.astype(np.float64)
        features = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6)
        measures = self._interest(features) | self._popularity(features) | self._neighbours(features)
        measures |= self._geometry(states) | self._utility(states)
        if self._probes.clean is not None:
            measures |= self._recovery(states, features)
        return measures | self._identity(states, features)

    def _interest(self, features: NDArray[np.float64]) -> dict[str, Measure]:
        from sklearn.linear_model import LogisticRegression

        labels = self._probes.interest
        known = labels >= 0
        if len(np.unique(labels[known])) < 2:
            return {}
        predicted = np.full(len(labels), -2)
        model = LogisticRegression(C=0.1, max_iter=200)
        predicted[known] = self._predict(model, features, labels, known)

        def accuracy(users: NDArray[np.int64]) -> float:
            users = users[known[users]]
            return float((predicted[users] == labels[users]).mean())

        def f1(users: NDArray[np.int64]) -> float:
            users = users[known[users]]
            return macro_f1(labels[users], predicted[users])

        return {"interest": self._bootstrap(accuracy), "interest_f1": self._bootstrap(f1)}

    def _popularity(self, features: NDArray[np.float64]) -> dict[str, Measure]:
        from sklearn.neighbors import KNeighborsRegressor

        popularity, level, interest = self._probes.popularity, self._probes.level, self._probes.interest
        neighbours = self._predict(KNeighborsRegressor(_NEIGHBOURS), features, popularity)
        measures = {
            "popularity_r2": self._r2(popularity, self._ridge(features, popularity)),
            "level_r2": self._r2(level, self._ridge(features, level)),
            "popularity_knn_r2": self._r2(popularity, neighbours),
        }
        if (interest >= 0).any():
            rest = _without_class(popularity[:, None], interest)[:, 0]
            predicted = self._ridge(_without_class(features, interest), rest)
            measures["popularity_r2_given_interest"] = self._r2(rest, predicted)
        return measures

    def _neighbours(self, features: NDArray[np.float64]) -> dict[str, Measure]:
        from sklearn.metrics import silhouette_samples
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=_NEIGHBOURS + 1).fit(features)
        neighbours = model.kneighbors(return_distance=False)[:, :_NEIGHBOURS]
        measures = {}
        for name, labels in (("interest", self._probes.interest), ("popularity", self._decile)):
            rows = np.flatnonzero(labels >= 0)
            if len(np.unique(labels[rows])) < 2:
                continue
            same = (labels[neighbours] == labels[:, None]).mean(axis=1)
            measures[f"{name}_purity"] = self._mean(same, labels >= 0)
            sample = rows[:_MAX_FOR_SILHOUETTE]
            silhouettes = np.zeros(len(labels))
            silhouettes[sample] = silhouette_samples(features[sample], labels[sample])
            measures[f"{name}_silhouette"] = self._mean(silhouettes, np.isin(np.arange(len(labels)), sample))
        return measures

    def _geometry(self, states: FloatArray) -> dict[str, Measure]:
        def spectrum(users: NDArray[np.int64]) -> NDArray[np.float64]:
            values = np.linalg.eigvalsh(np.cov(states[users].astype(np.float64), rowvar=False))
            return np.asarray(np.maximum(values, 1e-12))

        def effective_rank(users: NDArray[np.int64]) -> float:
            share = np.sqrt(spectrum(users))
            share /= share.sum()
            return float(np.exp(-(share * np.log(share)).sum()))

        def participation(users: NDArray[np.int64]) -> float:
            values = spectrum(users)
            return float(values.sum() ** 2 / (values**2).sum())

        return {
            "effective_rank": _centred(self._bootstrap(effective_rank, _SPECTRUM_RESAMPLES)),
            "participation": _centred(self._bootstrap(participation, _SPECTRUM_RESAMPLES)),
        }

    def _utility(self, states: FloatArray) -> dict[str, Measure]:
        from kuaifair_env.response.calibration import within_user_auc

        probes = self._probes
        owners = np.searchsorted(probes.users, probes.log.users)
        scores = np.einsum("nd,nd->n", unit_rows(states)[owners], probes.embeddings[probes.log.items])
        auc = within_user_auc(owners, probes.log.clicks, scores)
        weights, values = np.zeros(len(probes)), np.zeros(len(probes))
        weights[auc.users], values[auc.users] = auc.weights, auc.values
        rate, gain, enough = _top_of_each(owners, scores, probes.log.clicks, len(probes))

        def mean_auc(users: NDArray[np.int64]) -> float:
            return float(np.average(values[users], weights=weights[users]))

        return {
            "auc": self._bootstrap(mean_auc),
            "top_click_rate": self._mean(rate, enough),
            "ndcg": self._mean(gain, enough & (gain >= 0)),
        }

    def _recovery(self, states: FloatArray, features: NDArray[np.float64]) -> dict[str, Measure]:
        clean, taste = self._probes.clean, self._probes.taste
        assert clean is not None and taste is not None
        centred, truth = states - states.mean(axis=0), clean - clean.mean(axis=0)
        cosines = np.einsum("nd,nd->n", unit_rows(centred), unit_rows(truth))
        # States and clean states differ in scale, which no probe depends on; the error is after the best common scale.
        scale = float((centred * truth).sum() / max((centred**2).sum(), 1e-12))
        errors = ((scale * centred - truth) ** 2).mean(axis=1) / float((truth**2).mean())
        predicted = np.column_stack([self._ridge(features, column) for column in taste.T])
        return {
            "recovery_cosine": self._mean(cosines),
            "recovery_mse": self._mean(errors),
            "taste_r2": self._r2(taste.astype(np.float64), predicted),
        }

    def _identity(self, states: FloatArray, features: NDArray[np.float64]) -> dict[str, Measure]:
        raw = self._probes.states
        cosines = np.einsum("nd,nd->n", unit_rows(states), unit_rows(raw))
        residual = ((raw - self._ridge(features, raw.astype(np.float64))) ** 2).sum(axis=1)
        spread = ((raw - raw.mean(axis=0)) ** 2).sum(axis=1)

        def explained(users: NDArray[np.int64]) -> float:
            return float(1.0 - residual[users].sum() / spread[users].sum())

        return {"raw_cosine": self._mean(cosines), "raw_r2": self._bootstrap(explained)}

    def _predict(
        self, model: Any, features: NDArray[np.float64], target: NDArray[Any], rows: Any = slice(None)
    ) -> NDArray[Any]:
        """Returns cross-validated predictions for the chosen rows; each fold is predicted from the others."""
        from sklearn.model_selection import PredefinedSplit, cross_val_predict

        folds = PredefinedSplit(self._folds[rows])
        return np.asarray(cross_val_predict(model, features[rows], target[rows], cv=folds))

    def _ridge(self, features: NDArray[np.float64], target: NDArray[Any]) -> NDArray[np.float64]:
        """Returns cross-validated ridge predictions of a target ``(n,)`` or ``(n, m)``."""
        predicted = np.empty(target.shape)
        for fold in range(_FOLDS):
            inside = self._folds != fold
            x, y = features[inside], target[inside]
            gram = x.T @ x + len(x) * _RIDGE * np.eye(x.shape[1])
            slope = np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)))
            predicted[~inside] = y.mean(axis=0) + features[~inside] @ slope
        return predicted

    def _r2(self, truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> Measure:
        def r2(users: NDArray[np.int64]) -> float:
            y = truth[users]
            residual = ((y - predicted[users]) ** 2).sum()
            return float(1.0 - residual / max(((y - y.mean(axis=0)) ** 2).sum(), 1e-12))

        return self._bootstrap(r2)

    def _mean(self, values: NDArray[Any], known: NDArray[np.bool_] | None = None) -> Measure:
        """Returns the mean of one value for each user, over the users for whom it is known."""
        counted = np.ones(len(values)) if known is None else known.astype(np.float64)
        values = np.where(counted > 0, values, 0.0)
        sums, counts = values[self._resamples].sum(axis=1), counted[self._resamples].sum(axis=1)
        return Measure(float(values.sum() / counted.sum()), sums / np.maximum(counts, 1.0))

    def _bootstrap(self, statistic: Statistic, resamples: int = _STATISTIC_RESAMPLES) -> Measure:
        everyone = np.arange(len(self._probes))
        resampled = [statistic(users) for users in self._resamples[:resamples]]
        return Measure(statistic(everyone), np.asarray(resampled))


def _centred(measure: Measure) -> Measure:
    """Takes the bootstrap's bias away: resamples repeat users, so ranks come out too low in every one of them."""
    return Measure(measure.value, measure.resampled - measure.resampled.mean() + measure.value)


def _without_class(values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Takes the mean of each class out of values; unlabelled users are a class of their own."""
    return np.asarray(values - pd.DataFrame(values).groupby(labels).transform("mean"))


def _top_of_each(
    users: NDArray[np.int64], scores: NDArray[Any], clicks: NDArray[np.bool_], n_users: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Returns click rate and NDCG of each user's ten best rows (NDCG -1 without a click), and who has ten rows."""
    order = np.lexsort((-scores, users))
    owner, hit = users[order], clicks[order].astype(np.float64)
    rank = np.arange(len(owner)) - np.searchsorted(owner, np.arange(n_users))[owner]
    top = rank < _TOP
    rate = np.bincount(owner[top], hit[top], n_users) / _TOP
    gain = np.bincount(owner[top], (hit / np.log2(rank + 2.0))[top], n_users)
    positives = np.bincount(owner, hit, n_users).astype(np.int64)
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(_TOP) + 2.0))])
    best = ideal[np.minimum(positives, _TOP)]
    ndcg = np.where(positives > 0, gain / np.maximum(best, 1e-12), -1.0)
    return rate, ndcg, np.bincount(owner, minlength=n_users) >= _TOP
