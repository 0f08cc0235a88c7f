"""Which documents share a row: best fit, so that rows of a fixed size are nearly full and nothing is cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put documents of these lengths into rows that hold `size` tokens each.

    The longest comes first, and each goes where the least room is left behind it (best fit decreasing; Johnson 1973:
    at most 11/9 of the fewest rows possible, and a few more). The result depends on the arguments alone.

    Args:
        lengths: tokens of each document, at most `size`.
        size: tokens of a row.

    Returns:
        For each row the numbers of its documents.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # how much is left, of each kind of row that has room; sorted
    rows_with: dict[int, list[int]] = {}  # room -> rows with that room
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        assert length <= size
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), size
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at], rows_with[room]
        rows[row].append(document)
        if left := room - length:
            if left not in rows_with:
                insort(rooms, left)
                rows_with[left] = []
            rows_with[left].append(row)
    return rows
