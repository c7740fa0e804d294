"""Bytes: objects in a folder or bucket, the records of finished work, the manifest of a finished output, the lease.

Knows neither tensors nor workers. Correctness rests on two promises of the objects: they appear whole, and
``ObjectStore.create`` has one winner.
"""

from srr_dist.store.lease import Lease, held_lease
from srr_dist.store.manifest import Manifest, read_complete, write_commit
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.records import BlockRecord, RunArea

__all__ = [
    "BlockRecord",
    "FileEntry",
    "Lease",
    "Manifest",
    "ObjectStore",
    "RunArea",
    "held_lease",
    "read_complete",
    "write_commit",
]
