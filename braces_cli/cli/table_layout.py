"""Column widths of a table on a terminal: numbers and ordinary words stay whole. Light: the standard library only."""

from __future__ import annotations

from collections.abc import Sequence

# Longer words, such as paths, are broken where there is no room for them.
_LONGEST_WORD = 24
# What Rich draws around a cell: a space on either side, and a line; and one more line at the end.
_FRAME, _EDGE = 3, 1


def layout(cells: Sequence[Sequence[str]], width: int, keys: Sequence[int] = (0,)) -> list[dict[int, int]]:
    """Divide the columns of a table into blocks that are at most `width` characters wide.

    Columns for which there is no room go into further blocks, each of which begins with the key columns again.

    Args:
        cells: rows of texts, the header first.
        keys: columns that say what a row is.

    Returns:
        For each block: index of a column -> its width in characters, without the frame.
    """
    columns = list(zip(*cells, strict=True))
    least = [max(map(_least, column)) for column in columns]
    most = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    available_width = width - _EDGE
    first = [index for index in keys if index < len(columns)]
    blocks: list[list[int]] = [first.copy()]
    for index in (index for index in range(len(columns)) if index not in first):
        if len(blocks[-1]) > len(first) and sum(least[i] + _FRAME for i in (*blocks[-1], index)) > available_width:
            blocks.append(first.copy())
        blocks[-1].append(index)
    return [_widths({i: (least[i], most[i]) for i in sorted(block)}, available_width) for block in blocks]


def is_number(cell: str) -> bool:
    """Whether a cell is a number, or several in a short expression such as `0.41 ± 0.02`."""
    return len(cell) <= _LONGEST_WORD and any(c.isdigit() for c in cell) and not any(c.isalpha() for c in cell)


def _least(cell: str) -> int:
    """Characters that a cell needs."""
    if is_number(cell):
        return len(cell)
    return max((min(len(word), _LONGEST_WORD) for word in cell.split()), default=0)


def _widths(limits: dict[int, tuple[int, int]], available_width: int) -> dict[int, int]:
    """Share the room among columns; those that want little get all that they want."""
    widths = {index: least for index, (least, _) in limits.items()}
    spare = max(0, available_width - sum(width + _FRAME for width in widths.values()))
    waiting = sorted(limits, key=lambda index: limits[index][1] - limits[index][0])
    for place, index in enumerate(waiting):
        least, most = limits[index]
        more = min(max(most, 1) - least, spare // (len(waiting) - place))
        widths[index] += more
        spare -= more
    return widths
