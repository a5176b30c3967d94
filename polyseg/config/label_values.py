"""Read label values of data.foreground: numbers, ranges, colours, and "nonzero"."""

import re

NONZERO = -1
"""Code of "nonzero", every value but 0."""
COLOUR = 2**24
"""Offset of the label values of colours, which are this + 65536 R + 256 G + B."""
LARGEST_LABEL = 65_535

Values = tuple[int, ...]

_LONGEST_NAME = 64


def parse_values(entry: int | str) -> Values:
    """Return the label values of one entry of data.foreground.

    Args:
        entry: a number, "nonzero", a range such as "1-300", or a colour such as "#FF0000".

    Raises:
        ValueError: it is something else.

    >>> parse_values(2), parse_values("1-3"), parse_values("nonzero")
    ((2,), (1, 2, 3), (-1,))
    >>> parse_values("#0000ff") == (COLOUR + 255,)
    True
    """
    if isinstance(entry, int):
        return (_bounded(entry),)
    if entry == "nonzero":
        return (NONZERO,)
    if match := re.fullmatch(r"#([0-9A-Fa-f]{6})", entry):
        return (COLOUR + int(match[1], 16),)
    if match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", entry):
        first, last = _bounded(int(match[1])), _bounded(int(match[2]))
        if first < last:
            return tuple(range(first, last + 1))
    raise ValueError(
        f"data.foreground: {entry!r:.40} is not a label value; give a number, nonzero, a range "
        "such as 1-300, or a colour such as '#FF0000'"
    )


def name_of(entries: tuple[int | str, ...]) -> str:
    """Return a name for a label that has none, made of its values.

    >>> name_of((1, 2)), name_of(("#00ff00",)), name_of(tuple(range(1, 99)))
    ('1+2', '00FF00', '1+...+98')
    """
    texts = [str(one).removeprefix("#").upper() if "#" in str(one) else str(one) for one in entries]
    name = "+".join(texts)
    return name if len(name) <= _LONGEST_NAME else f"{texts[0]}+...+{texts[-1]}"


def shown_value(value: int) -> str:
    """Return a label value as it is written in data.foreground.

    >>> shown_value(3), shown_value(COLOUR + 255), shown_value(NONZERO)
    ('3', "'#0000FF'", 'nonzero')
    """
    if value == NONZERO:
        return "nonzero"
    return f"'#{value - COLOUR:06X}'" if value >= COLOUR else str(value)


def _bounded(value: int) -> int:
    if not 0 <= value <= LARGEST_LABEL:
        raise ValueError(f"data.foreground: label values are from 0 to {LARGEST_LABEL}")
    return value
