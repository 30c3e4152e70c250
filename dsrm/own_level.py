"""The own level of a belief: what each current user likes beyond what was predicted, inferred from the session.

The log-odds of a click of user ``u`` on item ``i`` are ``base_ui + b_u + w_u . e_i + delta_ui`` with Gaussian priors on
``b_u``, every component of ``w_u`` and every ``delta_ui``. The posterior is Laplace's: its mode by Newton's method with
step control, its spread from the curvature there. Offsets are eliminated item by item in closed form, so that the
matrix to invert has ``d + 1`` rows whatever the number of shown items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dsrm.item_sites import click_probabilities, linear_weights, matched_sites, posterior_offsets
from kuaifair_env.checks import need_number

_FIRST_WIDTH = 32
_OF_ITEMS = ("_items", "_rows", "_shows", "_clicks", "_linear", "_offsets", "_curvatures")
_OF_SESSIONS = ("_slots", "_counts", "_means", "_inverses", "_ages", "_log_odds")
_WARM_STEPS, _MAX_STEPS = 8, 100
_CLOSE = 0.01
"""Log-odds that warm steps may leave between a posterior and its mode."""
_CONTRACTION = torch.tensor(0.1)
_MAX_HALVINGS = 12
_SURE_GAIN = 1.0
"""Squared Newton decrement of the objective, scaled to be self-concordant, up to which a whole step gets closer to the
mode, so that it is not checked: 1.8 with the curvature of now (Boyd and Vandenberghe, Convex Optimization, 9.6)."""
_STALE_GAIN = 0.25
"""Squared Newton decrement, scaled alike, from which a session's curvature is computed anew after a warm step: with the
curvature before it, a session whose answers surprise may stay far from its mode."""
_TINY = 1e-12
_CHANGED_ITEMS = 12
"""Items whose curvature is brought up to date at each warm step."""
_REBUILD_AFTER = 16
"""Warm steps after which a session's inverse is computed anew, so that neither age nor rounding adds up."""
STEADY = 3.0
"""Standard deviation of the offsets of steady users: most items they either click or skip nine times out of ten."""


@dataclass(frozen=True)
class OwnScales:
    """Prior standard deviations of a user's own part, in log-odds.

    Attributes:
        intercept: Of ``b_u``, by which a user clicks more than predicted whatever is shown.
        taste: Of each component of ``w_u``, the user's vector over unit item embeddings.
        offset: Of ``delta_ui``, the liking of one item that embeddings do not explain.
        steady: Of ``delta_ui`` instead while a session's repeated answers make it likely that the user answers the same
            item nearly always alike (:data:`STEADY`); there are no such users where it is not above ``offset``.
        steady_share: Share of such users before any answer, in (0, 1).
    """

    intercept: float = 0.5
    taste: float = 1.0
    offset: float = 0.7
    steady: float = 0.0
    steady_share: float = 0.25

    def __post_init__(self) -> None:
        need_number("[0, inf)", intercept=self.intercept, taste=self.taste, offset=self.offset, steady=self.steady)
        need_number("(0, 1)", steady_share=self.steady_share)


class OwnMoments(NamedTuple):
    """What sessions say about the scales of their priors, for the fixed point of the marginal likelihood.

    What is said of offsets is of users who are not taken as steady.

    The fixed point is a variance of ``squares / determined`` (MacKay, "Bayesian interpolation", Neural Computation
    4(3), 1992).

    Attributes:
        squares: ``float64 (3,)``, squared posterior means of intercept, taste and offsets, summed over parameters and
            sessions.
        determined: ``float64 (3,)``, 1 - posterior variance / prior variance, summed alike: how many parameters the
            evidence determines.
        steady: Expected number of steady users.
        sessions: Number of sessions.
    """

    squares: Tensor
    determined: Tensor
    steady: float
    sessions: int

    def users(self) -> Tensor:
        """Returns ``float64 (2,)``, how many users are taken as steady, and of how many."""
        return torch.tensor([self.steady, self.sessions], dtype=torch.float64)


class ItemAnswers(NamedTuple):
    """What sessions answered to some items, each ``(B, n)``.

    Attributes:
        shows: How often each was shown.
        clicks: How often it was clicked.
        offsets: Posterior mode of ``delta_ui``.
    """

    shows: Tensor
    clicks: Tensor
    offsets: Tensor


class OwnLevel:
    """Posteriors of ``B`` sessions, batched and warm-started: a step costs little more than two gradients.

    Evidence is added by :meth:`observe`; :meth:`update` then moves the posteriors close to their modes and
    :meth:`converge` onto them. Both work at any session length.

    Args:
        features: ``(N, d + 1)``, a column of ones and unit item embeddings; its dtype is computed in.
        n_sessions: Number of sessions ``B``.
        scales: Of the priors, the same for all sessions.
        kept: Share of what answers count that is left after each later slate of their session, in (0, 1]: a forgetting
            factor for users who change (West and Harrison, Bayesian Forecasting and Dynamic Models, 6.3).

    Attributes:
        scales: Of the priors now.
    """

    _items: Tensor
    _rows: Tensor
    _shows: Tensor
    _clicks: Tensor
    _linear: Tensor
    _offsets: Tensor
    _curvatures: Tensor

    def __init__(self, features: Tensor, n_sessions: int, scales: OwnScales | None = None, kept: float = 1.0) -> None:
        need_number("(0, 1]", kept=kept)
        n_items, size = features.shape
        self._features, self._kept = features, kept
        self._slots = torch.full((n_sessions, n_items), -1, dtype=torch.int32)
        self._counts = torch.zeros(n_sessions, dtype=torch.int64)
        self._log_odds = features.new_zeros(n_sessions)
        self._set_scales(OwnScales() if scales is None else scales)
        self._means = features.new_zeros(n_sessions, size)
        self._inverses = torch.eye(size, dtype=features.dtype).repeat(n_sessions, 1, 1)
        self._ages = torch.zeros(n_sessions, dtype=torch.int64)
        self._allocate(_FIRST_WIDTH)

    def _allocate(self, width: int) -> None:
        """Makes room for ``width`` different items in each session; what there is stays."""
        n_sessions, size = self._means.shape
        for name in _OF_ITEMS:
            shape = (n_sessions, width, size) if name == "_rows" else (n_sessions, width)
            dtype = torch.int64 if name == "_items" else self._features.dtype
            larger = torch.zeros(shape, dtype=dtype)
            before = getattr(self, name, None)
            if before is not None:
                larger[:, : before.shape[1]] = before
            setattr(self, name, larger)

    def _set_scales(self, scales: OwnScales) -> None:
        self.scales = scales
        self._widths = torch.full_like(self._features[0], scales.taste)
        self._widths[0] = scales.intercept
        self._set_variances()

    def _set_variances(self) -> None:
        """Gives each session the prior variance of its offsets, ``(B, 1)``."""
        if self.scales.steady > self.scales.offset:
            self._steady = self._log_odds > math.log(1.0 / self.scales.steady_share - 1.0)
        else:
            self._steady = torch.zeros_like(self._log_odds, dtype=torch.bool)
        deviations = torch.full_like(self._log_odds, self.scales.offset)
        self._variances = deviations.masked_fill_(self._steady, self.scales.steady).square_()[:, None]

    def start(self, rows: Tensor) -> None:
        """Starts new sessions, without evidence, in the given rows, ``int64 (n,)``."""
        self._slots[rows] = -1
        self._counts[rows] = 0
        self._log_odds[rows] = 0.0
        self._set_variances()
        self._means[rows] = 0.0
        self._inverses[rows] = torch.eye(self._means.shape[1], dtype=self._means.dtype)
        self._ages[rows] = 0
        for name in _OF_ITEMS:
            getattr(self, name)[rows] = 0

    def rescale(self, scales: OwnScales) -> None:
        """Gives the priors of all sessions other scales; posteriors move with the next :meth:`update`."""
        before = self._widths
        self._set_scales(scales)
        self._means *= torch.where(self._widths > 0, before / self._widths.clamp(min=_TINY), 0.0)
        self._rebuild(torch.arange(len(self._counts)), max(int(self._counts.max()), 1))

    def observe(self, rows: Tensor, items: Tensor, clicks: Tensor, base: Tensor) -> None:
        """Adds answers to what is known; posteriors move with the next :meth:`update`.

        Args:
            rows: ``int64 (n,)``, sessions, each once.
            items: ``int64 (n, K)``, shown items, none twice in a row.
            clicks: ``(n, K)``, whether each was clicked.
            base: ``(B, N)``, log-odds of a click without the own part.
        """
        if self._kept < 1.0:
            self._forget(rows)
        places = rows[:, None]
        slots = self._slots[places, items].to(torch.int64)
        new = slots < 0
        slots = torch.where(new, self._counts[rows, None] + new.cumsum(1) - 1, slots)
        self._slots[places, items] = slots.to(torch.int32)
        self._counts[rows] += new.sum(1)
        width = self._items.shape[1]
        if self._counts.max() > width:
            self._allocate(max(2 * width, int(self._counts.max())))
        self._items[places, slots] = items
        self._rows[places, slots] = self._features[items]
        # A new item's prediction starts at the posterior before its answer.
        scaled = (self._widths * self._means[rows])[:, None, :]
        self._linear[places, slots] = (self._features[items] * scaled).sum(-1)
        if self.scales.steady > self.scales.offset and not new.all():
            self._compare(rows, slots, clicks, base[places, items])
        self._shows[places, slots] += 1
        self._clicks[places, slots] += clicks.to(self._clicks.dtype)

    def _forget(self, rows: Tensor) -> None:
        for counts in (self._shows, self._clicks):
            counts[rows] *= self._kept
        self._ages[rows] = _REBUILD_AFTER  # all curvatures change, not a few

    def _compare(self, rows: Tensor, slots: Tensor, clicks: Tensor, base: Tensor) -> None:
        """Asks of each repeated answer whether a steady user would sooner have given it.

        The odds are a product of ratios of predictions made before their answers. While answers are as the usual prior
        predicts, they are a martingale that starts at 1: one user in three at most ever sees odds of 3, however long
        sessions are, and most of these for a few slates (Ville's inequality; Grünwald, de Heide and Koolen, "Safe
        testing", JRSS B 86(5), 2024).

        Args:
            rows: ``int64 (n,)``.
            slots: ``int64 (n, K)``.
            clicks: ``(n, K)``, the answers.
            base: ``(n, K)``, log-odds of a click without the own part.
        """
        places = rows[:, None]
        shows, clicked = self._shows[places, slots], self._clicks[places, slots]
        again = shows > 0
        logits = (base + self._linear[places, slots])[again]
        before, answers = (shows[again], clicked[again]), clicks[again]
        usual, steady = click_probabilities(logits, *before, (self.scales.offset, self.scales.steady))
        ratios = torch.where(answers, steady / usual, (1.0 - steady) / (1.0 - usual)).log_()
        self._log_odds[rows] += torch.zeros_like(base).masked_scatter_(again, ratios).sum(1)
        known = self._steady
        self._set_variances()
        self._ages[self._steady != known] = _REBUILD_AFTER  # all weights change, not a few

    def update(self, base: Tensor) -> None:
        """Moves all posteriors towards their modes by a few warm-started steps.

        Args:
            base: ``(B, N)``, log-odds of a click without the own part.
        """
        self._climb(base, _WARM_STEPS, exact=False)

    def converge(self, base: Tensor) -> None:
        """Moves all posteriors onto their modes, and computes their spread anew; see :meth:`update`."""
        self._climb(base, _MAX_STEPS, exact=True)

    def match_moments(self, base: Tensor, sweeps: int = 4) -> None:
        """Moves converged posteriors from their modes to their means, by expectation propagation.

        Mode and mean differ where priors are wide: by up to .1 at a scale of 1 and .8 at 3, in log-odds. Afterwards
        :meth:`logits` and :meth:`variances` are those of the approximating Gaussian; the next :meth:`update` returns
        to modes.

        Args:
            base: As :meth:`converge` was given.
            sweeps: Times that all items are matched.
        """
        width = max(int(self._counts.max()), 1)
        shows, clicks, features = self._shows[:, :width], self._clicks[:, :width], self._rows[:, :width]
        prior = base.gather(1, self._items[:, :width])
        shown = shows > 0
        precisions, own = self._curvatures[:, :width].clone(), self._linear[:, :width] + self._offsets[:, :width]
        shifts = precisions * own + clicks - shows * torch.sigmoid(prior + own)
        scaled = features * self._widths
        for sweep in range(sweeps + 1):
            self._curvatures[:, :width] = precisions
            self._rebuild(torch.arange(len(shows)), width)
            remaining = 1.0 / (1.0 + self._variances * precisions)
            self._means = (((shifts * remaining)[:, None, :] @ scaled) @ self._inverses)[:, 0]
            linear = self._predicted(features, self._means)
            offsets = self._variances * remaining * (shifts - precisions * linear)
            if sweep == sweeps:
                break
            spread = remaining**2 * ((scaled @ self._inverses) * scaled).sum(-1) + self._variances * remaining
            spread = torch.where(shown & (spread > _TINY), spread, 1.0)
            matched = matched_sites(prior, shows, clicks, linear + offsets, spread, precisions, shifts)
            precisions, shifts = (torch.where(shown, site, 0.0) for site in matched)
        self._linear[:, :width], self._offsets[:, :width] = linear, offsets

    def logits(self) -> Tensor:
        """Returns ``(B, N)``, the posterior mode of ``b_u + w_u . e_i + delta_ui``."""
        own = (self._widths * self._means) @ self._features.T
        width = int(self._counts.max())
        return own.scatter_add_(1, self._items[:, :width], self._offsets[:, :width])

    @property
    def widths(self) -> Tensor:
        """``(d + 1,)``, standard deviations of the priors of ``b_u`` and ``w_u``."""
        return self._widths

    @property
    def means(self) -> Tensor:
        """``(B, d + 1)``, posterior modes of ``b_u`` and ``w_u``, in units of the prior's standard deviations."""
        return self._means

    @property
    def covariances(self) -> Tensor:
        """``(B, d + 1, d + 1)``, posterior covariances of ``b_u`` and ``w_u``, in the same units."""
        return self._inverses

    @property
    def features(self) -> Tensor:
        """``(N, d + 1)``, a column of ones and unit item embeddings."""
        return self._features

    def logits_at(self, preferences: Tensor) -> Tensor:
        """Returns ``(B, N)``, the posterior mode of ``b_u + w_u . e_i + delta_ui`` given ``b_u`` and ``w_u``.

        Args:
            preferences: ``(B, d + 1)``, ``b_u`` and ``w_u`` in log-odds.
        """
        return self.add_offsets(preferences @ self._features.T, self.offsets_at(preferences))

    def offsets_at(self, preferences: Tensor) -> Tensor:
        """Returns ``(B, width)``, the posterior modes of ``delta_ui`` of the shown items given ``b_u`` and ``w_u``."""
        width = max(int(self._counts.max()), 1)
        # An offset explains the share of an answer that the linear part leaves.
        gains = 1.0 - 1.0 / (1.0 + self._variances * self._curvatures[:, :width])
        linear = (preferences[:, None, :] @ self._rows[:, :width].mT)[:, 0]
        offsets = self._offsets[:, :width] - gains * (linear - self._linear[:, :width])
        return torch.where(self._shows[:, :width] > 0, offsets, 0.0)

    def add_offsets(self, logits: Tensor, offsets: Tensor) -> Tensor:
        """Adds what :meth:`offsets_at` returned to ``(B, N)`` in its place."""
        return logits.scatter_add_(1, self._items[:, : offsets.shape[1]], offsets)

    def answers(self, items: Tensor, offsets: Tensor) -> ItemAnswers:
        """Returns what the sessions answered to some items.

        Args:
            items: ``int64 (B, n)``.
            offsets: ``(B, width)``, what :meth:`offsets_at` returned.
        """
        slots = self._slots.gather(1, items).to(torch.int64)
        places, shown = slots.clamp(min=0), slots >= 0
        of_items = (self._shows, self._clicks, offsets)
        return ItemAnswers(*(torch.where(shown, values.gather(1, places), 0.0) for values in of_items))

    def totals(self) -> tuple[Tensor, Tensor]:
        """Returns how many items each session showed, and how many of these were clicked, both ``(B,)``."""
        return self._shows.sum(1), self._clicks.sum(1)

    def variances(self, items: Tensor) -> Tensor:
        """Returns posterior variances of ``b_u + w_u . e_i + delta_ui``.

        Args:
            items: ``int64 (B, n)``.

        Returns:
            ``(B, n)``.
        """
        scaled = self._features[items] * self._widths
        linear = ((scaled @ self._inverses) * scaled).sum(-1)
        slots = self._slots.gather(1, items).to(torch.int64)
        curvatures = self._curvatures.gather(1, slots.clamp(min=0))
        remaining = 1.0 / (1.0 + self._variances * torch.where(slots < 0, 0.0, curvatures))
        return remaining**2 * linear + self._variances * remaining

    def moments(self, rows: Tensor) -> OwnMoments:
        """Returns what the sessions in some rows say about the scales of their priors."""
        width = max(int(self._counts[rows].max()), 1)
        squares = (self._widths * self._means[rows]) ** 2
        determined = 1.0 - self._inverses[rows].diagonal(dim1=1, dim2=2)
        # The variance of an offset is what its own evidence leaves, and what the linear part adds to that.
        gains = 1.0 - 1.0 / (1.0 + self._variances[rows] * self._curvatures[rows, :width])
        features = self._rows[rows, :width]
        added = (features * gains[..., None] ** 2).mT @ features * self._inverses[rows]
        added = (added @ self._widths) @ self._widths / self._variances[rows, 0].clamp(min=_TINY)
        usual = ~self._steady[rows]
        offsets = ((self._offsets[rows] ** 2).sum(1), gains.sum(1) - added)
        sums = [
            [squares[:, 0].sum(), squares[:, 1:].sum(), offsets[0][usual].sum()],
            [determined[:, 0].sum(), determined[:, 1:].sum(), offsets[1][usual].sum()],
        ]
        of_scales = torch.tensor(sums, dtype=torch.float64)
        against = math.log(1.0 / self.scales.steady_share - 1.0)
        steady = float(torch.sigmoid(self._log_odds[rows].double() - against).sum())
        return OwnMoments(of_scales[0], of_scales[1], steady, len(rows))

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that is known of the current sessions, by name; :meth:`restore` takes it."""
        return {name.removeprefix("_"): getattr(self, name) for name in _OF_SESSIONS + _OF_ITEMS if name != "_rows"}

    def restore(self, tensors: Mapping[str, Tensor], scales: OwnScales) -> None:
        """Takes what :meth:`tensors` returned, and the scales then, for as many sessions over the same items."""
        self._set_scales(scales)
        for name in (*_OF_SESSIONS, *_OF_ITEMS):
            if name != "_rows":
                setattr(self, name, tensors[name.removeprefix("_")].clone())
        self._set_variances()
        self._rows = self._features[self._items] * (self._shows > 0)[..., None]

    def _climb(self, base: Tensor, max_steps: int, exact: bool) -> None:
        """Newton's method; ``exact`` computes all curvature anew at each step, otherwise where it matters."""
        width = max(int(self._counts.max()), 1)
        shows, clicks, features = self._shows[:, :width], self._clicks[:, :width], self._rows[:, :width]
        prior = base.gather(1, self._items[:, :width])
        linear = self._predicted(features, self._means) if exact else self._linear[:, :width]
        tolerance = torch.finfo(linear.dtype).eps
        last_step = tolerance**0.5 if exact else _CLOSE  # of offsets
        offsets = posterior_offsets(prior + linear, shows, clicks, self._variances, self._offsets[:, :width], last_step)
        last_gain = torch.full_like(self._widths[:1], _TINY)
        # Along any line the third derivative is at most the root of this times the second to the power of 3/2.
        extent = self._variances[:, 0] + self.scales.intercept**2 + self.scales.taste**2
        enough = tolerance if exact else _CLOSE**2 / (extent + _TINY)
        for step in range(max_steps):
            probability = torch.sigmoid(prior + linear + offsets)
            residuals = torch.addcmul(clicks, shows, probability, value=-1)
            gradient = (residuals[:, None, :] @ features)[:, 0] * self._widths - self._means
            if exact or step == 0:
                self._follow_curvature(_curvatures(shows, probability), exact)
            direction, gain = self._newton_step(gradient)
            if step and not exact:
                stale = torch.nonzero(gain * extent > _STALE_GAIN)[:, 0]
                if len(stale):
                    self._curvatures[stale, :width] = _curvatures(shows[stale], probability[stale])
                    self._rebuild(stale, width)
                    direction, gain = self._newton_step(gradient)
            # The next step would gain less than this one by about as much as this one does than the last.
            near = bool((gain * torch.minimum(gain / last_gain, _CONTRACTION) <= enough).all())
            last_gain = gain.clamp(min=_TINY)
            along = self._predicted(features, direction)
            far = torch.nonzero(gain * extent > _SURE_GAIN)[:, 0]
            if len(far):
                lengths = self._step_lengths(far, prior + linear, offsets, along, direction)
                direction[far] *= lengths
                along[far] *= lengths
            linear, self._means = linear + along, self._means + direction
            offsets = posterior_offsets(prior + linear, shows, clicks, self._variances, offsets, last_step)
            if near:  # what the last step left is far smaller than the step
                break
        self._linear[:, :width], self._offsets[:, :width] = linear, offsets
        if exact:
            probability = torch.sigmoid(prior + linear + offsets)
            self._follow_curvature(_curvatures(shows, probability), exact)

    def _newton_step(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the step ``(B, d + 1)`` with the curvature that is known, and its squared Newton decrement."""
        direction = (gradient[:, None, :] @ self._inverses)[:, 0]
        return direction, (gradient * direction).sum(1)

    def _step_lengths(self, far: Tensor, logits: Tensor, offsets: Tensor, along: Tensor, direction: Tensor) -> Tensor:
        """Returns ``(n, 1)``, by how much of a step sessions that are far from their mode get closer to it.

        Args:
            far: ``int64 (n,)``, their rows.
            logits: ``(B, width)``, log-odds without the offsets, before the step.
            offsets: ``(B, width)``, before the step.
            along: ``(B, width)``, what a whole step adds to ``logits``.
            direction: ``(B, d + 1)``, a whole step.
        """
        width = logits.shape[1]
        shows, clicks, variances = self._shows[far, :width], self._clicks[far, :width], self._variances[far]
        logits, offsets, along = logits[far], offsets[far], along[far]
        means, direction = self._means[far], direction[far]
        value = _objective(logits, shows, clicks, offsets, means, variances)
        lowest = value - 4 * torch.finfo(value.dtype).eps * (1.0 + value.abs())
        length = torch.ones_like(value)[:, None]
        for _ in range(_MAX_HALVINGS):
            moved = torch.addcmul(logits, length, along)
            offsets = posterior_offsets(moved, shows, clicks, variances, offsets)
            reached = _objective(moved, shows, clicks, offsets, torch.addcmul(means, length, direction), variances)
            worse = reached < lowest
            if not worse.any():
                return length
            length = torch.where(worse[:, None], length / 2, length)
        return torch.where(worse[:, None], 0.0, length)  # within rounding of the mode

    def _predicted(self, features: Tensor, means: Tensor) -> Tensor:
        """Returns ``(B, width)``, the linear part of standardised ``means`` for the shown items."""
        # A product with rows in front is twice as fast as one with columns behind.
        return ((self._widths * means)[:, None, :] @ features.mT)[:, 0]

    def _follow_curvature(self, curvatures: Tensor, exact: bool) -> None:
        """Brings the inverses up to date with curvatures ``n p (1 - p)`` of the shown items, ``(B, width)``."""
        width = curvatures.shape[1]
        known = self._curvatures[:, :width]
        if exact:
            known.copy_(curvatures)
            self._rebuild(torch.arange(len(known)), width)
            return
        self._ages += 1
        old = torch.nonzero(self._ages > _REBUILD_AFTER)[:, 0]
        known[old] = curvatures[old]
        change = linear_weights(curvatures, self._variances) - linear_weights(known, self._variances)
        places = change.abs().topk(min(_CHANGED_ITEMS, width), dim=1).indices
        known.scatter_(1, places, curvatures.gather(1, places))
        change = change.gather(1, places)[..., None]
        scaled = self._rows[torch.arange(len(known))[:, None], places] * self._widths
        # Woodbury's identity for A + U' diag(c) U, in a form that allows c of either sign, and 0.
        solved = scaled @ self._inverses
        inner = torch.eye(places.shape[1], dtype=change.dtype) + change * (solved @ scaled.mT)
        self._inverses.baddbmm_(solved.mT, torch.linalg.solve(inner, change * solved), alpha=-1)
        if len(old):
            self._rebuild(old, width)

    def _rebuild(self, rows: Tensor, width: int) -> None:
        scaled = self._rows[rows, :width] * self._widths
        weights = linear_weights(self._curvatures[rows, :width], self._variances[rows])
        precision = (scaled * weights[..., None]).mT @ scaled
        precision += torch.eye(precision.shape[1], dtype=precision.dtype)
        self._inverses[rows] = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        self._ages[rows] = 0


def _curvatures(shows: Tensor, probability: Tensor) -> Tensor:
    """Returns ``n p (1 - p)``."""
    return shows * torch.addcmul(probability, probability, probability, value=-1)


def _objective(
    logits: Tensor, shows: Tensor, clicks: Tensor, offsets: Tensor, means: Tensor, variances: Tensor
) -> Tensor:
    """Returns ``(B,)``, the log posterior up to a constant, given log-odds without the offsets."""
    logits = logits + offsets
    fit = clicks * logits - shows * softplus(logits) - offsets**2 / (2 * variances.clamp(min=_TINY))
    return fit.sum(1) - (means**2).sum(1) / 2
