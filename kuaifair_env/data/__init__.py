"""Data sets: schema, readers of the official archives, own logs, the cache and popularity groups.

Names that need pandas are looked up on first use, so that importing the environments stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kuaifair_env.data.cache import cache_dir, cached, load_data, save_data
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import PopularityGroups, groups_of, popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users

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
    "LogColumns": "tables",
    "fetch": "official",
    "find_source": "sources",
    "load_kuairand": "kuairand",
    "load_kuairec": "kuairec",
    "read_kuairand": "kuairand",
    "read_kuairec": "kuairec",
    "split_log": "tables",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
