"""Agents, controls, method zoo and studies for fair interactive recommendation, and the ``kuaifair`` command.

Every method is trained, kept and evaluated by the same calls, DSRM-HRL like A2C or TD3:

    from hrl_policies import HierarchicalPPO, evaluate, make_evaluation_env, make_training_env

    train = make_training_env("dsrm-hrl", "KuaiFair-Toy-v0", n_envs=64, seed=11)
    agent = HierarchicalPPO("RankingPolicy", train, seed=11).learn(50_000)
    print(evaluate(agent, make_evaluation_env("dsrm-hrl", "KuaiFair-Toy-v0")).table())

What is there:

* sessions of a method: :func:`make_training_env`, :func:`make_evaluation_env`; both worlds of a study:
  :func:`load_worlds`;
* the paper's agent: :class:`HierarchicalPPO` with :class:`RankingPolicy` (DSRM-HRL) or :class:`HierarchicalPolicy`;
* baselines: :class:`BCQ`, :class:`DORL`, :class:`DNaIR`, :class:`MOFIR`, :class:`SAC4IR`, and any agent of
  Stable-Baselines3;
* controls, which learn nothing by reinforcement: :class:`QuotaGreedy`, :class:`SessionQuota`, :class:`BeliefQuota` and
  others;
* :mod:`hrl_policies.ope`: what a policy is worth by logged answers alone, :func:`evaluate_on_random_log` and
  :func:`fitted_q_evaluation`;
* :class:`FairnessCallback`: evaluates an agent of Stable-Baselines3 while it trains, and keeps the best;
* :class:`GuardCallback`: keeps what an agent learned only where it is shown to be better than the start;
* every method by name, with source, settings and search space: :func:`all_methods`, :func:`load_settings`,
  :func:`register_method` for one of your own;
* an agent that is trained already: :func:`load_pretrained`;
* runs and studies: :func:`plan_run` and :func:`train`, :func:`read_study` and :func:`run_study`; tuning: :func:`tune`.

Importing this package imports neither torch nor Stable-Baselines3; names are looked up when they are first used. The
command line is in :mod:`hrl_policies.cli.main`, and everything about studies in :mod:`hrl_policies.study`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuaifair_env.lazy_names import lazy_names

if TYPE_CHECKING:
    from hrl_policies.bcq import BCQ, DiscreteBCQ
    from hrl_policies.belief_controls import BeliefQuota, ItemQuota
    from hrl_policies.common.transition_sources import LogReading, log_transitions
    from hrl_policies.controls import (
        Control,
        GreedyCTR,
        MeanToleranceQuota,
        Oracle,
        QualityOracle,
        QuotaGreedy,
        RandomSlates,
        SessionQuota,
        ToleranceQuota,
    )
    from hrl_policies.dnair import DNaIR
    from hrl_policies.dorl import DORL
    from hrl_policies.fairness_callback import FairnessCallback
    from hrl_policies.guard import GuardCallback
    from hrl_policies.hrl_ppo import (
        LITERAL,
        HierarchicalPolicy,
        HierarchicalPPO,
        HierarchySettings,
        RankingPolicy,
        RankingSettings,
    )
    from hrl_policies.mofir import MOFIR
    from hrl_policies.ope import (
        RandomLog,
        SlateMarginals,
        estimate_click_rate,
        evaluate_on_random_log,
        fitted_q_evaluation,
        log_sessions,
    )
    from hrl_policies.pretrained import PretrainedAgent, load_pretrained, pretrained_agents
    from hrl_policies.sac4ir import SAC4IR, DiscreteSAC
    from hrl_policies.study import (
        ResultTable,
        RunConfig,
        RunRecord,
        RunResult,
        StudyError,
        StudyResult,
        StudySpec,
        check_study,
        evaluate_run,
        load_policy,
        load_run,
        plan_run,
        read_study,
        result_tables,
        resume,
        run_study,
        single_threaded,
        train,
    )
    from hrl_policies.study.engines import InProcessEngine, LocalEngine, RayEngine
    from hrl_policies.study.tuning import TuningPlan, tune
    from hrl_policies.unit_norm import QueryNoise, UnitNormPolicy
    from hrl_policies.worlds import WorldPair, cached_purifier, load_worlds
    from hrl_policies.zoo import (
        METHODS,
        BuildContext,
        MethodSettings,
        MethodSpec,
        all_methods,
        load_settings,
        register_method,
        sb3_algorithm,
        search_space,
    )
    from hrl_policies.zoo.registry import make_evaluation_env, make_training_env
    from kuaifair_env import evaluate, serve

__all__ = [
    "BCQ",
    "DORL",
    "LITERAL",
    "METHODS",
    "MOFIR",
    "SAC4IR",
    "BeliefQuota",
    "BuildContext",
    "Control",
    "DNaIR",
    "DiscreteBCQ",
    "DiscreteSAC",
    "FairnessCallback",
    "GreedyCTR",
    "GuardCallback",
    "HierarchicalPPO",
    "HierarchicalPolicy",
    "HierarchySettings",
    "InProcessEngine",
    "ItemQuota",
    "LocalEngine",
    "LogReading",
    "MeanToleranceQuota",
    "MethodSettings",
    "MethodSpec",
    "Oracle",
    "PretrainedAgent",
    "QualityOracle",
    "QueryNoise",
    "QuotaGreedy",
    "RandomLog",
    "RandomSlates",
    "RankingPolicy",
    "RankingSettings",
    "RayEngine",
    "ResultTable",
    "RunConfig",
    "RunRecord",
    "RunResult",
    "SessionQuota",
    "SlateMarginals",
    "StudyError",
    "StudyResult",
    "StudySpec",
    "ToleranceQuota",
    "TuningPlan",
    "UnitNormPolicy",
    "WorldPair",
    "all_methods",
    "cached_purifier",
    "check_study",
    "estimate_click_rate",
    "evaluate",
    "evaluate_on_random_log",
    "evaluate_run",
    "fitted_q_evaluation",
    "load_policy",
    "load_pretrained",
    "load_run",
    "load_settings",
    "load_worlds",
    "log_sessions",
    "log_transitions",
    "make_evaluation_env",
    "make_training_env",
    "plan_run",
    "pretrained_agents",
    "read_study",
    "register_method",
    "result_tables",
    "resume",
    "run_study",
    "sb3_algorithm",
    "search_space",
    "serve",
    "single_threaded",
    "train",
    "tune",
]

_HOMES = {
    "hrl_policies.bcq": ("BCQ", "DiscreteBCQ"),
    "hrl_policies.belief_controls": ("BeliefQuota", "ItemQuota"),
    "hrl_policies.common.transition_sources": ("LogReading", "log_transitions"),
    "hrl_policies.controls": (
        "Control",
        "GreedyCTR",
        "MeanToleranceQuota",
        "Oracle",
        "QualityOracle",
        "QuotaGreedy",
        "RandomSlates",
        "SessionQuota",
        "ToleranceQuota",
    ),
    "hrl_policies.dnair": ("DNaIR",),
    "hrl_policies.dorl": ("DORL",),
    "hrl_policies.fairness_callback": ("FairnessCallback",),
    "hrl_policies.guard": ("GuardCallback",),
    "hrl_policies.hrl_ppo": (
        "HierarchicalPPO",
        "HierarchicalPolicy",
        "HierarchySettings",
        "LITERAL",
        "RankingPolicy",
        "RankingSettings",
    ),
    "hrl_policies.mofir": ("MOFIR",),
    "hrl_policies.ope": (
        "RandomLog",
        "SlateMarginals",
        "estimate_click_rate",
        "evaluate_on_random_log",
        "fitted_q_evaluation",
        "log_sessions",
    ),
    "hrl_policies.pretrained": ("PretrainedAgent", "load_pretrained", "pretrained_agents"),
    "hrl_policies.sac4ir": ("DiscreteSAC", "SAC4IR"),
    "hrl_policies.study": (
        "ResultTable",
        "RunConfig",
        "RunRecord",
        "RunResult",
        "StudyError",
        "StudyResult",
        "StudySpec",
        "check_study",
        "evaluate_run",
        "load_policy",
        "load_run",
        "plan_run",
        "read_study",
        "result_tables",
        "resume",
        "run_study",
        "single_threaded",
        "train",
    ),
    "hrl_policies.study.engines": ("InProcessEngine", "LocalEngine", "RayEngine"),
    "hrl_policies.study.tuning": ("TuningPlan", "tune"),
    "hrl_policies.unit_norm": ("QueryNoise", "UnitNormPolicy"),
    "hrl_policies.worlds": ("WorldPair", "cached_purifier", "load_worlds"),
    "hrl_policies.zoo": (
        "BuildContext",
        "METHODS",
        "MethodSettings",
        "MethodSpec",
        "all_methods",
        "load_settings",
        "register_method",
        "sb3_algorithm",
        "search_space",
    ),
    "hrl_policies.zoo.registry": ("make_evaluation_env", "make_training_env"),
    "kuaifair_env": ("evaluate", "serve"),
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
