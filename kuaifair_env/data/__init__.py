"""Data sets: schema, readers of the official archives, own logs, the cache and popularity groups.

Names that need pandas are looked up on first use, so that importing the environments stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuaifair_env.data.cache import cache_dir, cached, load_data, save_data
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import PopularityGroups, groups_of, popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.lazy_names import lazy_names

if TYPE_CHECKING:
    from kuaifair_env.data.kuairand import load_kuairand, read_kuairand
    from kuaifair_env.data.kuairec import load_kuairec, read_kuairec
    from kuaifair_env.data.official import fetch
    from kuaifair_env.data.sources import find_source
    from kuaifair_env.data.tables import LogColumns, split_log

__all__ = [
    "Catalogue",
    "FeatureTable",
    "InteractionData",
    "InteractionLog",
    "LogColumns",
    "PopularityGroups",
    "Provenance",
    "Users",
    "cache_dir",
    "cached",
    "fetch",
    "find_source",
    "groups_of",
    "load_data",
    "load_kuairand",
    "load_kuairec",
    "popularity_groups",
    "read_kuairand",
    "read_kuairec",
    "save_data",
    "split_log",
]

_HOMES = {
    "kuaifair_env.data.kuairand": ("load_kuairand", "read_kuairand"),
    "kuaifair_env.data.kuairec": ("load_kuairec", "read_kuairec"),
    "kuaifair_env.data.official": ("fetch",),
    "kuaifair_env.data.sources": ("find_source",),
    "kuaifair_env.data.tables": ("LogColumns", "split_log"),
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
