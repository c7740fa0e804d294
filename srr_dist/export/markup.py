"""HTML and SVG elements as strings, escaped once, where they are made."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

EMPTY = frozenset({"meta", "rect", "path", "circle", "line"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """One element.

    A child that is a plain string is text and is escaped; a child made by this module is markup and is kept.
    ``class_`` writes ``class`` and ``aria_label`` writes ``aria-label``; an attribute of None is left out; a float is
    written with at most two decimals, which is finer than a pixel.
    """
    written = "".join(f' {_attribute(key)}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    if name in EMPTY and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """The children one after the other, plain strings escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def decimal(value: float) -> str:
    """The number with at most two decimals and no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], *, label: str, numeric: Iterable[int] = ()) -> Html:
    """A table in a box that scrolls by itself; the first cell of a row names it.

    Args:
        headings: one per column.
        rows: cells, text or markup.
        label: what the table shows, for readers that cannot see the heading above it.
        numeric: the columns that are aligned to the right.
    """
    side = dict.fromkeys(numeric, "n")
    head = tag("tr", *(tag("th", text, scope="col", class_=side.get(i)) for i, text in enumerate(headings)))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", c, class_=side.get(i)) for i, c in enumerate(rest, 1)))
        for first, *rest in rows
    )
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")


def section(title: str, note: str, *content: Html) -> Html:
    """A titled part of the page; an empty note is left out."""
    return tag("section", tag("h2", title), *([tag("p", note, class_="note")] if note else []), *content)


def page(title: str, header: Html, content: Iterable[str], footer: str) -> str:
    """A whole page that needs no network and no script; ``title`` is the window's."""
    style = Html(files("srr_dist.export").joinpath("report.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("header", header), tag("main", *content), tag("footer", footer))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else decimal(value)
