"""BCQ: its losses and targets in closed form, its constraint, and the manners of a Stable-Baselines3 algorithm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_worlds import small_pair
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Normal, kl_divergence

from hrl_policies.bcq import BCQ, BCQPolicy, DiscreteBCQ
from hrl_policies.common.offline import TensorBatch
from hrl_policies.common.transition_sources import LogReading, log_transitions
from hrl_policies.common.transitions import LoggedTransitions
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import DataError
from kuaifair_env.sb3 import KuaiFairVecEnv

torch.set_num_threads(1)
SMALL = {"net_arch": [16, 16], "action_net_arch": [16, 16], "samples": 5}
ALGORITHMS = ["bcq", "bcq-discrete"]


def sessions(mode: str = "embedding", count: int = 3) -> KuaiFairVecEnv:
    return KuaiFairVecEnv(small_pair().train, SessionConfig(action_mode=mode, slate_size=4), count, seed=0)


def made(name: str, env=None, **settings):
    pair = small_pair()
    if name == "bcq":
        data = log_transitions(pair.train, reading=LogReading(slate_size=4))
        given = {"seed": 3, "batch_size": 16, "policy_kwargs": SMALL} | settings
        return BCQ("BCQPolicy", sessions() if env is None else env, data, device="cpu", **given)
    data = log_transitions(pair.train, "slate", LogReading(slate_size=1))
    given = {"seed": 3, "batch_size": 16, "policy_kwargs": {"net_arch": [16]}} | settings
    env = sessions("slate") if env is None else env
    embeddings = pair.train.embeddings
    return DiscreteBCQ("DiscreteBCQPolicy", env, data, device="cpu", item_embeddings=embeddings, **given)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Untouchable(KuaiFairVecEnv):
    """Sessions that nobody may start or play."""

    def reset(self):
        raise AssertionError("an offline method reset the environment")

    def step_wait(self):
        raise AssertionError("an offline method stepped the environment")


def test_the_action_model_s_loss_is_its_evidence_bound():
    policy = made("bcq").policy
    states, actions = torch.randn(7, 8), torch.rand(7, 8)
    noise = torch.randn(7, policy.latent_size)
    found, mean, std = policy.vae(states, actions, noise)
    of_prior = kl_divergence(Normal(mean, std), Normal(torch.zeros(()), torch.ones(()))).mean()
    expected = (found - actions).square().mean() + 0.5 * of_prior
    torch.testing.assert_close(policy.vae.loss(states, actions, noise), expected)


def queries(count: int = 2_000, dimension: int = 16, length: float = 1.0) -> LoggedTransitions:
    """Logged queries, directions that the state does not tell, so that a latent must."""
    rng = np.random.default_rng(0)
    actions, states = rng.standard_normal((2, count, dimension)).astype(np.float32)
    actions *= length / np.linalg.norm(actions, axis=1, keepdims=True)
    ends = np.ones(count, np.bool_)
    wide, box = spaces.Box(-9, 9, (dimension,)), spaces.Box(-1, 1, (dimension,))
    return LoggedTransitions(states, actions, np.zeros(count, np.float32), states, ends, ~ends, wide, box)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_action_model_tells_queries_apart_though_their_components_are_small(seed):
    """Queries have length 1. A model that decodes their mean errs by all of their variance, and draws do not differ."""
    data = queries()
    nets = {"net_arch": [8], "action_net_arch": [48, 48]}
    model = BCQ(
        "BCQPolicy", None, data, learning_rate=5e-3, target_samples=1, policy_kwargs=nets, seed=seed, device="cpu"
    )
    model.learn(300, log_interval=None)
    states, logged = torch.from_numpy(data.observations[:500]), torch.from_numpy(data.actions[:500])
    vae, noise = model.policy.vae, torch.Generator().manual_seed(0)
    with torch.no_grad():
        decoded, _, _ = vae(states, logged * vae.limit, torch.randn(500, vae.latent_size, generator=noise))
        draws = torch.stack([vae.likely(states, torch.randn(500, vae.latent_size, generator=noise)) for _ in range(20)])
    error = (decoded / vae.limit - logged).square().mean() / logged.var(dim=0).mean()
    assert error < 0.75
    assert (draws / vae.limit).std(dim=0).mean() > 0.15 * logged.std(dim=0).mean()


def test_networks_see_actions_of_unit_variance_and_keep_their_unit(tmp_path):
    data = queries(200, 8)
    model = BCQ("BCQPolicy", None, data, policy_kwargs=SMALL, batch_size=16, seed=0, device="cpu")
    deviation = model._tensors.actions.std(dim=0, correction=0)
    assert float(deviation.square().mean()) == pytest.approx(1.0, abs=1e-4)
    model.learn(2)
    model.set_transitions(queries(200, 8, length=0.5))
    assert float(model._tensors.actions.square().mean()) == pytest.approx(0.25, abs=0.01)
    model.save(tmp_path / "model")
    again = BCQ.load(tmp_path / "model", device="cpu")
    assert torch.equal(again.policy.vae.limit, model.policy.vae.limit)
    again.set_transitions(data)
    torch.testing.assert_close(again._tensors.actions, torch.from_numpy(data.actions) * model.policy.vae.limit)


def test_proposals_stay_within_phi_of_the_log_s_likely_actions():
    policy = made("bcq").policy
    with torch.no_grad():
        for layer in policy.actor.net[:-1]:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(50)
    states, latents = torch.randn(200, 8), 3 * torch.randn(200, policy.latent_size)
    decoded = policy.vae.decode(states, latents.clamp(-0.5, 0.5))
    moved = policy.propose(states, latents)
    assert (moved - decoded).abs().max() <= 0.05 + 1e-6
    assert (moved - decoded).abs().max() > 0.049 and moved.abs().max() <= policy.vae.limit


def test_targets_are_the_softened_minimum_of_the_best_proposal():
    model = made("bcq", target_samples=6, minimum_weight=0.75, gamma=0.9)
    states = torch.randn(5, 8)
    going_on = torch.tensor([[1.0], [1.0], [0.0], [1.0], [0.0]])
    batch = TensorBatch(states, torch.zeros(5, 8), torch.rand(5, 1), torch.randn(5, 8), going_on, None)
    found = model._targets(batch, torch.Generator().manual_seed(4))
    latents = torch.randn(30, model.policy.latent_size, generator=torch.Generator().manual_seed(4)).view(5, 6, -1)
    for row in range(5):
        best = -np.inf
        for latent in latents[row]:
            state = batch.next_observations[row : row + 1]
            action = model.policy.propose(state, latent[None], target=True)
            values = [float(value.detach()) for value in model.policy.critic_target(state, action)]
            best = max(best, 0.75 * min(values) + 0.25 * max(values))
        # No session earns less than nothing, or more than the best slate of the log for ever.
        best = np.clip(best, 0.0, model.transitions.rewards.max() / (1 - 0.9))
        expected = float(batch.rewards[row]) + (0.0 if row in (2, 4) else 0.9 * best)
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["bcq", "discrete"])
@pytest.mark.parametrize(
    ("gamma", "reward", "low", "high"), [(0.9, 0.5, 0, 5), (0.5, -0.5, -1, 0), (1.0, 1.0, 0, np.inf)]
)
def test_targets_lie_within_what_a_session_can_earn(kind, gamma, reward, low, high):
    model = made(kind, gamma=gamma)
    data = model.transitions
    slots = None if data.slot_rewards is None else np.full_like(data.slot_rewards, reward)
    model.set_transitions(replace(data, rewards=np.full_like(data.rewards, reward), slot_rewards=slots))
    values = torch.tensor([-1e6, -0.3, 0.3, 1e6])
    np.testing.assert_allclose(model.possible(values), np.clip(values, low, high), rtol=1e-6)


def test_an_action_is_the_best_of_the_proposals_and_depends_on_its_own_state():
    model = made("bcq").learn(20)
    env = sessions(count=6)
    states = env.reset()
    actions, _ = model.predict(states, deterministic=True)
    again, _ = model.predict(states[2:4], deterministic=True)
    np.testing.assert_allclose(actions[2:4], again, atol=1e-6)
    policy: BCQPolicy = model.policy
    for state, action in zip(torch.from_numpy(states), actions, strict=True):
        repeated = state.expand(5, -1)
        proposals = policy.propose(repeated, policy.latents)
        best = policy.critic.q1_forward(repeated, proposals)[:, 0].argmax()
        np.testing.assert_allclose(action, (proposals[best] / policy.vae.limit).detach().numpy(), atol=1e-6)
    free = [model.predict(states, deterministic=False)[0] for _ in range(2)]
    assert not np.array_equal(*free)


def test_wider_boxes_are_learned_scaled_and_acted_unscaled():
    data = made("bcq").transitions
    wide = replace(data, actions=5 * data.actions + 2, action_space=spaces.Box(-3, 7, (8,)))
    models = [
        BCQ("BCQPolicy", None, one, device="cpu", seed=3, batch_size=16, policy_kwargs=SMALL).learn(5)
        for one in (data, wide)
    ]
    torch.testing.assert_close(models[1]._tensors.actions, models[0]._tensors.actions, atol=1e-6, rtol=0)
    narrow, broad = (model.predict(data.observations[:9], deterministic=True)[0] for model in models)
    np.testing.assert_allclose(broad, 5 * narrow + 2, atol=1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learning_never_touches_the_environment(name):
    mode = "embedding" if name == "bcq" else "slate"
    env = Untouchable(small_pair().train, SessionConfig(action_mode=mode, slate_size=4), 3, seed=0)
    model = made(name, env)
    before = parameters(model)
    model.learn(5)
    assert model.num_timesteps == model._n_updates == 5
    changed = [name for name, value in parameters(model).items() if not torch.equal(value, before[name])]
    untrained = {"latents", "embeddings", "vae.limit"}
    assert set(before) - set(changed) == untrained & set(before)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_seed_gives_the_same_model_whatever_else_draws_random_numbers(name):
    one = made(name).learn(8)
    other = made(name)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (what Stable-Baselines3 draws from)
    other.learn(8)
    assert equal(parameters(one), parameters(other))
    assert not equal(parameters(one), parameters(made(name, seed=4).learn(8)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_saved_model_acts_the_same_and_goes_on_as_if_nothing_had_happened(name, tmp_path):
    whole = made(name).learn(14)
    half = made(name).learn(6)
    half.save(tmp_path / "model.zip")
    loaded = type(half).load(tmp_path / "model.zip", device="cpu")
    assert equal(parameters(loaded), parameters(half))
    states = half.transitions.observations[:10]
    np.testing.assert_array_equal(
        loaded.predict(states, deterministic=True)[0], half.predict(states, deterministic=True)[0]
    )
    with pytest.raises(ValueError, match="nothing to learn from; call set_transitions"):
        loaded.learn(1)
    loaded.set_transitions(half.transitions)
    loaded.learn(8, reset_num_timesteps=False)
    assert loaded.num_timesteps == 14
    assert equal(parameters(loaded), parameters(whole))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_parameters_can_be_set_from_tensors_alone(name, tmp_path):
    trained, fresh = made(name).learn(5), made(name, seed=8)
    trained.save(tmp_path / "model.zip")
    _, stored, _ = load_from_zip_file(tmp_path / "model.zip", load_data=False, device="cpu")
    assert not equal(parameters(trained), parameters(fresh))
    fresh.set_parameters(stored, exact_match=True, device="cpu")
    assert equal(parameters(trained), parameters(fresh))
    assert "transitions" not in load_from_zip_file(tmp_path / "model.zip", device="cpu")[0]
    trained.policy.save(tmp_path / "policy.pth")
    policy = type(trained.policy).load(tmp_path / "policy.pth", device="cpu")
    states = trained.transitions.observations[:4]
    np.testing.assert_array_equal(
        policy.predict(states, deterministic=True)[0], trained.predict(states, deterministic=True)[0]
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_callbacks_loggers_and_progress_bars_work(name, tmp_path, capsys):
    class Losses(BaseCallback):
        seen: list[dict[str, float]]

        def _on_training_start(self):
            self.seen = []

        def _on_step(self):
            self.seen.append(self.locals["losses"])
            return len(self.seen) < 12

    losses = Losses()
    mode = "embedding" if name == "bcq" else "slate"
    evaluate = EvalCallback(
        sessions(mode), eval_freq=5, n_eval_episodes=4, best_model_save_path=str(tmp_path), verbose=0
    )
    saver = CheckpointCallback(6, str(tmp_path))
    model = made(name, verbose=1)
    model.learn(100, callback=[evaluate, saver, losses], log_interval=10, progress_bar=True)
    assert model.num_timesteps == 12 == len(losses.seen)
    assert evaluate.n_calls == 12 and evaluate.last_mean_reward > 0
    assert (tmp_path / "best_model.zip").exists() and (tmp_path / "rl_model_12_steps.zip").exists()
    printed = capsys.readouterr().out
    shown = "critic_loss" if name == "bcq" else "allowed_items"
    assert shown in printed and "gradient_steps_per_second" in printed


def test_learning_rates_follow_their_schedule():
    model = made("bcq", learning_rate=lambda left: 0.01 * left).learn(10)
    rates = {group["lr"] for optimizer in model._optimizers() for group in optimizer.param_groups}
    np.testing.assert_allclose(sorted(rates), [0.001])


def test_learning_anew_starts_the_schedule_anew():
    seen: list[float] = []
    model = made("bcq", learning_rate=lambda left: seen.append(left) or 0.01 * left).learn(4)
    seen.clear()
    model.learn(4)
    assert sorted(set(seen), reverse=True) == [1.0, 0.75, 0.5, 0.25]


def test_what_cannot_be_learned_from_is_refused():
    data = made("bcq").transitions
    with pytest.raises(ValueError, match="needs an environment or transitions"):
        BCQ("BCQPolicy")
    with pytest.raises(ValueError, match="the algorithm in"):
        BCQ("BCQPolicy", sessions(), replace(data, action_space=spaces.Box(-2, 2, (8,))))
    with pytest.raises(ValueError, match="BCQ acts in a Box, the transitions in Discrete"):
        items = np.zeros(len(data), np.int64)
        BCQ("BCQPolicy", None, replace(data, actions=items, action_space=spaces.Discrete(3)))
    with pytest.raises(DataError, match="finite bounds"):
        endless = spaces.Box(-np.inf, np.inf, (8,))
        BCQ("BCQPolicy", None, replace(data, action_space=endless), policy_kwargs=SMALL)
    with pytest.raises(ValueError, match="transitions observe"):
        wider = np.zeros((len(data), 9), np.float32)
        space = spaces.Box(-1, 1, (9,))
        other = replace(data, observations=wider, next_observations=wider, observation_space=space)
        BCQ("BCQPolicy", sessions(), other)
    with pytest.raises(ValueError, match="leave VecNormalize out"):
        BCQ("BCQPolicy", VecNormalize(sessions()), data)
    history = SessionConfig(observation_mode="history")
    with pytest.raises(ValueError, match="observation_mode='state'"):
        BCQ("BCQPolicy", KuaiFairVecEnv(small_pair().train, history, 2), data)
    for settings, text in (
        ({"batch_size": 0}, "batch_size"),
        ({"tau": 0.0}, "tau lies in"),
        ({"minimum_weight": 2.0}, "minimum_weight lies in"),
        ({"policy_kwargs": {"samples": 0}}, "samples is at least 1"),
        ({"policy_kwargs": {"net_arch": []}}, "at least one layer"),
    ):
        with pytest.raises(ValueError, match=text):
            made("bcq", **settings)


def test_transitions_of_a_file_need_no_environment(tmp_path):
    pytest.importorskip("minari")
    made("bcq").transitions.to_minari(tmp_path / "log")
    data = LoggedTransitions.from_minari(tmp_path / "log")
    model = BCQ("BCQPolicy", transitions=data, seed=3, batch_size=16, policy_kwargs=SMALL, device="cpu").learn(5)
    assert equal(parameters(model), parameters(made("bcq").learn(5)))
