"""Compares settings of an agent on validation users of the training world; the test world is never asked.

    python benchmarks/agent_settings.py a2c --env KuaiFair-Toy-v0 --steps 300000 \
        --try "learning_rate=0.0007" --try "learning_rate=0.003 policy_kwargs.log_std_init=0"

A fifth of the users of the training world is kept out of training and meets the agent afterwards, in the same world.
Each ``--try`` is one line of overrides of the shipped settings; the empty one is the shipped settings themselves.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from hrl_policies.study import plan_run, single_threaded, train
from hrl_policies.worlds import WorldPair, evaluation_users, load_worlds
from hrl_policies.zoo import learners, parse_overrides
from kuaifair_env.batch import SessionConfig
from kuaifair_env.worlds import World

COLUMNS = ("len", "r_each", "r_cum", "ad", "violation_rate", "signed_gap")


def validation_pair(name: str, world: World) -> WorldPair:
    """Divides the users of a training world: four fifths to learn from, a fifth to judge on."""
    kept = world.user_rows(evaluation_users(world, len(world.users) // 5))
    learners_ = world.users[~(world.users[:, None] == kept[None]).any(axis=1)]
    return WorldPair(name, replace(world, users=learners_), replace(world, split="test", users=kept))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=learners())
    parser.add_argument("--env", default="KuaiFair-Toy-v0")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--max-len", type=int, default=30)
    parser.add_argument("--try", dest="tries", action="append", help="overrides, separated by blanks")
    arguments = parser.parse_args()
    single_threaded()
    pair = validation_pair(arguments.env, load_worlds(arguments.env).train)
    compare(
        arguments.method, pair, arguments.tries or [""], arguments.seeds, arguments.steps, arguments.max_len
    )


def compare(
    method: str, pair: WorldPair, tries: list[str], seeds: list[int], steps: int, max_len: int
) -> None:
    """Trains with each line of overrides and each seed, and prints what the validation users saw."""
    print(" ".join(f"{column:>14}" for column in ("seconds", *COLUMNS)), " settings")
    for line in tries:
        for seed in seeds:
            overrides = parse_overrides(line.split())
            config = plan_run(
                method,
                pair.name,
                seed=seed,
                session=SessionConfig(max_len=max_len),
                total_steps=steps,
                n_envs=overrides.pop("n_envs", None),
                overrides=overrides,
                users=500,
                episodes_per_user=10,
            )
            result = train(config, pair)
            assert result.evaluation is not None
            summary = result.evaluation.summary()
            figures = (result.training_seconds, *(summary[column] for column in COLUMNS))
            print(" ".join(f"{figure:>14.3f}" for figure in figures), f" seed {seed} {line}", flush=True)


if __name__ == "__main__":
    main()
