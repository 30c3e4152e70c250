"""Studies: what was run over which seeds and users, and what may be concluded from it.

A study in a file is read (:func:`read_study`), checked (:func:`check_study`) and run (:func:`run_study`), in this
process or by another engine (:mod:`hrl_policies.study.engines`). :func:`planned_runs` lists its runs,
:func:`plan_run` makes any other.
"""

from hrl_policies.study.checks import check_study
from hrl_policies.study.config import STUDY_SEEDS, PurifierIdentity, RunConfig, plan_run, run_folder
from hrl_policies.study.labels import RunRecord, stored_records
from hrl_policies.study.loading import load_policy, purifier_of
from hrl_policies.study.outputs import draw_study, study_tables, write_tables
from hrl_policies.study.progress import StudyCallback
from hrl_policies.study.report import write_report
from hrl_policies.study.runner import RunResult, evaluate_run, resume, single_threaded, train
from hrl_policies.study.runs import StudyResult, run_study
from hrl_policies.study.spec import StudyError, StudySpec, planned_runs, read_study
from hrl_policies.study.store import StoredRun, load_run, stored_runs
from hrl_policies.study.tables import ResultTable, result_tables, write_records

__all__ = [
    "STUDY_SEEDS",
    "PurifierIdentity",
    "ResultTable",
    "RunConfig",
    "RunRecord",
    "RunResult",
    "StoredRun",
    "StudyCallback",
    "StudyError",
    "StudyResult",
    "StudySpec",
    "check_study",
    "draw_study",
    "evaluate_run",
    "load_policy",
    "load_run",
    "plan_run",
    "planned_runs",
    "purifier_of",
    "read_study",
    "result_tables",
    "resume",
    "run_folder",
    "run_study",
    "single_threaded",
    "stored_records",
    "stored_runs",
    "study_tables",
    "train",
    "write_records",
    "write_report",
    "write_tables",
]
