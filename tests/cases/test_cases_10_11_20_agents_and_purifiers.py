"""Saved agents and purifiers: settings without meaning, foreign worlds, and damaged files."""

from __future__ import annotations

import json
import struct

import numpy as np
import pandas as pd
import pytest
from stable_baselines3 import A2C

from dsrm.baselines import IPSPurifier
from dsrm.diffusion import SamplerConfig
from dsrm.purifier import load_purifier, save_purifier
from hrl_policies.bcq import BCQ, DiscreteBCQ
from hrl_policies.dnair import DNaIR
from hrl_policies.dorl import DORL
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.mofir import MOFIR
from hrl_policies.sac4ir import SAC4IR
from kuaifair_env import ArtifactError, InteractionData, MismatchError, SessionConfig, build_world, evaluate, serve
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.response import fit_response
from kuaifair_env.sb3 import KuaiFairVecEnv

N_USERS, N_ITEMS = 100, 40


@pytest.fixture(scope="module")
def own_and_renumbered():
    """Sessions over one log, and over the same log with the items numbered anew."""
    rng = np.random.default_rng(0)
    share, quality = rng.pareto(1.0, N_ITEMS) + 0.1, rng.normal(size=N_ITEMS)

    def log(rows, weights):
        users, items = rng.integers(N_USERS, size=rows), rng.choice(N_ITEMS, rows, p=weights / weights.sum())
        clicks = (rng.random(rows) < 1 / (1 + np.exp(-quality[items]))).astype(int)
        return pd.DataFrame({"user_id": users, "item_id": items, "click": clicks})

    def world(*frames):
        data = InteractionData.from_frames(*frames)
        embeddings = item_embeddings(data.train, N_USERS, data.items, 8)
        return build_world(data, "train", fit_response(data, "train"), embeddings=embeddings)

    frames, new = (log(3_000, share), log(1_500, np.ones(N_ITEMS))), rng.permutation(N_ITEMS)
    return world(*frames), world(*(frame.assign(item_id=new[frame.item_id]) for frame in frames))


def sessions(world, action_mode, observation_mode):
    return KuaiFairVecEnv(world, SessionConfig(action_mode=action_mode, observation_mode=observation_mode), 4, seed=1)


def test_case_10_an_agent_with_item_tables_refuses_a_world_whose_items_are_others(own_and_renumbered, tmp_path):
    own, renumbered = (sessions(world, "slate", "history") for world in own_and_renumbered)
    agent = HierarchicalPPO("HierarchicalPolicy", own, n_steps=8, seed=0).learn(32)
    agent.save(tmp_path / "agent.zip")
    evaluate(agent, own)
    with pytest.raises(ArtifactError, match="item"):
        HierarchicalPPO.load(tmp_path / "agent.zip", env=renumbered)
    with pytest.raises(ArtifactError, match="item"):
        evaluate(agent, renumbered)


AGENTS = {
    HierarchicalPPO: ("HierarchicalPolicy", "slate", "history"),
    SAC4IR: ("SoftItemPolicy", "slate", "state"),
    DNaIR: ("QItemPolicy", "slate", "history"),
    DiscreteBCQ: ("DiscreteBCQPolicy", "slate", "state"),
    BCQ: ("BCQPolicy", "embedding", "state"),
    DORL: ("MlpPolicy", "embedding", "state"),
    MOFIR: ("PreferencePolicy", "embedding", "state"),
    A2C: ("MlpPolicy", "embedding", "state"),
}


@pytest.mark.parametrize("algorithm", AGENTS)
def test_case_10_every_agent_refuses_other_items_wherever_it_meets_them(algorithm, own_and_renumbered, tmp_path):
    policy, *modes = AGENTS[algorithm]
    own, renumbered = (sessions(world, *modes) for world in own_and_renumbered)
    agent = algorithm(policy, own, seed=0)
    agent.save(tmp_path / "agent.zip")
    # Stable-Baselines3's own algorithms show both spaces, those of this library say what to do.
    error = ValueError if algorithm is A2C else MismatchError
    both = r"40 items of .* \(ids .*40 items of .* \(ids" + (
        "" if algorithm is A2C else r".*embeddings differ.*train one"
    )
    for meet in (lambda: algorithm.load(tmp_path / "agent.zip", env=renumbered), lambda: agent.set_env(renumbered)):
        with pytest.raises(error, match=both):
            meet()
    for meet in (lambda: evaluate(agent, renumbered), lambda: serve(agent, renumbered, 8)):
        with pytest.raises(MismatchError, match=r"40 items of .*40 items of .*embeddings differ.*train one"):
            meet()
    agent.set_env(sessions(own_and_renumbered[0], *modes))
    algorithm.load(tmp_path / "agent.zip", env=sessions(own_and_renumbered[0], *modes))


@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_case_11_guidance_must_be_finite(guidance):
    with pytest.raises(ValueError, match="guidance"):
        SamplerConfig(guidance=guidance)


@pytest.mark.parametrize("damage", ["key of the hash", "deeply nested JSON", "bfloat16 tensor", "float8 tensor"])
def test_case_20_a_damaged_purifier_file_is_named(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    save_purifier(IPSPurifier(), path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    meta = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["kuaifair"])
    tensors, body = {}, b""
    if damage == "key of the hash":
        meta = {key.replace("sha256", "sha25v"): value for key, value in meta.items()}
    elif damage != "deeply nested JSON":
        dtype, body = {"bfloat16 tensor": ("BF16", b"\0" * 4), "float8 tensor": ("F8_E4M3", b"\0" * 2)}[damage]
        tensors = {"t": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(body)]}}
    text = "[" * 100_000 if damage == "deeply nested JSON" else json.dumps(meta)
    header = json.dumps({"__metadata__": {"kuaifair": text}, **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    with pytest.raises(ArtifactError, match=r"x\.safetensors.*kuaifair pretrain"):
        load_purifier(path)
