"""Where the coordinator's rows are kept: one protocol, several backends."""

from paramesh_coordinator.store.base import MetaStore, StoreConflict, StoreError
from paramesh_coordinator.store.memory import MemoryStore
from paramesh_coordinator.store.sqlite import SqliteStore

__all__ = ["MemoryStore", "MetaStore", "SqliteStore", "StoreConflict", "StoreError"]
