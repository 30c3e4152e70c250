"""``kuaifair pretrain``, ``probe`` and ``encode``: what they write, and what they say to those who mistype."""

from __future__ import annotations

import json

import pytest
from training_worlds import taste_worlds

import kuaifair_env.registration as registration
from hrl_policies.cli.main import main

ENV = ["--env", "KuaiFair-Toy-v0"]
QUICK = ["--rounds", "1", "--examples", "500", "--no-progress"]


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch, tmp_path):
    worlds = dict(zip(("train", "test"), taste_worlds(), strict=True))
    monkeypatch.setattr(registration, "make_world", lambda env_id, split, **rest: worlds[split])
    monkeypatch.chdir(tmp_path)


def kuaifair(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def test_pretrain_reports_what_it_made_and_probe_measures_it(capsys, tmp_path):
    code, out, err = kuaifair(
        capsys, "pretrain", *ENV, "--mode", "regression", "--output", "made/r.safetensors", *QUICK
    )
    assert code == 0, err
    assert "held out for early stopping" in out and "unread" in out and "hash" in out
    assert not (tmp_path / "made/r.safetensors.partial").exists()
    code, out, err = kuaifair(capsys, "probe", "made/r.safetensors", *ENV, "--output", "probes")
    assert code == 0, err
    assert "AUC within users" in out and "[95 % bootstrap over users]" in out
    content = json.loads((tmp_path / "probes/probes.json").read_text())
    assert set(content["purifiers"]) == {"raw", "r"}
    for name in ("states.png", "counts_and_rates.png"):
        assert (tmp_path / "probes" / name).read_bytes().startswith(b"\x89PNG")


def test_a_noise_control_takes_its_size_from_a_purifier(capsys):
    kuaifair(capsys, "pretrain", *ENV, "--mode", "ips", "-o", "ips.safetensors")
    code, out, err = kuaifair(
        capsys, "pretrain", *ENV, "--mode", "noise", "--like", "ips.safetensors", "-o", "noise.safetensors"
    )
    assert code == 0 and "noise" in out, err


def test_encode_says_how_far_it_came(capsys, tmp_path):
    code, out, err = kuaifair(capsys, "encode", *ENV, "-o", "e.safetensors", "--steps", "60", "--no-progress")
    assert code == 0, err
    assert "validation loss" in out and (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", *ENV, "--mode", "magic", "-o", "x"], "magic"),
        (["pretrain", *ENV, "--like", "a", "-o", "x"], "--like is for --mode noise"),
        (["pretrain", *ENV, "--mode", "ips"], "--output"),
        (["pretrain", *ENV, "--mode", "ips", "-o", "there"], "exists already"),
        (["encode", *ENV, "-o", "there"], "exists already"),
        (["probe", "there", *ENV], "safetensors"),
        (["probe", "nowhere", *ENV], "nowhere"),
        (["probe", *ENV], "purifiers"),
        (["pretrain", *ENV, "--item-term", "magic", "-o", "x"], "magic"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(capsys, tmp_path, arguments, words):
    (tmp_path / "there").write_text("something else")
    code, out, err = kuaifair(capsys, *arguments)
    assert code == 2
    assert words in out + err
    assert "Traceback" not in out + err
    assert not (tmp_path / "x").exists()
