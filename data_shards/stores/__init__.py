"""Where the bytes of shards come from: a folder of this machine, or one elsewhere with a cache here."""

from __future__ import annotations

from pathlib import Path

from data_shards.stores.base import INDEX_NAME, Store
from data_shards.stores.local import LocalStore
from data_shards.stores.remote import RemoteStore
from data_shards.stores.urls import as_url

__all__ = ["INDEX_NAME", "LocalStore", "RemoteStore", "Store", "open_store"]


def open_store(folder: str | Path, cache: str | Path | None = None, cache_gb: float | None = None) -> Store:
    """Return the store of a folder of shards; nothing is read yet.

    Args:
        folder: A folder, or a URL: ``s3://``, ``gs://``, ``az://``, ``hf://``, ``http(s)://``, or ``file://``, which
            keeps a copy of what is read from a slow disk.
        cache: Where the samples of a URL are kept; `default_cache` says where if null.
        cache_gb: Most gigabytes (10^9 bytes) that the cache may hold, of all corpora; null: until the disk is nearly
            full; 0: keep nothing more.

    Raises:
        UserError: It is written as a command or as a URL that is not read, or `cache_gb` is negative.
    """
    url = as_url(folder)
    return LocalStore(folder) if url is None else RemoteStore(url, cache, cache_gb)
