"""Put documents into rows: as few rows of a fixed size as best fit finds, equally full, and nothing is cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace


def pack(lengths: Sequence[int], size: int, share: int = 1) -> list[list[int]]:
    """Put documents of these lengths into rows that hold `size` tokens each.

    Equally full rows can all be cut to their tokens, and go round evenly. The result depends on the arguments alone.

    Args:
        lengths: tokens of each document, at most `size`.
        size: tokens of a row.
        share: number of parts that the rows will be divided into. The number of rows is a multiple of it, if
            there are documents enough and no row exceeds `size`.

    Returns:
        The numbers of the documents of each row.
    """
    rows = best_fit(lengths, size)
    count = min(len(lengths), -(-len(rows) // share) * share)
    equal = spread(lengths, count)
    return equal if all(sum(lengths[i] for i in row) <= size for row in equal) else rows


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Fill nearly as few rows as possible.

    The longest document comes first, and each goes where the least room is left behind it (best fit decreasing).
    The rows are at most 11/9 of the fewest rows possible, and a few more (Johnson 1973).
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # how much is left, of each kind of row that has room; sorted
    rows_with: dict[int, list[int]] = {}  # room -> rows with that room
    for document in longest_first(lengths):
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


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Fill `count` rows whose lengths differ little.

    The longest document comes first, and each goes into the emptiest row.
    The longest row has at most 4/3 of the fewest tokens that it could have (Graham 1969).
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]  # a heap: tokens, row
    for document in longest_first(lengths):
        tokens, row = filled[0]
        heapreplace(filled, (tokens + lengths[document], row))
        rows[row].append(document)
    return rows


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The numbers of the documents, the longest first."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
