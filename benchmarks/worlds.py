"""What benchmarks share: worlds beside the registered environments, common arguments, and pages of results."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
from partial_data import KUAIRAND_FOLDER, KUAIREC_FOLDER, partial_kuairand, partial_kuairec

from dsrm.candidates import CandidatePurifier
from dsrm.purifier import load_purifier
from hrl_policies.worlds import WorldPair, cached_purifier, load_worlds
from kuaifair_env.data import InteractionData
from kuaifair_env.embeddings import cached_embeddings
from kuaifair_env.files import write_text_atomically
from kuaifair_env.intervals import Interval
from kuaifair_env.replay import build_replay_world
from kuaifair_env.response.fitting import cached_response
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.twin import load_twin
from kuaifair_env.world import build_world

PARTIAL = {
    "kuairand": "partial KuaiRand-Pure",
    "kuairec": "partial KuaiRec",
    "kuairand-replay": "partial KuaiRand-Pure, replayed",
    "kuairand-replay-all": "partial KuaiRand-Pure, replayed for everybody",
}
TWIN_FOR_SETTINGS = "KuaiRand twin, seed 1"
"""A twin of other users, items and tastes: settings are chosen in it, and no result is reported in it."""


def open_worlds(name: str, data: Path | None = None) -> WorldPair:
    """Returns both worlds of an environment id, of partial real data, or of the twin for settings.

    Args:
        name: An environment id, a key of :data:`PARTIAL`, or :data:`TWIN_FOR_SETTINGS`.
        data: Folder that holds the partial data sets.
    """
    if name == TWIN_FOR_SETTINGS:
        return twin_worlds(name, seed=1)
    if name not in PARTIAL:
        return load_worlds(name)
    if data is None:
        raise SystemExit(f"{name} needs --data FOLDER, the folder with the partial data sets")
    if name == "kuairand":
        return worlds_of_data(PARTIAL[name], partial_kuairand(data / KUAIRAND_FOLDER))
    if name == "kuairec":
        return worlds_of_data(PARTIAL[name], partial_kuairec(data / KUAIREC_FOLDER))
    return replay_worlds(PARTIAL[name], partial_kuairand(data / KUAIRAND_FOLDER), name.endswith("-all"))


def start_of_dsrm_hrl(pair: WorldPair) -> CandidatePurifier:
    """Returns DSRM-HRL's purifier, which its agent starts from; it is made once and kept in the cache."""
    return cast(CandidatePurifier, load_purifier(cached_purifier(pair.train, "candidates")))


def worlds_of_data(name: str, data: InteractionData) -> WorldPair:
    """Returns both worlds of a data set; fitted models and embeddings come from the cache when they are there."""
    embeddings = cached_embeddings(data, 64)
    train, test = (
        build_world(data, split, cached_response(data, split), embeddings=embeddings) for split in ("train", "test")
    )
    return WorldPair(name, train, test)


def replay_worlds(name: str, data: InteractionData, everybody: bool = False) -> WorldPair:
    """Returns the usual training world, and the test log replayed.

    Args:
        name: How results call them.
        data: The data set.
        everybody: Whether all users with at least 30 candidates are in the test world, and none of them in the other;
            if not, it has those held out with at least 5.
    """
    embeddings = cached_embeddings(data, 64)
    train = build_world(data, "train", cached_response(data, "train"), embeddings=embeddings)
    if not everybody:
        return WorldPair(name, train, build_replay_world(data, embeddings=embeddings))
    test = build_replay_world(data, users=data.test.user_rows(), min_candidates=30, embeddings=embeddings)
    return WorldPair(name, replace(train, users=np.setdiff1d(train.users, test.users)), test)


def twin_worlds(name: str, preset: str = "KuaiRand", **settings: Any) -> WorldPair:
    """Returns both worlds of a twin of one's own settings; the test world is its users' true taste."""
    twin = load_twin(twin_config(preset, **settings))
    data, embeddings = twin.data, cached_embeddings(twin.data, 64)
    truth = TwinResponse(twin.truth, 0.0, data.provenance.as_dict())
    return WorldPair(
        name,
        build_world(data, "train", cached_response(data, "train"), embeddings=embeddings),
        build_world(data, "test", truth, embeddings=embeddings, true_preference=twin.truth.true_preference),
    )


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of what every script takes: a world, the folder of partial data, and where results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", help="environment id, or kuairand and kuairec for partial real data")
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    return parser


def short_name(world: str) -> str:
    """Returns how files call a world: ``KuaiFair-KuaiRandTwin-v0`` is ``kuairandtwin``."""
    return world.removeprefix("KuaiFair-").removesuffix("-v0").lower()


def cell(interval: Interval, *, sign: bool = False, decimals: int = 2) -> str:
    """Returns an estimate with its interval as a cell of a table; ``sign`` has positive numbers begin with +."""
    form = f"{'+' if sign else ''}.{decimals}f"
    return f"{interval.estimate:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def write_page(results: Path | None, name: str, text: str) -> None:
    """Prints a page, and writes it where results go."""
    print(text)
    if results is not None:
        write_text_atomically(results / name, text.rstrip("\n") + "\n")


def write_section(results: Path | None, page: str, text: str) -> None:
    """Prints a section of a page that several worlds or scripts share, and writes it in place of an earlier one.

    Args:
        results: Where the page is; None prints alone.
        page: Name of the page, which begins with its title and what all sections have in common.
        text: The section as a page of its own, with a title by which an earlier one is found. Its headings are lowered.
    """
    print(text)
    if results is None:
        return
    section = re.sub(r"^#", "##", text.strip(), flags=re.MULTILINE)
    title = section.partition("\n")[0]
    top, *sections = re.split(r"^(?=## )", (results / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {old.partition("\n")[0]: old.strip() for old in sections} | {title: section}
    write_text_atomically(results / page, "\n\n".join([top.strip(), *found.values()]) + "\n")
