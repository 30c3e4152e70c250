"""The training loop: what it keeps, when it stops, and going on from a checkpoint."""

from __future__ import annotations

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from kuaifair_env.response.training import Trainer, batch_size_for, fit_epochs, shuffled_batches


class Point(nn.Module):
    """One weight vector; the loss is half its squared distance to a target, so that descent has a closed form."""

    def __init__(self, *start):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def to_zero(network, _batch):
    return 0.5 * network.at.square().sum()


def trainer(start=(1.0,), lr=0.5, optimizer=torch.optim.SGD, **settings):
    network = Point(*start)
    return Trainer(network, optimizer(network.parameters(), lr=lr), **settings)


def test_the_weights_of_the_lowest_validation_loss_are_kept():
    # The weight halves each round: 1/2, 1/4, 1/8, 1/16, 1/32. The validation loss is lowest at 1/8.
    run = trainer()
    best = run.fit(lambda _: [None], to_zero, lambda network: abs(network.at.item() - 0.125), rounds=9, patience=2)
    assert best.at.item() == 0.125
    assert (run.best_round, run.rounds, run.steps) == (3, 5, 5)
    assert run.losses[:3] == [0.5, 0.125, 0.03125]
    assert not best.training
    json.dumps(run.report(), allow_nan=False)


def test_initial_weights_compete_where_they_are_validated():
    run = trainer(optimizer=partial(torch.optim.SGD, maximize=True))
    run.validate(lambda network: network.at.item())
    assert run.fit(lambda _: [None], to_zero, lambda n: n.at.item(), rounds=5, patience=2).at.item() == 1
    assert (run.best_round, run.rounds) == (0, 2)


def test_without_validation_the_last_weights_are_kept():
    assert trainer().fit(lambda _: [None, None], to_zero, rounds=2).at.item() == 0.0625


def test_a_small_gain_is_no_gain():
    run = trainer(min_improvement=0.24)
    run.fit(lambda _: [None], to_zero, lambda network: network.at.item(), rounds=9, patience=3)
    # 1/2, then 1/4 falls by 0.25, and all that follows lies less than 0.24 below.
    assert run.best_round == 2
    assert run.rounds == 5


@pytest.mark.parametrize("start", [0, 1])
def test_the_average_is_the_recursion_of_the_weights(start):
    run = trainer(ema_decay=0.3, ema_start=start)
    average = weight = 1.0
    for step in range(1, 7):
        weight /= 2
        decay = min(0.3, (start + step) / (start + step + 9))
        average = decay * average + (1 - decay) * weight
    assert run.fit(lambda _: [None], to_zero, rounds=6).at.item() == pytest.approx(average, rel=1e-6)
    assert run.network.at.item() == weight


def test_gradients_are_clipped_and_rates_scheduled():
    run = trainer((30.0, 40.0), lr=1.0, max_grad_norm=5.0, schedule=lambda step: 1.0 / (1 + step))
    run.fit(lambda _: [None, None], to_zero, rounds=1)
    np.testing.assert_allclose(run.network.at.detach(), [30 - 3 - 1.5, 40 - 4 - 2], rtol=1e-5)


def test_diverging_is_an_error():
    with pytest.raises(FloatingPointError, match=r"validation loss is nan in round 1; lower the learning rate"):
        trainer().fit(lambda _: [None], to_zero, lambda _: float("nan"), rounds=3)
    with pytest.raises(FloatingPointError, match="training loss is inf"):
        trainer().fit(lambda _: [None], lambda network, _: network.at.sum() / 0, rounds=3)


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    network = nn.Linear(3, 1)

    def new():
        copied = copy.deepcopy(network)
        return Trainer(copied, torch.optim.Adam(copied.parameters(), 0.1), ema_decay=0.9, schedule=lambda n: 0.98**n)

    def fit(run, rounds, callback=None):
        def batches(number):
            return shuffled_batches(64, 16, torch.Generator().manual_seed(number))

        def loss(net, rows):
            return (net(x[rows])[:, 0] - y[rows]).square().mean()

        return run.fit(batches, loss, lambda net: float(loss(net, slice(None))), rounds=rounds, callback=callback)

    kept = []
    whole = fit(new(), 6, lambda run: kept.append((run.tensors(), copy.deepcopy(run.progress()))))
    resumed = new()
    resumed.restore(kept[2][0], json.loads(json.dumps(kept[2][1], allow_nan=False)))
    again = fit(resumed, 6)
    assert len(kept) == 6
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.progress() == kept[-1][1]


def test_batches_are_a_permutation():
    batches = list(shuffled_batches(10, 4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(torch.cat(batches).tolist()) == list(range(10))


def test_least_squares_is_solved_by_epochs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = x @ torch.tensor([1.0, -2.0])
    network = nn.Linear(2, 1)

    def loss(net, rows):
        return (net(x[rows])[:, 0] - y[rows]).square().mean()

    best, report = fit_epochs(
        network,
        torch.optim.Adam(network.parameters(), 0.05),
        150,
        loss,
        lambda net: float(loss(net, slice(150, 200))),
        batch_size=25,
        max_epochs=200,
        patience=10,
        generator=generator,
    )
    np.testing.assert_allclose(best.weight.detach()[0], [1, -2], atol=0.02)
    assert report["rounds"] == len(report["validation_losses"]) <= 200


def test_batches_make_enough_steps_within_their_bounds():
    assert batch_size_for(1_000_000, 4096) == 4096
    assert batch_size_for(10_000, 4096) == 200
    assert batch_size_for(100, 4096) == 64
    assert batch_size_for(100, 32) == 32
