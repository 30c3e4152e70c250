"""What a belief knows of users it was not fitted on, how sure it is of it, and what that earns beside two controls.

Run: python examples/belief_and_coverage.py [gaussian | mixture | belief | belief_regression]

An 80 % interval should hold the truth in about 80 % of cases. The error is that of tastes ``w_u``, in log-odds. A
belief that predicts better than its closed form and does not earn more has not helped a recommender.
"""

import sys

import numpy as np
from scipy.stats import norm

from dsrm import BeliefPurifier, load_purifier
from dsrm.preference import ClosedForm, PreferenceModel
from dsrm.preference_sessions import KnownPreferences, PreferenceSessions
from hrl_policies import BeliefQuota, QuotaGreedy, SessionQuota, cached_purifier, load_worlds, single_threaded
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

INSIDE = norm.ppf(0.9)


def main(mode: str = "gaussian") -> None:
    single_threaded()
    worlds = load_worlds("KuaiFair-Toy-v0")
    purifier = load_purifier(cached_purifier(worlds.train, mode, progress=True))
    assert isinstance(purifier, BeliefPurifier)
    # Sessions of training users whom nothing was fitted to, and whose preferences are known by construction.
    source = PreferenceSessions(worlds.train, worlds.scorer)
    rng = np.random.default_rng(0)
    sessions = source.known(rng.choice(source.split()[1], 8_192), rng)
    print(f"{'belief':<22}{'error':>8}{'level held':>12}{'tastes held':>13}")
    for name, model in {"closed form": ClosedForm(), mode: purifier.preference}.items():
        error, level, tastes = coverage(model, sessions)
        print(f"{name:<22}{error:>8.3f}{level:>12.2f}{tastes:>13.2f}")
    test = KuaiFairVecEnv(worlds.test, SessionConfig(action_mode="slate"), 100, seed=0)
    agents = {
        "QuotaGreedy": QuotaGreedy(worlds.scorer),
        "SessionQuota": SessionQuota(worlds.scorer),
        "BeliefQuota, closed form": BeliefQuota(worlds.scorer, scales=purifier.scales),
        f"BeliefQuota, {mode}": BeliefQuota(worlds.scorer, scales=purifier.scales, preference=purifier.preference),
    }
    print(f"\n{'test world':<30}{'Len':>7}{'R_cum':>8}{'violations':>12}")
    for name, agent in agents.items():
        summary = evaluate(agent, test).summary()
        print(f"{name:<30}{summary['len']:>7.2f}{summary['r_cum']:>8.2f}{summary['violation_rate']:>12.2f}")


def coverage(model: PreferenceModel, sessions: list[KnownPreferences]) -> tuple[float, float, float]:
    """Returns the root mean square error of tastes, and how often 80 % intervals hold levels and tastes."""
    rows = []
    for session in sessions:
        means, deviations = model.moments(session.evidence)
        misses = (session.preferences - means).numpy()
        inside = np.abs(misses) < INSIDE * deviations.numpy()
        rows.append((np.square(misses[:, 1:]).mean(), inside[:, 0].mean(), inside[:, 1:].mean()))
    square, level, tastes = np.mean(rows, axis=0)
    return float(np.sqrt(square)), float(level), float(tastes)


if __name__ == "__main__":
    main(*sys.argv[1:2])
