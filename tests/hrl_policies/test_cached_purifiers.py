"""The cache of purifiers: one file for each mode, world, set of training users and seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds_for_tests import small_pair

import dsrm.pretraining
from dsrm import IPSPurifier
from hrl_policies.worlds import cached_purifier


@pytest.fixture
def made(monkeypatch):
    """Which worlds a purifier was pretrained in."""
    worlds = []

    def pretrain(world, config, checkpoint, progress):
        worlds.append(world)
        return IPSPurifier()

    monkeypatch.setattr(dsrm.pretraining, "pretrain", pretrain)
    return worlds


def test_the_second_call_takes_the_file_of_the_first(made, tmp_path):
    world = small_pair().train
    assert cached_purifier(world, "ips", folder=tmp_path) == cached_purifier(world, "ips", folder=tmp_path)
    assert len(made) == 1


def test_other_users_other_modes_and_other_seeds_have_files_of_their_own(made, tmp_path):
    """A search leaves its validation users out: what was trained on all users must not be handed to it."""
    world = small_pair().train
    fewer = replace(world, users=world.users[::2])
    paths = {
        cached_purifier(world, "ips", folder=tmp_path),
        cached_purifier(fewer, "ips", folder=tmp_path),
        cached_purifier(world, "profile", folder=tmp_path),
        cached_purifier(world, "ips", 1, folder=tmp_path),
    }
    assert len(paths) == len(made) == 4


def test_a_damaged_file_is_made_again(made, tmp_path):
    world = small_pair().train
    path = cached_purifier(world, "ips", folder=tmp_path)
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="made again"):
        assert cached_purifier(world, "ips", folder=tmp_path) == path
    assert len(made) == 2
