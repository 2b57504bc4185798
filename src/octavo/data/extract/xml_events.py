"""XML of strangers as events, with bounds: no entities of its own, no external files, a bound on depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from octavo.errors import DataError

MAX_DEPTH = 512  # Word nests a table cell 6 deep; libxml2 stops at 256


@dataclass(frozen=True, slots=True)
class Start:
    """A start tag. Names are without their namespace."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """An end tag."""

    name: str


Event = Start | End | str  # a string is text


def events(chunks: Iterable[bytes], source: str, part: str) -> Iterator[Event]:
    """The tags and texts of an XML document, in order. Adjacent texts are joined.

    DataError names `source` and its `part` for XML that is not well-formed, that declares entities, which could expand
    to gigabytes or name local files, or that is nested more than MAX_DEPTH deep.
    """
    found: list[Event] = []
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise _invalid(source, part, f"its elements are nested more than {MAX_DEPTH} deep")
        found.append(Start(_local(name), {_local(key): value for key, value in attributes.items()}))

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        found.append(End(_local(name)))

    def entity(name: str, *_: object) -> None:
        raise _invalid(source, part, f"it declares the entity {name[:40]!r}, which octavo does not expand")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.buffer_size = 2**16
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = found.append
    parser.EntityDeclHandler = entity
    parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
    try:
        for chunk in chunks:
            parser.Parse(chunk, False)
            yield from found
            found.clear()
        parser.Parse(b"", True)
    except DataError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # also an encoding that Python lacks
        raise _invalid(source, part, str(error)) from error
    yield from found


def skip(stream: Iterator[Event]) -> None:
    """Consumes the rest of the element whose start tag was the last event."""
    depth = 1
    for event in stream:
        depth += isinstance(event, Start) - isinstance(event, End)
        if not depth:
            return


def element(stream: Iterator[Event]) -> Iterator[Event]:
    """The events up to the end of the element whose start tag was the last event."""
    depth = 1
    for event in stream:
        depth += isinstance(event, Start) - isinstance(event, End)
        if not depth:
            return
        yield event


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _invalid(source: str, part: str, reason: str) -> DataError:
    hint = "Save the document again, or take it out of the data."
    return DataError(f"its part {part!r} is not XML that octavo reads: {reason}.", source=source, hint=hint)
