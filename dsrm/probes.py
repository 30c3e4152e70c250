"""Probes: whether purified states hold more interest and less popularity, and are of more use (see also the controls).

Low popularity decodability alone proves nothing, a constant state has it; interest must rise while popularity falls.
Every probe is cross-validated over users, with bootstrap intervals over users; all states are evaluated on the same
users and the same resamples, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrm.probe_data import ProbeSet
from dsrm.purifier import StatePurifier
from dsrm.windows import unit_rows
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.world import World

RAW = "raw"

_FOLDS = 5
_NEIGHBOURS = 15
_RESAMPLES = 500
_DECILES = 10
_TOP = 10
_MAX_FOR_SILHOUETTE = 2_000

Statistic = Callable[[NDArray[np.int64]], float]


@dataclass(frozen=True)
class Measure:
    """A figure with its bootstrap interval.

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
    """The measures of several purifiers on one probe set.

    Attributes:
        kind: Kind of windows.
        users: How many.
        classes: Number of interests, and the accuracy of always guessing the most frequent.
        measures: Purifier -> measure name -> figure.
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
                name: {
                    key: measure.as_dict() | {"gain": measure.gain_over(raw[key]).as_dict()}
                    for key, measure in found.items()
                }
                for name, found in self.measures.items()
            },
        }


def purified_states(
    probes: ProbeSet, world: World, purifiers: Mapping[str, StatePurifier]
) -> dict[str, FloatArray]:
    """Returns the states to compare, the observed ones first, ``float32 (n, d)`` each.

    Components beyond ``d``, which some purifiers append, are left out.
    """
    states = {RAW: probes.states}
    for name, purifier in purifiers.items():
        purifier.bind(world)
        states[name] = purifier.purify(probes.states, probes.window)[:, : world.dimension]
    return states


def probe(probes: ProbeSet, states: Mapping[str, FloatArray], seed: int = 0) -> ProbeReport:
    """Measures every state.

    Measures (``+`` higher is better, ``-`` lower is better): ``interest`` + accuracy and ``interest_f1`` + macro F1 of
    a logistic probe; ``popularity_r2`` - and ``popularity_knn_r2`` - of the window's mean log-popularity, ``level_r2``
    - of the user's long-run level, ``popularity_r2_given_interest`` - after interest is taken out of both sides;
    ``interest_purity`` + and ``popularity_purity`` - among 15 neighbours, ``interest_silhouette`` +,
    ``popularity_silhouette`` -; ``effective_rank``, ``participation``; ``auc`` + within users of cos(z, e_i) on
    unbiased feedback, ``top_click_rate`` + and ``ndcg`` + of the ten best of the items with known feedback; in twins
    ``recovery_cosine`` +, ``recovery_mse`` - to the clean state and ``taste_r2`` + of the true taste; ``raw_cosine``
    and ``raw_r2`` to the observed state (both 1 for the identity).

    Args:
        probes: Windows and labels.
        states: ``float32 (n, d)`` by name; ``"raw"`` must be among them.
        seed: Seed of folds and resamples.
    """
    if RAW not in states:
        raise ValueError(f"the observed states must be given as {RAW!r}")
    rng = np.random.default_rng(seed)
    resamples = rng.integers(len(probes), size=(_RESAMPLES, len(probes)))
    folds = rng.permutation(len(probes)) % _FOLDS
    evaluate = _ProbeEvaluation(probes, resamples, folds)
    labels = probes.interest[probes.interest >= 0]
    majority = float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0
    return ProbeReport(
        probes.kind,
        len(probes),
        (len(np.unique(labels)), majority),
        {name: evaluate.measures(vectors) for name, vectors in states.items()},
    )


class _ProbeEvaluation:
    """Applies all probes to one state after another, on the same folds and resamples."""

    def __init__(self, probes: ProbeSet, resamples: NDArray[np.int64], folds: NDArray[np.int64]) -> None:
        self._probes = probes
        self._resamples = resamples
        self._folds = folds
        edges = np.quantile(probes.popularity, np.linspace(0, 1, _DECILES + 1)[1:-1])
        self._decile = np.searchsorted(edges, probes.popularity)

    def measures(self, states: FloatArray) -> dict[str, Measure]:
        found: dict[str, Measure] = {}
        found |= self._interest(states)
        found |= self._popularity(states)
        found |= self._neighbours(states)
        found |= self._geometry(states)
        found |= self._utility(states)
        if self._probes.clean is not None:
            found |= self._recovery(states)
        found |= self._identity(states)
        return found

    def _interest(self, states: FloatArray) -> dict[str, Measure]:
        from sklearn.linear_model import LogisticRegression

        labels = self._probes.interest
        rows = np.flatnonzero(labels >= 0)
        if len(np.unique(labels[rows])) < 2:
            return {}
        scaled = _standardised(states)
        guessed = np.full(len(labels), -2)
        for fold in range(_FOLDS):
            inside, outside = rows[self._folds[rows] != fold], rows[self._folds[rows] == fold]
            model = LogisticRegression(C=0.1, max_iter=200).fit(scaled[inside], labels[inside])
            guessed[outside] = model.predict(scaled[outside])
        known = labels >= 0
        right = guessed == labels

        def accuracy(chosen: NDArray[np.int64]) -> float:
            kept = chosen[known[chosen]]
            return float(right[kept].mean())

        def macro_f1(chosen: NDArray[np.int64]) -> float:
            kept = chosen[known[chosen]]
            return _macro_f1(labels[kept], guessed[kept])

        return {"interest": self._measure(accuracy), "interest_f1": self._measure(macro_f1)}

    def _popularity(self, states: FloatArray) -> dict[str, Measure]:
        from sklearn.neighbors import KNeighborsRegressor

        probes, scaled = self._probes, _standardised(states)
        found = {
            "popularity_r2": self._explained(
                probes.popularity, _ridge(scaled, probes.popularity, self._folds)
            ),
            "level_r2": self._explained(probes.level, _ridge(scaled, probes.level, self._folds)),
        }
        near = np.empty(len(probes))
        for fold in range(_FOLDS):
            inside = self._folds != fold
            model = KNeighborsRegressor(_NEIGHBOURS).fit(scaled[inside], probes.popularity[inside])
            near[~inside] = model.predict(scaled[~inside])
        found["popularity_knn_r2"] = self._explained(probes.popularity, near)
        if (probes.interest >= 0).any():
            wanted = _without_class(probes.popularity[:, None], probes.interest)[:, 0]
            rest = _without_class(scaled, probes.interest)
            found["popularity_r2_given_interest"] = self._explained(wanted, _ridge(rest, wanted, self._folds))
        return found

    def _neighbours(self, states: FloatArray) -> dict[str, Measure]:
        from sklearn.metrics import silhouette_samples
        from sklearn.neighbors import NearestNeighbors

        scaled = _standardised(states)
        near = NearestNeighbors(n_neighbors=_NEIGHBOURS + 1).fit(scaled).kneighbors(return_distance=False)
        near = near[:, :_NEIGHBOURS]
        found = {}
        for name, labels in (("interest", self._probes.interest), ("popularity", self._decile)):
            rows = np.flatnonzero(labels >= 0)
            if len(np.unique(labels[rows])) < 2:
                continue
            same = (labels[near] == labels[:, None]).mean(axis=1)
            found[f"{name}_purity"] = self._mean_of(same, labels >= 0)
            some = rows[:_MAX_FOR_SILHOUETTE]
            values = np.zeros(len(labels))
            values[some] = silhouette_samples(scaled[some], labels[some])
            known = np.zeros(len(labels), np.bool_)
            known[some] = True
            found[f"{name}_silhouette"] = self._mean_of(values, known)
        return found

    def _geometry(self, states: FloatArray) -> dict[str, Measure]:
        def spectrum(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
            values = np.linalg.eigvalsh(np.cov(states[chosen].astype(np.float64), rowvar=False))
            return np.asarray(np.maximum(values, 1e-12))

        def effective_rank(chosen: NDArray[np.int64]) -> float:
            share = np.sqrt(spectrum(chosen))
            share /= share.sum()
            return float(np.exp(-(share * np.log(share)).sum()))

        def participation(chosen: NDArray[np.int64]) -> float:
            values = spectrum(chosen)
            return float(values.sum() ** 2 / (values**2).sum())

        return {
            "effective_rank": _centred(self._measure(effective_rank, 50)),
            "participation": _centred(self._measure(participation, 50)),
        }

    def _utility(self, states: FloatArray) -> dict[str, Measure]:
        from kuaifair_env.response.calibration import within_user_auc

        probes = self._probes
        place = np.searchsorted(probes.users, probes.log.users)
        scores = np.einsum("nd,nd->n", unit_rows(states)[place], probes.embeddings[probes.log.items])
        auc = within_user_auc(place, probes.log.clicks, scores)
        weight, value = np.zeros(len(probes)), np.zeros(len(probes))
        weight[auc.users], value[auc.users] = auc.weights, auc.values
        rate, gain, evaluated = _top_of_each(place, scores, probes.log.clicks, len(probes))

        def ranked(chosen: NDArray[np.int64]) -> float:
            return float(np.average(value[chosen], weights=weight[chosen]))

        return {
            "auc": self._measure(ranked),
            "top_click_rate": self._mean_of(rate, evaluated),
            "ndcg": self._mean_of(gain, evaluated & (gain >= 0)),
        }

    def _recovery(self, states: FloatArray) -> dict[str, Measure]:
        probes = self._probes
        assert probes.clean is not None and probes.taste is not None
        centred, wanted = states - states.mean(axis=0), probes.clean - probes.clean.mean(axis=0)
        cosines = np.einsum("nd,nd->n", unit_rows(centred), unit_rows(wanted))
        # States and clean states differ in scale, which no probe depends on; the error is after the best common scale.
        scale = float((centred * wanted).sum() / max((centred**2).sum(), 1e-12))
        errors = ((scale * centred - wanted) ** 2).mean(axis=1) / float((wanted**2).mean())
        everyone = np.ones(len(probes), np.bool_)
        guessed = np.column_stack(
            [_ridge(_standardised(states), column, self._folds) for column in probes.taste.T]
        )
        truth = probes.taste.astype(np.float64)

        def explained(chosen: NDArray[np.int64]) -> float:
            residual = ((truth[chosen] - guessed[chosen]) ** 2).sum()
            return float(1.0 - residual / ((truth[chosen] - truth[chosen].mean(axis=0)) ** 2).sum())

        return {
            "recovery_cosine": self._mean_of(cosines, everyone),
            "recovery_mse": self._mean_of(errors, everyone),
            "taste_r2": self._measure(explained),
        }

    def _identity(self, states: FloatArray) -> dict[str, Measure]:
        raw = self._probes.states
        cosines = np.einsum("nd,nd->n", unit_rows(states), unit_rows(raw))
        scaled = _standardised(states)
        guessed = _ridge(scaled, raw.astype(np.float64), self._folds)
        residual = ((raw - guessed) ** 2).sum(axis=1)
        spread = ((raw - raw.mean(axis=0)) ** 2).sum(axis=1)

        def explained(chosen: NDArray[np.int64]) -> float:
            return float(1.0 - residual[chosen].sum() / spread[chosen].sum())

        everyone = np.ones(len(raw), np.bool_)
        return {"raw_cosine": self._mean_of(cosines, everyone), "raw_r2": self._measure(explained)}

    def _explained(self, wanted: NDArray[np.float64], guessed: NDArray[np.float64]) -> Measure:
        def r2(chosen: NDArray[np.int64]) -> float:
            y, found = wanted[chosen], guessed[chosen]
            return float(1.0 - ((y - found) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-12))

        return self._measure(r2)

    def _mean_of(self, values: NDArray[Any], known: NDArray[np.bool_]) -> Measure:
        total, count = np.where(known, values, 0.0), known.astype(np.float64)
        sums, counts = total[self._resamples].sum(axis=1), count[self._resamples].sum(axis=1)
        return Measure(float(total.sum() / count.sum()), sums / np.maximum(counts, 1.0))

    def _measure(self, statistic: Statistic, resamples: int = 200) -> Measure:
        everyone = np.arange(len(self._probes))
        return Measure(
            statistic(everyone),
            np.asarray([statistic(chosen) for chosen in self._resamples[:resamples]]),
        )


def _centred(measure: Measure) -> Measure:
    """Takes the bootstrap's bias away: resamples repeat users, so ranks come out too low in every one of them."""
    return Measure(measure.value, measure.resampled - measure.resampled.mean() + measure.value)


def _standardised(states: FloatArray) -> NDArray[np.float64]:
    wide = states.astype(np.float64)
    return np.asarray((wide - wide.mean(axis=0)) / np.maximum(wide.std(axis=0), 1e-6))


def _ridge(
    features: NDArray[np.float64], wanted: NDArray[Any], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Returns cross-validated ridge predictions; each fold is predicted by the others."""
    guessed = np.empty(wanted.shape)
    for fold in range(_FOLDS):
        inside = folds != fold
        x, y = features[inside], wanted[inside]
        gram = x.T @ x + len(x) * 1e-2 * np.eye(x.shape[1])
        slope = np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)))
        guessed[~inside] = y.mean(axis=0) + features[~inside] @ slope
    return guessed


def _without_class(values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Takes the mean of each class out of values; unlabelled users are a class of their own."""
    _, group = np.unique(labels, return_inverse=True)
    sums = np.zeros((group.max() + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return np.asarray(values - (sums / np.bincount(group)[:, None])[group])


def _macro_f1(labels: NDArray[np.int64], guessed: NDArray[np.int64]) -> float:
    classes = np.unique(labels)
    scores = []
    for one in classes:
        hit = ((labels == one) & (guessed == one)).sum()
        scores.append(2.0 * hit / max((labels == one).sum() + (guessed == one).sum(), 1))
    return float(np.mean(scores))


def _top_of_each(
    users: NDArray[np.int64], scores: NDArray[Any], clicks: NDArray[np.bool_], n_users: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Returns click rate and NDCG of each user's ten best rows (NDCG -1 without a click), and who has ten rows."""
    order = np.lexsort((-scores, users))
    owner, hit = users[order], clicks[order].astype(np.float64)
    starts = np.searchsorted(owner, np.arange(n_users))
    rank = np.arange(len(owner)) - starts[owner]
    top = rank < _TOP
    discount = 1.0 / np.log2(rank + 2.0)
    rows = np.bincount(owner, minlength=n_users)
    rate = np.bincount(owner[top], hit[top], n_users) / _TOP
    gain = np.bincount(owner[top], (hit * discount)[top], n_users)
    positives = np.bincount(owner, hit, n_users).astype(np.int64)
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(_TOP) + 2.0))])
    best = ideal[np.minimum(positives, _TOP)]
    return rate, np.where(positives > 0, gain / np.maximum(best, 1e-12), -1.0), rows >= _TOP


_ROWS = {
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


def report_table(report: ProbeReport) -> str:
    """Returns all measures, one column for each state; ``*`` marks a difference from raw whose interval excludes 0.

    Args:
        report: See :func:`dsrm.probes.probe`.
    """
    names = list(report.measures)
    rows = [["", *names]]
    for key, title in _ROWS.items():
        if key in report.measures[RAW]:
            raw = report.measures[RAW][key]
            rows.append([title, *(_cell(report.measures[name][key], raw) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    classes, majority = report.classes
    return "\n".join(
        [
            lines[0],
            "-" * len(lines[0]),
            *lines[1:],
            "",
            f"{report.users} held-out users, {report.kind} windows; [95 % bootstrap over users]; * differs from raw.",
            f"{classes} interests; always guessing the most frequent gives {majority:.3f}.",
        ]
    )


def _cell(measure: Measure, raw: Measure) -> str:
    low, high = measure.interval
    gain = measure.gain_over(raw)
    differs = gain.interval[0] > 0 or gain.interval[1] < 0
    return f"{measure.value:.3f} [{low:.3f}, {high:.3f}]{'*' if differs and measure is not raw else ' '}"
