"""What was tried to make DSRM-HRL earn more than the belief it starts from; writes worker_attempts.md.

    python benchmarks/worker_attempts.py kuairand --data DATA --store STORE --results docs/results
    python benchmarks/worker_attempts.py KuaiFair-KuaiRandTwin-v0 --store STORE --results docs/results

Every attempt trains the same policy from the same start in the randomised training world, whose users' true preferences
may be read there, and is then compared with its start in other sessions of that world and in the test world. Nothing is
chosen by the test world. What the store holds is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from numpy.typing import NDArray
from serving import N_ENVS, users_of
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from worlds import argument_parser, cell, open_worlds, short_name, start_of_dsrm_hrl, write_section

from dsrm.candidates import CANDIDATE_FEATURES, SESSION_FEATURES, CandidatePurifier
from hrl_policies.guard import validation_sessions
from hrl_policies.hrl_ppo import HierarchicalPPO, RankingPolicy
from hrl_policies.hrl_ppo.ranking import CandidateRanker
from hrl_policies.study import single_threaded
from hrl_policies.worlds import SEED_LIMIT, WorldPair, purified_sessions, training_sessions
from hrl_policies.zoo.settings import shipped_settings
from kuaifair_env import SessionConfig, evaluate, serve
from kuaifair_env.files import write_text_atomically
from kuaifair_env.intervals import crossed_mean, interval_of
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.randomised_worlds import estimated_randomisation
from kuaifair_env.sb3 import KuaiFairVecEnv

SEEDS = (11, 15, 19)
REPORTED = (SEED_LIMIT - 7, 768)
"""Seed and number of the sessions of the training world that attempts are compared in."""
CHOOSING, CHOSEN_SESSIONS, SESSIONS_PER_UNIT = SEED_LIMIT - 8, 384, 16
IMITATION_STEPS, IMITATION_EVERY, IMITATION_EPOCHS, STATES_PER_BATCH = 800, 4, 6, 512
SHARES = (1.0, 0.5, 0.25, 0.0)
BONUSES = (-0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
GENERATIONS, DIRECTIONS, SESSIONS_OF_A_SEARCH, NOISE = 12, 6, 128, 0.05
SERVING_ORDERS = 3
CLOCK, DEVIATION = SESSION_FEATURES.index("clock"), CANDIDATE_FEATURES.index("deviation")

Values = NDArray[np.float64]


class LinearRanker(CandidateRanker):
    """A worker that also adds a linear function of a candidate's features, and another one times the session's clock.

    Args:
        worker: The start.
        weights: ``float32 (2, F)``, of features as networks read them: at all times, and times the clock.
    """

    def __init__(self, worker: CandidateRanker, weights: Tensor) -> None:
        super().__init__(worker.of_candidate.out_features, worker.temperature.item())
        self.load_state_dict(worker.state_dict())
        self.weights = weights

    def logits(self, features: Tensor, session: Tensor, present: Tensor) -> Tensor:
        """See :class:`~hrl_policies.hrl_ppo.ranking.CandidateRanker`."""
        now = self.weights[0] + session[:, CLOCK, None] * self.weights[1]
        return super().logits(features, session, present) + torch.einsum("bcf,bf->bc", features / self.scales, now)


@dataclass(frozen=True)
class Setting:
    """A world, what agents in it start from, and how far training users deviate: a share of the default scales."""

    pair: WorldPair
    config: SessionConfig
    start: CandidatePurifier
    steps: int | None
    share: float = 1.0

    @property
    def randomisation(self) -> Randomisation | None:
        """How far training users deviate."""
        return estimated_randomisation(self.pair.train).scaled(self.share) if self.share else None

    def agent(self, seed: int) -> HierarchicalPPO:
        """Returns DSRM-HRL before its training, over training sessions."""
        settings = shipped_settings("dsrm-hrl", self.pair.name)
        hyperparameters = {name: value for name, value in settings.hyperparameters.items() if name != "guard"}
        env = training_sessions(
            self.pair.train,
            self.config,
            settings.n_envs,
            seed,
            randomisation=self.randomisation,
            purifier=self.start,
        )
        return HierarchicalPPO(settings.policy, env, seed=seed, device="cpu", click_scorer=None, **hyperparameters)

    def in_training(self, agent: HierarchicalPPO, seed: int, n_sessions: int) -> Values:
        """Returns mean R_cum of units of sessions of the training world that share deviations, frozen."""
        sessions = validation_sessions(
            self.pair.train, self.config, seed, randomisation=self.randomisation, purifier=self.start
        )
        n_users = min(n_sessions, len(self.pair.train.users))
        result = evaluate(agent, sessions, episodes_per_user=n_sessions // n_users, n_users=n_users, seed=seed)
        rewards = np.asarray(result.sessions.return_, np.float64)
        return np.asarray([unit.mean() for unit in np.array_split(rewards, len(rewards) // SESSIONS_PER_UNIT)])

    def in_test(self, agent: HierarchicalPPO) -> Values:
        """Returns R_cum of users of the test world, frozen."""
        env = purified_sessions(self.pair.test, self.config, 2 * N_ENVS, 0, self.start)
        sessions = evaluate(agent, env, users_of(self.pair)).sessions
        return np.asarray(sessions.return_, np.float64)[np.argsort(sessions.user_ids, kind="stable")]


def train_by_ppo(setting: Setting, agent: HierarchicalPPO, seed: int) -> str:
    """Trains as ``kuaifair train`` does, without the guard."""
    steps = setting.steps or shipped_settings("dsrm-hrl", setting.pair.name).total_steps
    agent.learn(steps)
    return f"{steps:,} steps"


def train_by_imitation(setting: Setting, agent: HierarchicalPPO, seed: int) -> str:
    """Fits the worker's log-odds to the true click probabilities of candidates that its start meets, by log loss."""
    features, session, present, clicks = (torch.cat(parts) for parts in zip(*_lessons(agent), strict=True))
    worker = cast(RankingPolicy, agent.policy).worker
    networks = nn.ModuleList([worker.of_candidate, worker.of_session, worker.rest])
    optimizer = torch.optim.Adam(networks.parameters(), 3e-3)
    rounds = IMITATION_EPOCHS * (len(features) // STATES_PER_BATCH)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 - done / rounds)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(IMITATION_EPOCHS):
        order = torch.randperm(len(features), generator=generator)
        for rows in order.split(STATES_PER_BATCH)[: len(features) // STATES_PER_BATCH]:
            log_odds = worker.logits(features[rows], session[rows], present[rows])
            loss = nn.functional.binary_cross_entropy_with_logits(log_odds[present[rows]], clicks[rows][present[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return f"{len(features):,} states"


def train_by_half_imitation(setting: Setting, agent: HierarchicalPPO, seed: int) -> str:
    """Imitation, of which half is added."""
    said = train_by_imitation(setting, agent, seed)
    last = cast(nn.Linear, cast(RankingPolicy, agent.policy).worker.rest[-1])
    with torch.no_grad():
        last.weight.mul_(0.5)
        last.bias.mul_(0.5)
    return said


def _lessons(agent: HierarchicalPPO) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields features, sessions, what is present, and true click probabilities, in sessions that the agent explores."""
    env = cast(VecEnv, agent.get_env())
    batch = cast(KuaiFairVecEnv, env.unwrapped).batch
    observation = cast(dict[str, NDArray[Any]], env.reset())
    for step in range(IMITATION_STEPS):
        if step % IMITATION_EVERY == 0:
            candidates = observation["candidates"]
            clicks = np.take_along_axis(batch.simulator.expected_catalogue(), np.maximum(candidates, 0), axis=1)
            arrays = observation["features"], observation["state"], candidates >= 0, clicks
            yield cast(Any, tuple(torch.from_numpy(array.copy()) for array in arrays))
        actions, _ = agent.predict(observation, deterministic=False)
        observation = cast(dict[str, NDArray[Any]], env.step(actions)[0])


def choose_bonus(setting: Setting, agent: HierarchicalPPO, seed: int) -> str:
    """Adds a multiple of the belief's spread of a candidate, which fades over the session: one step of lookahead.

    The multiple is the one of the best R_cum in sessions of the training world.
    """
    policy = cast(RankingPolicy, agent.policy)
    start, rewards = policy.worker, {}
    for bonus in BONUSES:
        policy.worker = _with_bonus(start, bonus)
        rewards[bonus] = setting.in_training(agent, CHOOSING - seed, CHOSEN_SESSIONS).mean()
    best = max(rewards, key=lambda bonus: float(rewards[bonus]))
    policy.worker = _with_bonus(start, best)
    return f"{best:+g} deviations"


def _with_bonus(start: CandidateRanker, bonus: float) -> LinearRanker:
    weights = torch.zeros(2, len(CANDIDATE_FEATURES))
    weights[:, DEVIATION] = bonus * torch.tensor([1.0, -1.0])
    return LinearRanker(start, weights)


def search_directly(setting: Setting, agent: HierarchicalPPO, seed: int) -> str:
    """Searches linear functions of the features by R_cum alone: differences of pairs along random directions.

    Source: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning", 2017.
    """
    policy = cast(RankingPolicy, agent.policy)
    start, generator = policy.worker, torch.Generator().manual_seed(seed)
    weights = torch.zeros(2, len(CANDIDATE_FEATURES))
    mean = torch.zeros_like(weights)
    length = NOISE * weights.numel() ** 0.5

    def reward(tried: Tensor, sessions_seed: int) -> float:
        policy.worker = LinearRanker(start, tried)
        return float(setting.in_training(agent, sessions_seed, SESSIONS_OF_A_SEARCH).mean())

    for generation in range(GENERATIONS):
        slope = torch.zeros_like(weights)
        for pair in range(DIRECTIONS):
            direction = torch.randn(weights.shape, generator=generator)
            sessions_seed = CHOOSING - seed - 1_000 * (1 + generation * DIRECTIONS + pair)
            gains = [reward(weights + sign * NOISE * direction, sessions_seed) for sign in (1.0, -1.0)]
            slope += (gains[0] - gains[1]) * direction
        weights = weights + length * (1.0 - generation / GENERATIONS) * slope / slope.norm().clamp_min(1e-9)
        mean += weights / GENERATIONS
    policy.worker = LinearRanker(start, mean)
    return f"{2 * GENERATIONS * DIRECTIONS * SESSIONS_OF_A_SEARCH:,} sessions"


ATTEMPTS: Mapping[str, Callable[[Setting, HierarchicalPPO, int], str]] = {
    "PPO": train_by_ppo,
    "imitation of true preferences": train_by_imitation,
    "half of that": train_by_half_imitation,
    "a bonus for what is uncertain": choose_bonus,
    "direct search": search_directly,
}


def attempt(name: str, setting: Setting, seed: int, place: Path) -> dict[str, Any]:
    """Returns what one attempt with one seed gave, from the store if it was made before."""
    if not place.exists():
        agent = setting.agent(seed)
        before = time.process_time()
        said = ATTEMPTS[name](setting, agent, seed)
        seconds = time.process_time() - before
        found = _evaluated(setting, agent) | {"trained": said, "seconds": seconds}
        write_text_atomically(place, json.dumps(found))
    stored: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    print(f"{place.stem}: {stored['trained']}", flush=True)
    return stored


def _evaluated(setting: Setting, agent: HierarchicalPPO) -> dict[str, Any]:
    training = setting.in_training(agent, *REPORTED)
    return {"training": training.tolist(), "test": setting.in_test(agent).tolist()}


def frozen_rows(setting: Setting, store: Path) -> Iterator[str]:
    """Yields the lines of the table of frozen agents."""
    start = _start(setting, store)
    yield "| attempt | trained on | training world: R_cum less the start's | test world: R_cum less the start's | s |"
    yield "|---|---|---:|---:|---:|"
    yield f"| none: the start | | {start['training'].mean():.2f} | {start['test'].mean():.2f} | |"
    for name in ATTEMPTS:
        runs, cells = _compared(name, setting, start, store)
        trained = ", ".join(dict.fromkeys(run["trained"] for run in runs))
        yield f"| {name} | {trained} | {' | '.join(cells)} | {np.mean([run['seconds'] for run in runs]):.0f} |"


def _start(setting: Setting, store: Path) -> dict[str, Values]:
    """Returns what the start earns in both worlds, from the store if it was made before."""
    reference = store / "start.json"
    if not reference.exists():
        write_text_atomically(reference, json.dumps(_evaluated(setting, setting.agent(SEEDS[0]))))
    return {name: np.asarray(values) for name, values in json.loads(reference.read_text(encoding="utf-8")).items()}


def _compared(
    name: str, setting: Setting, start: Mapping[str, Values], store: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns what an attempt gave with all seeds, and its differences to the start in both worlds."""
    runs = [attempt(name, setting, seed, store / f"{name.replace(' ', '-')}-{seed}.json") for seed in SEEDS]
    stacked = {world: np.stack([np.asarray(run[world]) for run in runs]) for world in ("training", "test")}
    return runs, [_difference(rewards - start[world]) for world, rewards in stacked.items()]


def _difference(differences: Values) -> str:
    return cell(interval_of(crossed_mean(differences)), sign=True)


def deviation_rows(setting: Setting, store: Path) -> Iterator[str]:
    """Yields the lines of the table of worlds whose users deviate less: what exploration and PPO are worth there."""
    titles = " | ".join(f"bonus {bonus:+g}" for bonus in BONUSES)
    yield f"| deviations of training users | the start | {titles} | PPO | PPO, in the test world |"
    yield "|---|---:|" + "---:|" * (len(BONUSES) + 2)
    for share in SHARES:
        of_share, place = replace(setting, share=share), store if share == 1.0 else store / f"share-{share:g}"
        place.mkdir(exist_ok=True)
        start = _start(of_share, place)
        _, of_ppo = _compared("PPO", of_share, start, place)
        bonuses = _bonuses(of_share, place, "training", start)
        yield f"| {share:g} | {start['training'].mean():.2f} | {' | '.join(bonuses + of_ppo)} |"
    start = _start(setting, store)
    bonuses = _bonuses(setting, store, "test", start)
    yield f"| the test world | {start['test'].mean():.2f} | {' | '.join(bonuses)} | | |"


def _bonuses(setting: Setting, store: Path, world: str, start: Mapping[str, Values]) -> list[str]:
    """Returns what each bonus for what is uncertain earns over the start, from the store if it was made before."""
    place = store / f"bonuses-{world}.json"
    if not place.exists():
        agent = setting.agent(SEEDS[0])
        policy = cast(RankingPolicy, agent.policy)
        worker, rewards = policy.worker, {}
        for bonus in BONUSES:
            policy.worker = _with_bonus(worker, bonus)
            played = setting.in_test(agent) if world == "test" else setting.in_training(agent, *REPORTED)
            rewards[f"{bonus:g}"] = played.tolist()
        write_text_atomically(place, json.dumps(rewards))
    stored = json.loads(place.read_text(encoding="utf-8"))
    return [_difference(np.asarray(stored[f"{bonus:g}"])[None] - start[world]) for bonus in BONUSES]


def serving_rows(setting: Setting, store: Path) -> Iterator[str]:
    """Yields the lines of the table of services: networks that stay at the start, and PPO on what is served."""
    users = users_of(setting.pair)
    rewards: dict[bool, list[Values]] = {}
    for learns in (False, True):
        for order in range(SERVING_ORDERS):
            agent = setting.agent(SEEDS[0])
            served = serve(
                agent if learns else agent.predict,
                purified_sessions(setting.pair.test, setting.config, N_ENVS, 0, setting.start),
                users,
                len(users),
                order=order,
                evaluate_others=False,
                folder=store / f"{'ppo' if learns else 'start'}-order-{order}",
            ).served.sessions
            rewards.setdefault(learns, []).append(
                np.asarray(served.return_, np.float64)[np.argsort(served.user_ids, kind="stable")]
            )
    stay, learned = (np.stack(rewards[learns]) for learns in (False, True))
    yield "| networks | orders | R_cum | less the first row |"
    yield "|---|---:|---:|---:|"
    yield f"| stay at their start | {SERVING_ORDERS} | {stay.mean():.2f} | |"
    yield f"| PPO on what is served | {SERVING_ORDERS} | {learned.mean():.2f} | {_difference(learned - stay)} |"


def page(setting: Setting, sections: Mapping[str, Mapping[str, list[str]]], arguments: Namespace) -> str:
    """Returns the page of a world."""
    data, option = setting.pair.test.data, " --data DATA" if arguments.data else ""
    lines = [f"# {setting.pair.name}", ""]
    for repeats, tables in sections.items():
        for title, table in tables.items():
            lines += [f"## Repeats {repeats}, {title}", "", *table, ""]
    return "\n".join(
        [
            *lines,
            "## Notes",
            "",
            "- All attempts train DSRM-HRL's policy from its start, `belief-quota-features`, in the randomised "
            f"training world, with seeds {', '.join(map(str, SEEDS))}. *PPO*: the zoo's settings without the guard. "
            "*Imitation*: log loss to the true click probabilities of candidates, in sessions that the start explores. "
            "*A bonus*: a multiple of the belief's spread of a candidate, falling to 0 at Max Len, chosen among "
            f"{', '.join(f'{bonus:g}' for bonus in BONUSES)}. *Direct search*: linear functions of a candidate's "
            "features and of the clock, by R_cum of sessions alone.",
            f"- Training world: {REPORTED[1]} sessions that nothing was chosen by, deviations shared by "
            f"{SESSIONS_PER_UNIT} sessions each. Test world: {len(users_of(setting.pair)):,} users, once each. "
            "Brackets: 95 % intervals of the mean for other seeds and other users or deviations. s: processor seconds "
            "of a training.",
            "- Training users who deviate less: every scale of the randomisation times a share, in training and in "
            "evaluation; R_cum of each row's own world, less its start's. 1 is the training world of all other tables, "
            "0 the response model of the log. A bonus has one row of sessions, as nothing is trained.",
            f"- Serving: the same users, {N_ENVS} at a time; the belief learns in both rows. Brackets: other orders "
            "and other users.",
            f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the "
            f"test world {setting.pair.test.fingerprint}.",
            f"- Made by: python benchmarks/worker_attempts.py {arguments.world}{option} --repeats "
            f"{' '.join(sections)} --store STORE --results docs/results.",
        ]
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder for what attempts gave")
    parser.add_argument("--repeats", nargs="+", choices=("allow", "forbid"), default=("allow", "forbid"))
    parser.add_argument("--steps", type=int, help="training steps of PPO; the zoo's where not given")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    start = start_of_dsrm_hrl(pair)
    sections: dict[str, dict[str, list[str]]] = {}
    for repeats in arguments.repeats:
        setting = Setting(
            pair, SessionConfig(action_mode="slate", repeats=repeats), start, cast("int | None", arguments.steps)
        )
        store = arguments.store / short_name(arguments.world) / repeats
        store.mkdir(parents=True, exist_ok=True)
        sections[repeats] = {
            "frozen": list(frozen_rows(setting, store)),
            "frozen, training users who deviate less": list(deviation_rows(setting, store)),
            "serving": list(serving_rows(setting, store)),
        }
    write_section(arguments.results, "worker_attempts.md", page(setting, sections, arguments))


if __name__ == "__main__":
    main()
