"""The working area of a run: what it is, and which units of work are done.

    <output>/.srr/<fingerprint>/run.json                             create-only, the run's whole configuration
    <output>/.srr/<fingerprint>/blocks/00017/<attempt>/base.safetensors
    <output>/.srr/<fingerprint>/blocks/00017.json                    create-only record: this attempt is the block
    <output>/.srr/<fingerprint>/blocks/00017.g2.json                 its second generation, where the first was damaged
    <output>/.srr/<fingerprint>/blocks/00017.g1.damaged.json         mark: generation 1 does not count
    <output>/.srr/<fingerprint>/damaged.json                         mark: the assembled output does not count

An attempt's name is used once, so objects below it never change. Without a record an attempt counts for nothing.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from srr_dist.errors import OutputError, StoreError
from srr_dist.store.documents import decode, encode, parse
from srr_dist.store.manifest import COMMIT, read_complete
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.paths import check_fingerprint, check_segment, check_sha256

WORKING_AREA = ".srr"
READ_THREADS = 16
REST = "rest"
"""The unit that holds every tensor outside the decoder blocks."""

_UNIT = re.compile(r"[0-9]{5}|rest")
_RECORD = re.compile(r"blocks/(?P<unit>[0-9]{5}|rest)(?:\.g(?P<generation>[1-9][0-9]{0,5}))?\.json")
_MARK = re.compile(r"blocks/(?P<unit>[0-9]{5}|rest)\.g(?P<generation>[1-9][0-9]{0,5})\.damaged\.json")
_ATTEMPT = re.compile(r"blocks/(?:[0-9]{5}|rest)/[^/]+/.+")
_PROBE = re.compile(r"probe-[0-9a-f]{32}")
OUTPUT_MARK = "damaged.json"
_RUN = re.compile(re.escape(WORKING_AREA) + r"/(?P<fingerprint>[0-9a-f]{8,64})/run\.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockRecord:
    """One unit of work, done: a decoder block ("00017") or everything outside the blocks ("rest").

    ``generation`` counts from 1. ``files``: "base", "adapter" -> object, all below this attempt's folder.
    ``layers``: one JSON object per layer, as the solver reports it. ``source_sha256``: of the weights that were read.
    ``seconds``: step -> duration. ``versions``: package -> version. ``hardware``: the device's name. ``finished``:
    unix time. ``stage``: where in the pipeline it was done and in how much memory; {} for work outside it.
    """

    unit: str
    generation: int
    fingerprint: str
    attempt: str
    files: dict[str, FileEntry]
    layers: list[dict[str, Any]]
    source_sha256: str
    seconds: dict[str, float]
    versions: dict[str, str]
    hardware: str
    finished: float
    stage: dict[str, Any]

    def __post_init__(self) -> None:
        check_fingerprint(self.fingerprint)
        check_sha256(self.source_sha256)
        if self.generation < 1:
            raise StoreError(f"generation {self.generation}: expected 1 or more")
        folder = attempt_folder(self.fingerprint, self.unit, self.attempt)
        for name, entry in self.files.items():
            # A record decides what is copied into the output and what is kept, so it may speak for its own files only.
            if not entry.path.startswith(f"{folder}/"):
                raise StoreError(f"files.{name}: expected a path below {folder}, found {entry.path}")

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return encode(self, f"record of unit {self.unit}")

    @staticmethod
    def from_json(data: bytes, source: str) -> BlockRecord:
        """The record in ``data``; StoreError with ``source`` and the field if it is none."""
        return parse(BlockRecord, data, source)


def area_folder(fingerprint: str) -> str:
    """The working area's folder in the output."""
    return f"{WORKING_AREA}/{check_fingerprint(fingerprint)}"


def attempt_folder(fingerprint: str, unit: str, attempt: str) -> str:
    """The folder in the output that one attempt at a unit owns."""
    return f"{area_folder(fingerprint)}/blocks/{_check_unit(unit)}/{check_segment(attempt)}"


class RunArea:
    """The working area of the run with this fingerprint. Holds no state, so any number may be used at once."""

    def __init__(self, store: ObjectStore, fingerprint: str) -> None:
        self.store = store
        self.fingerprint = fingerprint
        self.folder = area_folder(fingerprint)

    @staticmethod
    def find(store: ObjectStore) -> list[str]:
        """Fingerprints of the runs that began in this output, sorted."""
        return sorted(match["fingerprint"] for path in store.list(WORKING_AREA) if (match := _RUN.fullmatch(path)))

    def path(self, name: str) -> str:
        """The object ``name`` of this area, as a path in the store."""
        return f"{self.folder}/{name}"

    def begin(self, run: dict[str, Any]) -> None:
        """Claim the output for this run, or join it if it began before; ``run`` is its whole configuration, as JSON.

        Looks before and after it writes, so of two different runs that begin at the same moment none goes on unnoticed.

        Raises:
            OutputError: the output holds another run; the message lists the fields that differ, old -> new.
            StoreError: the store has no create-only writes.
        """
        path = self.path("run.json")
        document = encode(run, path)
        stored = decode(document, path)
        self._refuse_others(stored)
        self.store.probe(self.folder)
        self.store.create(path, document)
        self._refuse_others(stored)

    def run(self) -> dict[str, Any]:
        """The configuration that the run began with; StoreError if it has not begun or the object is damaged."""
        return _read_run(self.store, self.fingerprint)

    def units(self) -> set[str]:
        """Every unit of work of the run; StoreError if run.json does not say."""
        units = self.run().get("units")
        if not isinstance(units, list) or not all(isinstance(unit, str) and _UNIT.fullmatch(unit) for unit in units):
            location = self.store.location(self.path("run.json"))
            raise StoreError(f"{location}: units: expected a list of units' names, found {reprlib.repr(units)}")
        return set(units)

    def attempt_path(self, unit: str, attempt: str, name: str) -> str:
        """Where an attempt at a unit puts its file ``name``, as a path in the store."""
        return f"{attempt_folder(self.fingerprint, unit, attempt)}/{check_segment(name)}"

    def commit(self, record: BlockRecord) -> BlockRecord:
        """Make this attempt the unit's result of its generation, unless another is already; returns the one that is.

        Call it when the record's files are uploaded.

        Raises:
            StoreError: the record is of another run, or the one already there is damaged: commit a next generation.
        """
        if record.fingerprint != self.fingerprint:
            raise StoreError(f"unit {record.unit}: record of run {record.fingerprint}, expected {self.fingerprint}")
        path = self.path(_record_name(record.unit, record.generation))
        if self.store.create(path, record.to_json()):
            return record
        return BlockRecord.from_json(self.store.get(path), self.store.location(path))

    def next_generations(self) -> dict[str, int]:
        """Unit -> first generation that has no record, for units with any, valid or not; a unit not in it is at 1.

        Take it when work is handed out, not when it is committed: late work must meet the record of its generation.
        """
        taken: dict[str, int] = {}
        for _, unit, generation in self._objects(_RECORD, self.store.list(self.path("blocks"))):
            taken[unit] = max(taken.get(unit, 0), generation)
        return {unit: generation + 1 for unit, generation in taken.items()}

    def records(self, check_sizes: bool = True) -> dict[str, BlockRecord]:
        """Unit -> its valid record of the highest generation, sorted by unit.

        A damaged record does not count, nor one that is marked, nor (``check_sizes``) one with a file missing or of
        another size: these are logged. One listing and one read per record.
        """
        sizes = self.store.list(self.path("blocks"))
        marked = {(unit, generation) for _, unit, generation in self._objects(_MARK, sizes)}
        valid: dict[str, BlockRecord] = {}
        for unit, generation, record in self._read_records(sizes):
            try:
                if (unit, generation) in marked:
                    raise StoreError("it is marked as damaged")
                if check_sizes:
                    _check_files(record, sizes)
            except StoreError as error:
                _log_invalid(unit, generation, error)
            else:
                valid[unit] = record
        return valid

    def condemn(self, record: BlockRecord, problems: Sequence[str]) -> None:
        """Mark a record whose files are not as it says, so that it no longer counts and the unit is done anew."""
        name = f"blocks/{record.unit}.g{record.generation}.damaged.json"
        self.store.create(self.path(name), encode({"problems": list(problems)}, name))

    def condemn_output(self, problems: Sequence[str]) -> None:
        """Mark the assembled output as one to assemble anew; ``acquit_output`` takes that back."""
        self.store.put(self.path(OUTPUT_MARK), encode({"problems": list(problems)}, OUTPUT_MARK))

    def acquit_output(self) -> None:
        """Remove the mark of ``condemn_output``; call it when the output was assembled after the mark was made."""
        self.store.delete(self.path(OUTPUT_MARK))

    def is_condemned(self) -> bool:
        """Whether the assembled output is marked."""
        return self.store.exists(self.path(OUTPUT_MARK))

    def collect_garbage(self) -> None:
        """Remove objects of attempts that no record names, and what killed writers left anywhere in the output.

        Call it when every unit has a valid record: attempts that are still under way then are waste.
        """
        sizes = self.store.list(self.folder)
        named = {entry.path for _, _, record in self._read_records(sizes) for entry in record.files.values()}
        for path in sizes:
            name = path.removeprefix(f"{self.folder}/")
            if _PROBE.fullmatch(name) or (_ATTEMPT.fullmatch(name) and path not in named):
                self.store.delete(path)
        self.store.discard_unfinished()

    def _read_records(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, int, BlockRecord]]:
        """Unit, generation and content of each readable record in a listing, in this order."""
        objects = sorted(self._objects(_RECORD, sizes), key=lambda item: item[1:])
        with ThreadPoolExecutor(READ_THREADS) as pool:
            documents = list(pool.map(self.store.get, [path for path, _, _ in objects]))
        for (path, unit, generation), data in zip(objects, documents, strict=True):
            try:
                record = BlockRecord.from_json(data, self.store.location(path))
                self._check_place(record, unit, generation)
            except StoreError as error:
                _log_invalid(unit, generation, error)
            else:
                yield unit, generation, record

    def _objects(self, kind: re.Pattern[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
        """Path, unit and generation of each record (or mark) in a listing."""
        for path in sizes:
            if match := kind.fullmatch(path.removeprefix(f"{self.folder}/")):
                yield path, match["unit"], int(match["generation"] or 1)

    def _check_place(self, record: BlockRecord, unit: str, generation: int) -> None:
        found, expected = (record.fingerprint, record.unit, record.generation), (self.fingerprint, unit, generation)
        if found != expected:
            raise StoreError(f"the record is of {found}, expected {expected}")

    def _refuse_others(self, run: dict[str, Any]) -> None:
        holders = self.find(self.store)
        for other in holders:
            if other != self.fingerprint:
                changes = "; ".join(_differences(_read_run(self.store, other), run)) or "not in the configuration"
                raise OutputError(
                    f"{self.store.url} holds run {other[:8]}, expected {self.fingerprint[:8]}; differences: {changes}. "
                    f"Use another output or the old options, or remove {self.store.location(area_folder(other))}"
                )
        # A finished output whose working area was removed. Where ours is there, COMMIT is ours too, or half replaced.
        if not holders and self.store.exists(COMMIT):
            other = read_complete(self.store).fingerprint
            if other != self.fingerprint:
                raise OutputError(
                    f"{self.store.url} holds the finished output of run {other[:8]}, expected {self.fingerprint[:8]}; "
                    "use another output"
                )


def _check_unit(unit: str) -> str:
    if _UNIT.fullmatch(unit) is None:
        raise StoreError(f"unit {unit!r}: expected five digits or 'rest'")
    return unit


def _log_invalid(unit: str, generation: int, error: StoreError) -> None:
    logger.warning("unit %s, generation %d does not count: %s", unit, generation, error)


def _record_name(unit: str, generation: int) -> str:
    return f"blocks/{unit}.json" if generation == 1 else f"blocks/{unit}.g{generation}.json"


def _check_files(record: BlockRecord, sizes: Mapping[str, int]) -> None:
    for entry in record.files.values():
        if (found := sizes.get(entry.path)) != entry.size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise StoreError(f"{entry.path} {state}, expected {entry.size} bytes")


def _read_run(store: ObjectStore, fingerprint: str) -> dict[str, Any]:
    path = f"{area_folder(fingerprint)}/run.json"
    run = store.get_json(path)
    if not isinstance(run, dict):
        raise StoreError(f"{store.location(path)}: expected a JSON object, found {type(run).__name__}")
    return run


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """``dotted.name: old -> new`` for each value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r} -> {new!r}"
