"""Does a purifier know how wrong it is? Spread of the posterior against its real error, by length of the window.

    python benchmarks/posterior_spread.py kuairand --data ../shared/data --purifier velocity.safetensors \
        --compare sample.safetensors --results docs/results

Error: root mean squared distance, per standardised coordinate, between the purified state and the profile (the
inverse-propensity mean of what the user clicked outside the window), for users kept out of pretraining. A spread that
can be used is as large as the error and orders users by it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kuaifair_env.observations import observed_states
from kuaifair_env.splits import held_out_users

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from scipy.stats import spearmanr
from worlds import argument_parser, open_worlds, short_name, write_page

from dsrm.model import DSRM
from dsrm.purifier import ConditionBuilder, load_purifier
from dsrm.targets import PooledPositives, sample_windows
from hrl_policies.study.runner import single_threaded
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.world import World

LENGTHS = (2, 5, 10, 20, 50)
MIN_CLICKS = 5
USERS = 1_500
SAMPLES = 16


def evaluated_users(world: World, clicks: np.ndarray) -> np.ndarray:
    """Returns held-out users with a window of the greatest length and enough clicks for a profile."""
    exposures = np.bincount(world.data.train.users, minlength=len(world.data.users))
    enough = np.flatnonzero(exposures >= max(LENGTHS) + MIN_CLICKS)
    return np.intersect1d(held_out_users(world.data), np.intersect1d(enough, np.flatnonzero(clicks)))[:USERS]


def rows(name: str, path: Path, world: World) -> list[str]:
    """Returns a line for each length of window."""
    model = load_purifier(path)
    assert isinstance(model, DSRM)
    model.bind(world)
    builder = ConditionBuilder.of_world(world)
    positives = PooledPositives(builder, world.data.train, len(world.data.users))
    users = evaluated_users(world, positives.counts)
    found = []
    for length in LENGTHS:
        rng = np.random.default_rng(0)
        windows = sample_windows(
            world.data.train, len(world.data.users), users, rng, min_length=length, max_length=length
        )
        inside = windows.clicks.sum(axis=1)
        some = np.flatnonzero((inside > 0) & (positives.counts[users] - inside >= MIN_CLICKS))
        window = windows.take(some)
        states = observed_states(world, window)
        scale = states.std(axis=0)
        everyone = np.ones(len(users), np.bool_)
        truth = positives.outside(windows, users, everyone)[some]

        def size(differences: FloatArray, scale: FloatArray = scale) -> FloatArray:
            return np.asarray(np.sqrt(((differences / scale) ** 2).mean(axis=-1)), np.float32)

        error, raw = size(truth - model.purify(states, window)), size(truth - states)
        spread = size(model.posterior(states, window, SAMPLES).std(axis=0, ddof=1))
        order = spearmanr(error, spread).statistic
        found.append(
            f"| {name} | {length} | {len(some)} | {raw.mean():.2f} | {error.mean():.2f} | {spread.mean():.2f} "
            f"| {order:+.2f} |"
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--purifier", type=Path, required=True, help="a DSRM model")
    parser.add_argument("--compare", type=Path, help="another, for example with prediction='sample'")
    arguments = parser.parse_args()
    single_threaded()
    world = open_worlds(arguments.world, arguments.data).train
    paths = [arguments.purifier] + ([arguments.compare] if arguments.compare else [])
    lines = [
        f"### {world.data.provenance.name}: spread of the posterior",
        "",
        "| model | exposures in the window | users | error of the raw state | error | spread | rank correlation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for path in paths:
        model = load_purifier(path)
        assert isinstance(model, DSRM)
        lines += rows(f"{path.stem}, predicts {model.describe()['config']['denoiser']['prediction']}", path, world)
    lines += [
        "",
        f"Data: {world.data.provenance.name} ({world.data.provenance.origin}), hash {world.data.data_hash}; users kept "
        "out of pretraining; errors and spreads per standardised coordinate, against the profile outside the window.",
        "",
        f"Made by: `python benchmarks/posterior_spread.py {arguments.world} --purifier FILE --compare FILE`.",
    ]
    write_page(arguments.results, f"posterior_spread_{short_name(arguments.world)}.md", "\n".join(lines))


if __name__ == "__main__":
    main()
