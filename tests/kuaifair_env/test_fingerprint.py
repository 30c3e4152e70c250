"""What a world is: which changes its fingerprint tells from rounding, and that those of the ids stay as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from helpers import TableResponse, small_world

import kuaifair_env
from kuaifair_env.fingerprint import TOLERANCE, WorldFingerprint

PINNED = Path(__file__).with_name("fingerprints.json")
MOVED = (
    "{what} of {env_id} moved ({details}). From 0.1.0 on raise the version of the id (-vN), keep the old one, and "
    "write the changelog; before that, write the changelog and renew tests/kuaifair_env/fingerprints.json by "
    "python tests/kuaifair_env/test_fingerprint.py"
)
QUICK = ["KuaiFair-Toy-v0"]
LARGE = ["KuaiFair-KuaiRecTwin-v0", "KuaiFair-KuaiRandTwin-v0"]
FIGURES = ("len", "r_each", "ad", "violation_rate")


def fingerprints(env_id):
    worlds = {split: kuaifair_env.make_world(env_id, split=split) for split in ("train", "test")}
    return {split: world.fingerprint.describe() for split, world in worlds.items()}


def figures(env_id):
    """What a slate within the bound and a fixed direction earn of some users: moves with any rule of sessions."""
    popular = kuaifair_env.make_world(env_id, split="test").groups.popular
    slate = np.r_[np.flatnonzero(popular)[:5], np.flatnonzero(~popular)[:5]]
    actions = {"slate": slate, "embedding": np.cos(np.arange(64), dtype=np.float32)}
    results = []
    for mode, action in actions.items():
        env = gym.make(env_id, split="test", action_mode=mode)
        results.append(kuaifair_env.evaluate(partial(acting, action), env, n_users=30))
    return [[round(result.summary()[name], 4) for name in FIGURES] for result in results]


def acting(action, states):
    return np.tile(action, (len(states), 1))


def pins(env_id):
    return {"worlds": fingerprints(env_id), "sessions": figures(env_id)}


@pytest.mark.parametrize("env_id", [*QUICK, *(pytest.param(env_id, marks=pytest.mark.slow) for env_id in LARGE)])
def test_an_id_means_what_it_meant(env_id):
    pinned, now = json.loads(PINNED.read_text(encoding="utf-8"))[env_id], pins(env_id)
    for split, described in now["worlds"].items():
        before, after = (WorldFingerprint.of_description(one) for one in (pinned["worlds"][split], described))
        differences = after.differences(before)
        assert not differences, MOVED.format(what=f"the {split} world", env_id=env_id, details=", ".join(differences))
    moved = np.abs(np.subtract(now["sessions"], pinned["sessions"])).max()
    assert moved < 0.02, MOVED.format(what="sessions", env_id=env_id, details=f"{FIGURES} by {moved}")


OTHER_KERNELS = {
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "default",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}


@pytest.mark.slow
def test_other_kernels_of_linear_algebra_make_the_same_worlds(tmp_path):
    script = (
        "import json, kuaifair_env\n"
        "for split in ('train', 'test'):\n"
        "    print(json.dumps(kuaifair_env.make_world('KuaiFair-Toy-v0', split=split).fingerprint.describe()))"
    )
    environment = os.environ | OTHER_KERNELS | {"KUAIFAIR_CACHE": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True).stdout
    for line, described in zip(printed.splitlines(), fingerprints("KuaiFair-Toy-v0").values(), strict=True):
        other, own = (WorldFingerprint.of_description(one) for one in (json.loads(line), described))
        assert not other.differences(own)
        # Far below the tolerance, not just within it.
        np.testing.assert_allclose(other.response, own.response, atol=TOLERANCE / 20)
        np.testing.assert_allclose(other.embeddings, own.embeddings, atol=TOLERANCE / 20)


def test_a_world_is_the_same_after_rounding_and_a_description():
    world = small_world()
    again = WorldFingerprint.of_description(json.loads(json.dumps(world.describe()["fingerprint"])))
    assert again == world.fingerprint and not again.differences(world.fingerprint)
    rounded = replace(world, embeddings=world.embeddings * np.float32(1 + 1e-6))
    assert not rounded.fingerprint.differences(world.fingerprint)


def test_what_differs_is_named():
    world = small_world()
    flipped = world.data.train.clicks.copy()
    flipped[7] ^= True
    groups = replace(world.groups, popular=np.roll(world.groups.popular, 1))
    log = replace(world.data.train, clicks=flipped)
    for other, parts in (
        (replace(world, data=replace(world.data, train=log)), ["data"]),
        (replace(world, users=world.users[1:]), ["users", "response"]),
        (replace(world, groups=groups), ["candidates"]),
        (replace(world, embeddings=np.roll(world.embeddings, 1, axis=1)), ["embeddings"]),
    ):
        assert other.fingerprint.differences(world.fingerprint) == parts


def test_another_response_is_another_world():
    world = small_world()
    other = replace(world, response=TableResponse(np.square(world.response.table)))
    assert other.fingerprint.differences(world.fingerprint) == ["response"]


if __name__ == "__main__":
    known = json.loads(PINNED.read_text(encoding="utf-8")) if PINNED.exists() else {}
    known |= {env_id: pins(env_id) for env_id in (sys.argv[1:] or [*QUICK, *LARGE])}
    PINNED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
