"""Strict JSON: one canonical way to write it, and a reader that checks it against a dataclass's annotations.

Reading never trusts: whatever the bytes, the result is a valid object or a StoreError that names source and field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from srr_dist.errors import StoreError

T = TypeVar("T")


def encode(value: Any, source: str) -> bytes:
    """Canonical JSON of ``value``, dataclasses as objects: keys sorted, no blanks, ASCII. Equal values, equal bytes.

    Raises:
        StoreError: the value holds NaN, an infinity or a type JSON lacks; ``source`` says where it was meant to go.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_fields)
        return text.encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{source}: cannot be written as JSON: {error}") from error


def decode(data: bytes, source: str) -> Any:
    """The JSON value in ``data`` (UTF-8).

    Raises:
        StoreError: not UTF-8, not JSON, nested too deeply, NaN, a number beyond float64, or a key given twice.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{source}: not valid JSON ({error}); the object is damaged or was not written here"
        ) from error


def parse(kind: type[T], data: bytes, source: str) -> T:
    """The dataclass ``kind`` from the JSON object in ``data``.

    Annotations may be str, int, float (an int is taken too), Any, dict[str, X], list[X], tuple[X, ...] and dataclasses
    of these; fields without default are required, unknown ones refused. ``__post_init__`` may raise StoreError.

    Raises:
        StoreError: ``<source>: <dotted field>: <expected and found>``.
    """
    return build(kind, decode(data, source), source)


def build(kind: type[T], value: Any, source: str) -> T:
    """Like parse, from a decoded JSON value."""
    result: T = _Reader(source).read(kind, value, ())
    return result


@dataclasses.dataclass(frozen=True)
class _Reader:
    source: str

    def read(self, kind: Any, value: Any, trail: tuple[str, ...]) -> Any:
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, trail)
        container = get_origin(kind)
        if container is dict:
            self._expect(dict, value, trail)
            item_kind = get_args(kind)[1]
            return {key: self.read(item_kind, item, (*trail, key)) for key, item in value.items()}
        if container in {list, tuple}:
            self._expect(list, value, trail)
            item_kind = get_args(kind)[0]
            return container(self.read(item_kind, item, (*trail, str(i))) for i, item in enumerate(value))
        if kind is float and type(value) is int:
            return self._float(value, trail)
        self._expect(kind, value, trail)
        return value

    def _dataclass(self, kind: Any, value: Any, trail: tuple[str, ...]) -> Any:
        self._expect(dict, value, trail)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if unknown := value.keys() - fields.keys():
            self._fail(trail, f"unknown field {reprlib.repr(min(unknown))}; expected {', '.join(fields)}")
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if missing := required - value.keys():
            self._fail(trail, f"field {min(missing)} is missing")
        hints = get_type_hints(kind)
        arguments = {name: self.read(hints[name], item, (*trail, name)) for name, item in value.items()}
        try:
            return kind(**arguments)
        except StoreError as error:
            self._fail(trail, str(error), error)

    def _float(self, value: int, trail: tuple[str, ...]) -> float:
        try:
            return float(value)
        except OverflowError as error:
            self._fail(trail, "the number is beyond float64", error)

    def _expect(self, kind: type, value: Any, trail: tuple[str, ...]) -> None:
        # An exact comparison: to isinstance, True would be an int.
        if type(value) is not kind:
            self._fail(trail, f"expected {kind.__name__}, found {type(value).__name__} {reprlib.repr(value)}")

    def _fail(self, trail: tuple[str, ...], message: str, cause: Exception | None = None) -> NoReturn:
        raise StoreError(": ".join(filter(None, (self.source, ".".join(trail), message)))) from cause


def _fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} {reprlib.repr(value)} is no JSON value")
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is given twice")
    return document


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number
