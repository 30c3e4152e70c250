"""What forgetting is worth to a belief where tastes drift, and what it costs where they stay.

    python benchmarks/drift.py kuairand --data DATA --results docs/results
    python benchmarks/drift.py KuaiFair-KuaiRandTwin-v0 --results docs/results

Writes a section of drift.md. All rows but QuotaGreedy and the Oracle rank by DSRM-HRL's belief, frozen (nothing is kept
from session to session), with any number of popular items inside the bound. They differ in how fast they forget.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

from manager_room import GREEDY, ORACLE, SEED, UNTRAINED, Row, evaluated, table, untrained
from worlds import argument_parser, open_worlds, start_of_dsrm_hrl, write_section

from dsrm.belief import evidence_kept
from dsrm.candidates import CandidatePurifier
from dsrm.session_evidence import SessionEvidence
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import Oracle, QuotaGreedy
from hrl_policies.study import single_threaded
from hrl_policies.worlds import WorldPair
from kuaifair_env import SessionConfig
from kuaifair_env.batch import SessionBatch

DRIFT = 15.0
FORGETS_AS_AT = (5.0, DRIFT, 45.0)


class ForgettingQuota(BeliefQuota):
    """BeliefQuota that forgets as fast as tastes would drift at some rate, whatever they do.

    Args:
        start: DSRM-HRL's purifier: its click scorer, and where its scales begin.
        drift: Slates after which a taste would correlate by .5 with that before.
    """

    def __init__(self, start: CandidatePurifier, drift: float) -> None:
        super().__init__(start.scorer, scales=start.scales)
        self._kept = evidence_kept(drift)

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`~hrl_policies.controls.Control`."""
        super().bind(batch)
        self._evidence = SessionEvidence(self.belief, self._scorer, batch, kept=self._kept)


def rows(start: CandidatePurifier, pair: WorldPair, config: SessionConfig, n_users: int) -> list[Row]:
    """Returns the rows of sessions in which tastes drift, or stay; what forgets nothing comes first."""
    remembers = BeliefQuota(start.scorer, scales=start.scales)
    return [
        evaluated("BeliefQuota, items by features: forgets nothing", remembers, pair.test, config, n_users),
        *(
            evaluated(f"forgets as if drift were {drift:g}", ForgettingQuota(start, drift), pair.test, config, n_users)
            for drift in FORGETS_AS_AT
        ),
        evaluated(UNTRAINED, untrained(start, pair, config), pair.test, config, n_users, start),
        evaluated(GREEDY, QuotaGreedy(start.scorer), pair.test, config, n_users),
        evaluated(ORACLE, Oracle(), pair.test, config, n_users),
    ]


def page(pair: WorldPair, start: CandidatePurifier, arguments: Namespace) -> str:
    """Returns the page of a world."""
    lines = [f"# {pair.name}", ""]
    for drift in (DRIFT, None):
        for repeats in ("allow", "forbid"):
            config = SessionConfig(action_mode="slate", repeats=cast(Any, repeats), drift=drift)
            title = "Tastes stay" if drift is None else f"Drift {drift:g}"
            lines += [f"## {title}, repeats {repeats}", "", *table(rows(start, pair, config, arguments.users)), ""]
    data = pair.test.data
    lines += [
        "## Notes",
        "",
        f"- {arguments.users} users of the test world, one session each, seed {SEED}, Max Len 30, K 10; 95 % bootstrap "
        "intervals over users, differences paired. † knows what no agent is told.",
        "- DSRM-HRL reads from the session's settings how fast tastes drift, and forgets as fast; where they stay it "
        "forgets nothing. It is not told what they are.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/drift.py {arguments.world} --users {arguments.users} --data DATA --results "
        "docs/results.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--users", type=int, default=1_000, help="users of the test world")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    start = start_of_dsrm_hrl(pair)
    write_section(arguments.results, "drift.md", page(pair, start, arguments))


if __name__ == "__main__":
    main()
