"""Slates: probabilities are those of drawing items in turn, and the replay buffer keeps what was really shown."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import small_world
from hypothesis import given
from hypothesis import strategies as st
from purifiers import WindowPurifier
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from dsrm import VecDSRM
from hrl_policies.common.slates import (
    QuotaSlateDistribution,
    SlateDistribution,
    SlateReplayBuffer,
    executed_slates,
    slate_shape,
)
from hrl_policies.study.training import restore_checkpoint, save_checkpoint
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError
from kuaifair_env.ranking import top_k
from kuaifair_env.sb3 import KuaiFairVecEnv

N, K = 6, 3
SLATES = torch.tensor(list(permutations(range(N), K)))
POPULAR = torch.tensor([True, False, True, False, False, True])


def logits(seed: int = 0, rows: int = 1, items: int = N, spread: float = 1.5) -> torch.Tensor:
    return torch.randn(rows, items, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread


def naive(scores, slate, allowed=None):
    """Log-probability of each slot by the definition."""
    scores = np.asarray(scores, np.float64)
    left = set(range(len(scores)) if allowed is None else np.flatnonzero(allowed))
    found = []
    for item in slate:
        mass = scores[sorted(left)]
        found.append(scores[item] - (mass.max() + np.log(np.exp(mass - mass.max()).sum())))
        left.remove(item)
    return np.asarray(found)


def naive_with_quota(scores, slate, popular, count):
    groups = (np.asarray(popular), ~np.asarray(popular))
    parts = (slate[:count], slate[count:])
    return np.concatenate([naive(scores, part, group) for part, group in zip(parts, groups, strict=True)])


def quota_slates(count):
    popular = [i for i in range(N) if POPULAR[i]]
    tail = [i for i in range(N) if not POPULAR[i]]
    return torch.tensor(
        [[*head, *rest] for head in permutations(popular, count) for rest in permutations(tail, K - count)]
    )


def quota(scores, count):
    rows = len(scores)
    return QuotaSlateDistribution(scores, POPULAR.expand(rows, -1), torch.full((rows,), count), K)


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.5, 20.0]))
def test_the_probabilities_of_all_ordered_slates_add_up_to_one(seed, spread):
    distribution = SlateDistribution(logits(seed, spread=spread).expand(len(SLATES), -1), K)
    assert distribution.log_prob(SLATES).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("count", range(K + 1))
def test_the_probabilities_of_all_slates_with_a_quota_add_up_to_one(count):
    slates = quota_slates(count)
    distribution = quota(logits(count).expand(len(slates), -1), count)
    assert distribution.log_prob(slates).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def frequencies_match(samples, slates, chances):
    """All cells within 5 standard errors, and a chi-square near its degrees of freedom."""
    code = N ** torch.arange(K)
    places = {int(value): place for place, value in enumerate(slates @ code)}
    counts = np.bincount([places[int(value)] for value in samples @ code], minlength=len(slates))
    expected = len(samples) * chances.numpy()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()
    freedom = len(slates) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_slates_are_drawn_as_often_as_their_probability_says():
    draws = 60_000
    scores = logits(3, spread=1.0).to(torch.float32)
    samples = SlateDistribution(scores.expand(draws, -1), K).sample(torch.Generator().manual_seed(1))
    chances = SlateDistribution(scores.expand(len(SLATES), -1), K).log_prob(SLATES).exp()
    frequencies_match(samples, SLATES, chances)


@pytest.mark.parametrize("count", range(K + 1))
def test_slates_with_a_quota_are_drawn_as_often_as_their_probability_says(count):
    draws, slates = 30_000, quota_slates(count)
    scores = logits(4, spread=1.0).to(torch.float32)
    samples = quota(scores.expand(draws, -1), count).sample(torch.Generator().manual_seed(2))
    assert (POPULAR[samples].sum(dim=1) == count).all()
    chances = quota(scores.expand(len(slates), -1), count).log_prob(slates).exp()
    frequencies_match(samples, slates, chances)


def test_each_slot_is_drawn_from_what_is_left():
    scores = logits(5, rows=8, items=12)
    distribution = SlateDistribution(scores, 5)
    slates = distribution.sample(torch.Generator().manual_seed(0))
    expected = [naive(row, slate) for row, slate in zip(scores.numpy(), slates.tolist(), strict=True)]
    np.testing.assert_allclose(distribution.slot_log_probs(slates), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(distribution.log_prob(slates), np.sum(expected, axis=1), rtol=0, atol=1e-12)


def test_each_slot_of_a_quota_is_drawn_from_what_is_left_of_its_group():
    scores, counts = logits(6, rows=4), torch.arange(K + 1)
    distribution = QuotaSlateDistribution(scores, POPULAR.expand(4, -1), counts, K)
    slates = distribution.sample(torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(POPULAR[slates].sum(dim=1), counts)
    expected = [
        naive_with_quota(row, slate, POPULAR.numpy(), count)
        for row, slate, count in zip(scores.numpy(), slates.tolist(), counts.tolist(), strict=True)
    ]
    np.testing.assert_allclose(distribution.slot_log_probs(slates), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(size, masked):
    """Also where the slate takes every item that there is."""
    mask = torch.tensor([True, True, False, True, True, True]) if masked else None
    size = min(size, N - masked)
    slates = SlateDistribution(logits(8, rows=4), size, mask).sample(torch.Generator().manual_seed(3))
    scores = logits(8, rows=4).requires_grad_()

    def both(values):
        distribution = SlateDistribution(values, size, mask)
        return distribution.slot_log_probs(slates), distribution.log_prob(slates), distribution.entropy()

    assert torch.autograd.gradcheck(both, (scores,), atol=1e-7)
    gradient = torch.autograd.grad(sum(part.sum() for part in both(scores)), scores)[0]
    assert torch.isfinite(gradient).all()
    assert not masked or (gradient[:, 2] == 0).all()
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("count", range(K + 1))
def test_gradients_with_a_quota_are_those_of_finite_differences(count):
    """Counts 0 and 3 take a whole group: the three popular items, or the three of the long tail."""
    scores = logits(9, rows=4).requires_grad_()
    slates = quota(scores.detach(), count).sample(torch.Generator().manual_seed(4))

    def both(values):
        distribution = quota(values, count)
        return distribution.slot_log_probs(slates), distribution.entropy()

    assert torch.autograd.gradcheck(both, (scores,), atol=1e-7)


def test_masked_items_never_appear_and_get_no_gradient():
    mask = torch.tensor([False, True, True, False, True, True])
    scores = torch.full((20_000, N), -3.0)
    scores[:, ~mask] = 40.0
    distribution = SlateDistribution(scores.requires_grad_(), 4, mask)
    slates = distribution.sample(torch.Generator().manual_seed(5))
    assert mask[slates].all() and mask[distribution.mode()].all()
    np.testing.assert_array_equal(np.sort(slates.numpy(), axis=1), [[1, 2, 4, 5]] * len(slates))
    distribution.log_prob(slates).sum().backward()
    assert (scores.grad[:, ~mask] == 0).all() and torch.isfinite(scores.grad).all()
    # All four that are allowed, equally likely in any order.
    np.testing.assert_allclose(distribution.log_prob(slates).detach(), -np.log(24), rtol=1e-5)
    np.testing.assert_allclose(distribution.entropy().detach(), np.log(4), rtol=1e-5)


@pytest.mark.parametrize("spread", ["wide", "one above all", "equal"])
def test_the_largest_catalogue_is_safe_in_single_precision(spread):
    items, size, rows = 10_728, 10, 6
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(rows, items, generator=generator) * 100 - 50
    if spread == "one above all":
        scores = torch.full((rows, items), -50.0)
        scores[:, 7] = 50.0
    elif spread == "equal":
        scores[:] = 50.0
    scores = scores.requires_grad_()
    distribution = SlateDistribution(scores, size)
    likely = distribution.sample(generator)
    unlikely = (-scores.detach()).topk(size, dim=1).indices
    for slates in (likely, unlikely, distribution.mode()):
        found = distribution.slot_log_probs(slates)
        expected = [naive(row, slate) for row, slate in zip(scores.detach().numpy(), slates.tolist(), strict=True)]
        np.testing.assert_allclose(found.detach(), expected, rtol=2e-6, atol=2e-5)
        gradient = torch.autograd.grad(found.sum() + distribution.entropy().sum(), scores)[0]
        assert torch.isfinite(gradient).all() and gradient.abs().max() <= size + 1e-3


def test_a_quota_in_the_largest_catalogue_is_safe_in_single_precision():
    items, size, rows = 10_728, 10, 11
    generator = torch.Generator().manual_seed(7)
    scores = (torch.rand(rows, items, generator=generator) * 100 - 50).requires_grad_()
    popular, counts = torch.arange(items) % 5 == 0, torch.arange(rows)
    distribution = QuotaSlateDistribution(scores, popular.expand(rows, -1), counts, size)
    slates = distribution.sample(generator)
    expected = [
        naive_with_quota(row, slate, popular.numpy(), count)
        for row, slate, count in zip(scores.detach().numpy(), slates.tolist(), counts.tolist(), strict=True)
    ]
    found = distribution.slot_log_probs(slates)
    np.testing.assert_allclose(found.detach(), expected, rtol=2e-6, atol=2e-5)
    assert torch.isfinite(torch.autograd.grad(found.sum(), scores)[0]).all()


def test_the_mode_is_the_best_items_best_first():
    scores = logits(10, rows=5)
    expected = np.argsort(-scores.numpy(), axis=1)
    np.testing.assert_array_equal(SlateDistribution(scores, K).mode(), expected[:, :K])
    distribution = SlateDistribution(scores.expand(5, -1)[:1].expand(len(SLATES), -1), K)
    assert SLATES[distribution.log_prob(SLATES).argmax()].tolist() == expected[0, :K].tolist()


@pytest.mark.parametrize("count", range(K + 1))
def test_the_mode_of_a_quota_is_the_best_of_both_groups(count):
    slates, scores = quota_slates(count), logits(11)
    best = quota(scores.expand(len(slates), -1), count).log_prob(slates).argmax()
    assert quota(scores, count).mode()[0].tolist() == slates[best].tolist()


def test_the_entropy_is_that_of_the_first_slot():
    scores = logits(12, rows=7)
    expected = torch.distributions.Categorical(logits=scores).entropy()
    np.testing.assert_allclose(SlateDistribution(scores, K).entropy(), expected, rtol=1e-12)
    parts = [torch.distributions.Categorical(logits=scores[:, group]).entropy() for group in (POPULAR, ~POPULAR)]
    np.testing.assert_allclose(quota(scores, 1).entropy(), sum(parts) / 2, rtol=1e-12)


def test_ascent_on_the_log_probability_makes_a_slate_the_mode():
    scores = torch.zeros(1, N, requires_grad=True)
    wanted = torch.tensor([[4, 0, 2]])
    for _ in range(50):
        gradient = torch.autograd.grad(SlateDistribution(scores, K).log_prob(wanted).sum(), scores)[0]
        scores = (scores + gradient).detach().requires_grad_()
    distribution = SlateDistribution(scores, K)
    assert distribution.mode().tolist() == wanted.tolist() and distribution.log_prob(wanted).exp().item() > 0.7


def test_the_same_generator_gives_the_same_slates():
    distribution = SlateDistribution(logits(13, rows=64, items=20), K)
    draws = [distribution.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [0, N + 1])
def test_slates_larger_than_the_catalogue_are_refused(size):
    with pytest.raises(ValueError, match="a slate has 1 to 6 items"):
        SlateDistribution(logits(), size)


SHAPES = [
    (spaces.Discrete(5), (5, 1)),
    (spaces.MultiDiscrete([5, 5]), (5, 2)),
    (spaces.MultiDiscrete([3, 3, 3]), (3, 3)),
]


@pytest.mark.parametrize(("space", "shape"), SHAPES, ids=str)
def test_items_and_slots_are_those_of_the_actions(space, shape):
    assert slate_shape(space) == shape


NO_ITEMS = [
    spaces.Discrete(5, start=1),
    spaces.MultiDiscrete([5, 4]),
    spaces.MultiDiscrete([4, 5]),
    spaces.MultiDiscrete([2, 2, 2]),
    spaces.MultiDiscrete([[5, 5], [5, 5]]),
    spaces.MultiBinary(5),
]


@pytest.mark.parametrize("space", NO_ITEMS, ids=str)
def test_actions_that_name_no_distinct_items_are_refused(space):
    with pytest.raises(ValueError, match="this agent names items"):
        slate_shape(space)


# ---------------------------------------------------------------- replay buffer

SLATE_SIZE, N_ITEMS = 6, 50
WORLD = small_world()


def sessions(n: int = 4, **settings) -> KuaiFairVecEnv:
    given = {"action_mode": "slate", "slate_size": SLATE_SIZE} | settings
    return KuaiFairVecEnv(WORLD, SessionConfig(**given), n, seed=0)


class SlateTD3(TD3):
    """TD3 whose buffer knows which items its embedding actions became."""

    def _store_transition(self, replay_buffer, buffer_action, new_obs, reward, dones, infos):
        executed = executed_slates(self.env, infos)
        replay_buffer.note(executed, {"half": executed.feedback[:, :2] / 2})
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)


def slate_td3(env=None, **settings) -> SlateTD3:
    given = {"learning_starts": 16, "batch_size": 16, "buffer_size": 400, "seed": 0} | settings
    columns = {"slate_size": SLATE_SIZE, "columns": {"half": ((2,), "float32")}}
    return SlateTD3(
        "MlpPolicy",
        sessions(action_mode="embedding") if env is None else env,
        replay_buffer_class=SlateReplayBuffer,
        replay_buffer_kwargs=columns,
        device="cpu",
        **given,
    )


def test_embedding_actions_are_kept_with_the_items_that_they_became():
    model = slate_td3().learn(200)
    drawn = model.replay_buffer.sample(500)
    # The buffer keeps actions as executed: the space is [-1, 1] already.
    scores = drawn.actions.numpy() @ WORLD.embeddings[:N_ITEMS].T
    np.testing.assert_array_equal(drawn.items, top_k(scores, SLATE_SIZE))
    np.testing.assert_allclose(drawn.feedback.mean(dim=1, keepdim=True), drawn.rewards, rtol=1e-6)
    assert set(drawn.feedback.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.extras["half"], drawn.feedback[:, :2] / 2)
    assert drawn.items.dtype == torch.int64


@pytest.mark.parametrize("wrap", ["plain", "monitor", "purified", "normalised", "single"])
def test_what_was_shown_is_read_beneath_any_wrapper(wrap):
    config = SessionConfig(action_mode="slate", slate_size=SLATE_SIZE)
    env = {
        "plain": lambda: sessions(),
        "monitor": lambda: VecMonitor(sessions()),
        "purified": lambda: VecDSRM(VecMonitor(sessions()), WindowPurifier()),
        "normalised": lambda: VecNormalize(sessions()),
        "single": lambda: make_vec_env(lambda: KuaiFairEnv(WORLD, config), 4, seed=0),
    }[wrap]()
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(40):
        slates = np.stack([rng.choice(N_ITEMS, SLATE_SIZE, replace=False) for _ in range(4)])
        _, reward, _, infos = env.step(slates)
        shown = executed_slates(env, infos)
        np.testing.assert_array_equal(shown.items, slates)
        if wrap != "normalised":
            np.testing.assert_allclose(shown.feedback.mean(axis=1), reward, rtol=1e-6)


@pytest.mark.parametrize(("leave", "ends"), [("temper", 1.0), ("never", 0.0)])
def test_only_users_who_left_end_the_value_of_what_follows(leave, ends):
    """A session that was cut off goes on in the target, from its own last state, not from the next user's."""
    env = sessions(leave=leave, observation_mode="history")
    buffer = SlateReplayBuffer(400, env.observation_space, env.action_space, "cpu", env.num_envs)
    last, rng, over = env.reset(), np.random.default_rng(1), []
    for step in range(60):
        slates = np.stack([rng.choice(N_ITEMS, SLATE_SIZE, replace=False) for _ in range(4)])
        seen, reward, done, infos = env.step(slates)
        for row in np.flatnonzero(done):
            for name, part in infos[row]["terminal_observation"].items():
                seen[name][row] = part
            over.append((step, row))
        buffer.note(executed_slates(env, infos))
        buffer.add(last, seen, slates, reward, done, infos)
        np.testing.assert_array_equal(buffer.next_observations[step], seen["state"])
        last = env.batch.observe()
    assert over
    drawn = buffer.sample(4000)
    assert drawn.dones.max() == ends
    assert sum(buffer.dones[step, row] for step, row in over) == len(over)
    assert {float(buffer.timeouts[step, row]) for step, row in over} == {1.0 - ends}
    assert drawn.observations.shape == (4000, 8)


def test_states_and_rewards_are_normalised_when_they_are_drawn_and_feedback_is_not():
    env = VecNormalize(sessions(), clip_obs=1e3)
    buffer = SlateReplayBuffer(400, env.observation_space, env.action_space, "cpu", env.num_envs)
    env.reset()
    rng = np.random.default_rng(1)
    for _ in range(40):
        last = env.get_original_obs()
        slates = np.stack([rng.choice(N_ITEMS, SLATE_SIZE, replace=False) for _ in range(4)])
        _, _, done, infos = env.step(slates)
        buffer.note(executed_slates(env, infos))
        buffer.add(last, env.get_original_obs(), slates, env.get_original_reward(), done, infos)
    torch.manual_seed(0)
    drawn = buffer.sample(100, env)
    torch.manual_seed(0)
    plain = buffer.sample(100)
    mean, deviation = env.obs_rms.mean, np.sqrt(env.obs_rms.var + env.epsilon)
    for name in ("observations", "next_observations"):
        expected = (getattr(plain, name).numpy() - mean) / deviation
        np.testing.assert_allclose(getattr(drawn, name), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(drawn.rewards, plain.rewards / np.sqrt(env.ret_rms.var + env.epsilon), rtol=1e-5)
    assert torch.equal(drawn.feedback, plain.feedback) and torch.equal(drawn.items, plain.items)


def test_a_checkpoint_brings_back_every_column(tmp_path):
    model = slate_td3().learn(200)
    save_checkpoint(model, tmp_path)
    fresh = slate_td3(seed=1)
    restore_checkpoint(fresh, tmp_path, model.num_timesteps)
    for name, kept in model.replay_buffer.columns.items():
        assert kept.any()
        np.testing.assert_array_equal(fresh.replay_buffer.columns[name], kept)
    np.testing.assert_array_equal(fresh.replay_buffer.observations, model.replay_buffer.observations)
    assert fresh.replay_buffer.pos == model.replay_buffer.pos == 50


def test_a_checkpoint_without_the_columns_is_refused(tmp_path):
    plain = TD3("MlpPolicy", sessions(action_mode="embedding"), buffer_size=400, device="cpu").learn(40)
    save_checkpoint(plain, tmp_path)
    with pytest.raises(ArtifactError, match=r"replay\.npz is not a whole replay buffer .*items"):
        restore_checkpoint(slate_td3(), tmp_path, 40)


@pytest.mark.parametrize("name", ["replay.npz", "model.zip", "sessions.json"])
def test_damaged_checkpoints_are_refused(tmp_path, name):
    save_checkpoint(slate_td3().learn(20), tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    altered = bytearray(content)
    altered[len(content) // 3] ^= 4
    damaged = [b"", b"{", content[: len(content) // 2], b"\0" * len(content)]
    for damage in damaged if name == "sessions.json" else [*damaged, bytes(altered)]:
        path.write_bytes(damage)
        with pytest.raises(ArtifactError, match=name):
            restore_checkpoint(slate_td3(), tmp_path, 20)


def test_a_full_buffer_forgets_the_oldest_step():
    model = slate_td3(buffer_size=40).learn(80)
    buffer = model.replay_buffer
    assert buffer.full and buffer.columns["items"].shape == (10, 4, SLATE_SIZE)
    newest = model.env.unwrapped.batch.outcome.items
    np.testing.assert_array_equal(buffer.columns["items"][buffer.pos - 1], newest)


def test_mistakes_are_explained():
    env = sessions()
    spaces = (env.observation_space, env.action_space)
    with pytest.raises(ValueError, match="optimize_memory_usage must be False"):
        SlateReplayBuffer(10, *spaces, optimize_memory_usage=True)
    with pytest.raises(ValueError, match="this agent names items"):
        SlateReplayBuffer(10, env.observation_space, sessions(action_mode="embedding").action_space)
    with pytest.raises(ValueError, match="need a state"):
        SlateReplayBuffer(10, env.action_space, env.action_space)
    with pytest.raises(ValueError, match=r"columns \['items'\] are the buffer's own"):
        SlateReplayBuffer(10, *spaces, columns={"items": ((1,), "int64")})
    buffer = SlateReplayBuffer(10, *spaces, n_envs=4)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(3)
    with pytest.raises(ValueError, match="no slate was shown yet"):
        executed_slates(sessions(), [])
    seen = env.reset()
    slates = np.tile(np.arange(SLATE_SIZE), (4, 1))
    after, reward, done, infos = env.step(slates)
    with pytest.raises(ValueError, match="before adding a step"):
        buffer.add(seen, after, slates, reward, done, infos)
    shown = executed_slates(env, infos)
    with pytest.raises(ValueError, match=r"keeps \['feedback', 'items'\], but was given .*'more'"):
        buffer.note(shown, {"more": reward})
    with pytest.raises(ValueError, match=r"items must have shape \(4, 6\), got \(4, 5\)"):
        buffer.note(shown._replace(items=shown.items[:, 1:]))
    env = sessions(observation_mode="history")
    buffer = SlateReplayBuffer(10, env.observation_space, env.action_space, n_envs=4)
    seen = env.reset()
    after, reward, done, infos = env.step(slates)
    buffer.note(executed_slates(env, infos))
    buffer.add(seen, after, slates, reward, done, infos)
    with pytest.raises(ValueError, match="of a dict only the state is kept"):
        buffer.sample(3, VecNormalize(env, norm_obs_keys=["state"]))
    with pytest.raises(TypeError, match="DummyVecEnv has none"):
        executed_slates(make_vec_env("CartPole-v1", 2), [{}, {}])
    with pytest.raises(TypeError, match="DummyVecEnv has none"):
        executed_slates(make_vec_env("CartPole-v1", 2), 2 * [{"items": slates[0]}])
    assert isinstance(make_vec_env("CartPole-v1", 2), DummyVecEnv)
