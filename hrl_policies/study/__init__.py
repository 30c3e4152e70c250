"""Studies: what was run over which seeds and users, and what may be concluded from it."""

from hrl_policies.study.config import STUDY_SEEDS, PurifierIdentity, RunConfig, plan_run
from hrl_policies.study.plan import cell_folder, run_study, stored_records, study_cells
from hrl_policies.study.records import RunRecord
from hrl_policies.study.result_table import ResultTable
from hrl_policies.study.runner import (
    RunResult,
    judge,
    load_policy,
    purifying_of,
    resume,
    single_threaded,
    train,
)
from hrl_policies.study.store import StoredRun, load_run
from hrl_policies.study.tables import result_tables, write_records

__all__ = [
    "STUDY_SEEDS",
    "PurifierIdentity",
    "ResultTable",
    "RunConfig",
    "RunRecord",
    "RunResult",
    "StoredRun",
    "cell_folder",
    "judge",
    "load_policy",
    "load_run",
    "plan_run",
    "purifying_of",
    "result_tables",
    "resume",
    "run_study",
    "single_threaded",
    "stored_records",
    "study_cells",
    "train",
    "write_records",
]
