"""The replay buffer keeps what was really shown, what each item earned, and how sessions ended."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_world
from purifiers import WindowPurifier
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from dsrm import VecDSRM
from hrl_policies.common.buffers import SlateReplayBuffer, executed_slates
from hrl_policies.study.training import restore_checkpoint, save_checkpoint
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.spaces import top_k

K, N = 6, 50
WORLD = small_world()


def sessions(n: int = 4, **settings) -> KuaiFairVecEnv:
    given = {"action_mode": "slate", "slate_size": K} | settings
    return KuaiFairVecEnv(WORLD, SessionConfig(**given), n, seed=0)


class SlateTD3(TD3):
    """TD3 whose buffer knows which items its embedding actions became."""

    def _store_transition(self, replay_buffer, buffer_action, new_obs, reward, dones, infos):
        executed = executed_slates(self.env, infos)
        replay_buffer.note(executed, {"half": executed.feedback[:, :2] / 2})
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)


def slate_td3(env=None, **settings) -> SlateTD3:
    given = {"learning_starts": 16, "batch_size": 16, "buffer_size": 400, "seed": 0} | settings
    columns = {"slate_size": K, "columns": {"half": ((2,), "float32")}}
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
    scores = drawn.actions.numpy() @ WORLD.embeddings[:N].T
    np.testing.assert_array_equal(drawn.items, top_k(scores, K))
    np.testing.assert_allclose(drawn.feedback.mean(dim=1, keepdim=True), drawn.rewards, rtol=1e-6)
    assert set(drawn.feedback.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.extras["half"], drawn.feedback[:, :2] / 2)
    assert drawn.items.dtype == torch.int64


@pytest.mark.parametrize("wrap", ["plain", "monitor", "purified", "normalised", "single"])
def test_what_was_shown_is_read_beneath_any_wrapper(wrap):
    config = SessionConfig(action_mode="slate", slate_size=K)
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
        slates = np.stack([rng.choice(N, K, replace=False) for _ in range(4)])
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
        slates = np.stack([rng.choice(N, K, replace=False) for _ in range(4)])
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
    with pytest.raises(ArtifactError, match=r"replay\.npz is missing or damaged.*items"):
        restore_checkpoint(slate_td3(), tmp_path, 40)


def test_a_full_buffer_forgets_the_oldest_step():
    model = slate_td3(buffer_size=40).learn(80)
    buffer = model.replay_buffer
    assert buffer.full and buffer.columns["items"].shape == (10, 4, K)
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
    slates = np.tile(np.arange(K), (4, 1))
    after, reward, done, infos = env.step(slates)
    with pytest.raises(ValueError, match="before adding a step"):
        buffer.add(seen, after, slates, reward, done, infos)
    shown = executed_slates(env, infos)
    with pytest.raises(ValueError, match=r"keeps \['feedback', 'items'\], but was given .*'more'"):
        buffer.note(shown, {"more": reward})
    with pytest.raises(ValueError, match=r"items must have shape \(4, 6\), got \(4, 5\)"):
        buffer.note(shown._replace(items=shown.items[:, 1:]))
    with pytest.raises(TypeError, match="DummyVecEnv has none"):
        executed_slates(make_vec_env("CartPole-v1", 2), [{}, {}])
    assert isinstance(make_vec_env("CartPole-v1", 2), DummyVecEnv)
