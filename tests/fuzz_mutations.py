"""Damage for files: bytes, text encodings, JSON at any depth, headers of safetensors, what stands in a file's place.

    damaged(content, name, chooser) -> Damage     one change, or a few, drawn by a seeded `random.Random`

A damage says in words what was done, and which JSON key it touched: a reader's sentence is compared with it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Damage(NamedTuple):
    """`content` None: no file any more; `keys` are the JSON keys on the way to what was changed."""

    content: bytes | None
    what: str
    keys: tuple[str, ...] = ()
    place: str = "file"  # or "folder", "link" (out of the case's folder)


def _span(data: bytes, chooser: random.Random) -> tuple[int, int]:
    start = chooser.randrange(len(data) + 1)
    return start, min(len(data), start + chooser.choice((1, 2, 7, 64, 512)))


def _flip(data: bytes, chooser: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chooser.choice((1, 1, 2, 16))):
        if out:
            out[chooser.randrange(len(out))] ^= 1 << chooser.randrange(8)
    return bytes(out)


def _cut(data: bytes, chooser: random.Random) -> bytes:
    start, stop = _span(data, chooser)
    return data[:start] + data[stop:]


def _insert(data: bytes, chooser: random.Random) -> bytes:
    start, _ = _span(data, chooser)
    return data[:start] + chooser.choice((chooser.randbytes(8), b"\0", b"\n", b'"', b"}", b"[", b"\xff")) + data[start:]


def _truncate(data: bytes, chooser: random.Random) -> bytes:
    return data[: chooser.choice((0, 1, 8, len(data) // 2, max(0, len(data) - 1), chooser.randrange(len(data) + 1)))]


def _repeat(data: bytes, chooser: random.Random) -> bytes:
    start, stop = _span(data, chooser)
    return data[:stop] + data[start:stop] * chooser.choice((1, 3)) + data[stop:]


def _zero(data: bytes, chooser: random.Random) -> bytes:
    start, stop = _span(data, chooser)
    return data[:start] + bytes(stop - start) + data[stop:]


def _swap(data: bytes, chooser: random.Random) -> bytes:
    size = chooser.choice((1, 8, 64))
    first, second = sorted(chooser.randrange(max(1, len(data) - size)) for _ in range(2))
    if first + size > second:
        return data[::-1]
    ends = data[first : first + size], data[second : second + size]
    return data[:first] + ends[1] + data[first + size : second] + ends[0] + data[second + size :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _insert, _truncate, _repeat, _zero, _swap)
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "latin-1": lambda text: ("é" + text).encode("latin-1", "replace"),
    "latin-1 inside": lambda text: text.replace("e", "é", 3).encode("latin-1", "replace"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "NUL inside": lambda text: text.replace(" ", "\0", 2).encode(),
    "carriage returns": lambda text: text.replace("\n", "\r\n").encode(),
    "lone surrogate bytes": lambda text: text.replace("e", "\ud800", 1).encode("utf-8", "surrogatepass"),
    "line separators": lambda text: text.replace(" ", "\u2028", 3).encode(),
}


def _deep() -> Any:
    value: Any = 1
    for _ in range(300):
        value = {"deeper": [value]}
    return value


class _Raw(str):
    """JSON text that `json.dumps` would not write."""


REPLACEMENTS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "\ud800", "a\nb", "\0", "é" * 5, "x" * 100_000),
    *("../outside/NAME", "ABSOLUTE/NAME", "..", "/", ".", "NAME/../NAME", "~", "C:\\x"),
    *([], {}, [[]], [None], {"x": 1}, [1, "2", None], {"": {}}, [0] * 1000),
    *(_Raw("9" * 5000), _Raw("[" * 100_000), _Raw('{"a":' * 50_000), _Raw("1e999"), _Raw("-"), _Raw("0x10")),
    _deep(),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values, the whole one first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in _places(each, (*path, key)))]


def _near(value: Any, chooser: random.Random) -> Any:
    """A value of the same type that is a little wrong."""
    if type(value) is int:
        return chooser.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    if isinstance(value, str):
        return chooser.choice(
            (value + "x", value[:-1], value.upper(), f"../outside/{value}", f"ABSOLUTE/{value}", [value])
        )
    if isinstance(value, list):
        return chooser.choice((value[:-1], value + value[:1], value[::-1], [value], dict(enumerate(map(str, value)))))
    return not value if isinstance(value, bool) else [value]


def damaged_value(value: Any, chooser: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """JSON text of a value after one change, what it was, and the keys on the way."""
    marks = dict[str, str]()
    # A place of each depth is as likely as any other depth: else a long table takes nearly all of them.
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in _places(value):
        by_depth.setdefault(len(path), []).append(path)
    path = chooser.choice(by_depth[chooser.choice(sorted(by_depth))])
    root = {"": value}
    holder: Any = root
    for key in ("", *path)[:-1]:
        holder = holder[key]
    last = ("", *path)[-1]
    kinds = ["replace", "replace", "near"] + (["delete", "rename", "add", "twice"] if isinstance(holder, dict) else [])
    kind = chooser.choice(kinds) if path else "replace"

    def marked(new: Any) -> Any:
        if isinstance(new, _Raw):
            marks[mark := f"@{len(marks)}@"] = str(new)
            return mark
        return new

    if kind in ("replace", "near"):
        new = chooser.choice(REPLACEMENTS) if kind == "replace" else _near(holder[last], chooser)
        holder[last] = marked(new)
    elif kind == "delete":
        del holder[last]
    elif kind == "rename":
        holder[f"{last}x"] = holder.pop(last)
    elif kind == "add":
        holder[chooser.choice(("", "x", "../x", "__class__", "\ud800", "a\nb", "x" * 1000))] = marked(
            chooser.choice(REPLACEMENTS)
        )
    else:
        # The same key once more, with another value: JSON text only.
        marks["@twice@"] = (
            f"{json.dumps(holder[last])},{json.dumps(str(last))}:{json.dumps(chooser.choice((1, None, 'x')))}"
        )
        holder[last] = "@twice@"
    text = json.dumps(root[""])
    for mark, raw in marks.items():
        text = text.replace(json.dumps(mark), raw)
    return text, f"{kind} {'.'.join(map(str, path)) or 'everything'}", tuple(str(key) for key in path)


def _json(data: bytes, chooser: random.Random) -> Damage:
    text, what, keys = damaged_value(json.loads(data), chooser)
    return Damage(text.encode(), what, keys)


def _lines(data: bytes, chooser: random.Random) -> Damage:
    lines = data.splitlines()
    at = chooser.randrange(len(lines))
    kind = chooser.choice(("value", "value", "value", "value", "swap", "repeat", "delete", "blank"))
    if kind == "value":
        text, what, keys = damaged_value(json.loads(lines[at]), chooser)
        lines[at] = text.encode()
        return Damage(b"\n".join(lines) + b"\n", f"line {at + 1}: {what}", keys)
    new = {"swap": lines[:at] + lines[:at:-1], "repeat": lines[: at + 1] + lines[at:], "delete": lines[:at]}
    lines = new.get(kind, [*lines[:at], b"", b"   ", *lines[at:]])
    return Damage(b"\n".join(lines) + b"\n", f"line {at + 1}: {kind}")


def _safetensors(data: bytes, chooser: random.Random) -> Damage:
    """A change to the header, or to its length."""
    size = int.from_bytes(data[:8], "little")
    if chooser.random() < 0.15:
        new = chooser.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return Damage(new.to_bytes(8, "little") + data[8:], f"header of {new} bytes")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = chooser.choice([key for key in header if key != "__metadata__"])
    entry, (first, last) = header[name], header[name]["data_offsets"]
    elements = max(1, (last - first) // 4)
    changes: dict[str, Any] = {
        "data_offsets": [[last, first], [first, last + 8], [0, last], [first - 1, last], [-1, 2**63], [2**40, 2**41]],
        "dtype": ["F64", "U8", "BOOL", "F8_E5M2", "F4", "none", "BF16", "F32", "I64"],
        "shape": [[], [-1], [2**40], [2**32, 2**32], [elements], [1, *entry["shape"]], entry["shape"][::-1], [0], [3]],
    }
    field = chooser.choice((*changes, "any", "any"))
    if field == "any":
        text, what, keys = damaged_value(header, chooser)
    else:
        entry[field] = chooser.choice(changes[field])
        text, what, keys = json.dumps(header), f"{name}.{field} = {entry[field]}", (name, field)
    content = text.encode()
    content += b" " * (-len(content) % 8)
    return Damage(len(content).to_bytes(8, "little") + content + rest, f"header: {what}", keys)


BINARY = (".safetensors", ".arrow", ".bin", ".gz", ".parquet")
STRUCTURED = {".json": _json, ".jsonl": _lines, ".safetensors": _safetensors}


def damaged(content: bytes, name: str, chooser: random.Random, *, outside: Path, links: bool = False) -> Damage:
    """One change to a file called `name`; `outside` has files of the same names, where no reader may go."""
    structured = STRUCTURED.get(Path(name).suffix)
    kind = chooser.choices(
        ("structure", "bytes", "encoding", "place"),
        (6 if structured else 0, 3, 1 if Path(name).suffix not in BINARY else 0, 0.3),
    )[0]
    if kind == "structure":
        assert structured is not None
        damage = structured(content, chooser)
        assert damage.content is not None
        stem = Path(name).name.encode()
        damage = damage._replace(
            content=damage.content.replace(b"ABSOLUTE", str(outside).encode()).replace(b"NAME", stem)
        )
    elif kind == "bytes":
        change = chooser.choice(BYTES)
        damage = Damage(change(content, chooser), change.__name__.strip("_"))
    elif kind == "encoding":
        encoding = chooser.choice(sorted(ENCODINGS))
        damage = Damage(ENCODINGS[encoding](content.decode()), encoding)
    else:
        place = chooser.choice(("absent", "folder", "link" if links else "absent"))
        damage = Damage(None, place, place="file" if place == "absent" else place)
    return damage
