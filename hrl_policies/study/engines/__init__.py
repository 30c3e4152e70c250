"""Engines: where the runs of a study are done. All of them give the same numbers."""

from hrl_policies.study.engines.base import Crew, Ended, Engine, Event, Setting, Started, Task, WorldShelf
from hrl_policies.study.engines.inside import InsideEngine
from hrl_policies.study.engines.local import LocalEngine
from hrl_policies.study.engines.ray_engine import RayEngine

__all__ = [
    "Crew",
    "Ended",
    "Engine",
    "Event",
    "InsideEngine",
    "LocalEngine",
    "RayEngine",
    "Setting",
    "Started",
    "Task",
    "WorldShelf",
]
