"""Codes to numbers, compiled: a byte stands for one number of a table, or for two."""

from __future__ import annotations

from typing import Any

from ..tensors.compiled import compiled


@compiled()
def scaled_numbers(
    raw: Any, table: Any, per_byte: int, scales: Any, zeros: Any, columns: int, first: int, out: Any
) -> None:
    """``(code - zero point) * scale`` of the columns of ``raw`` from ``first``, into ``out`` ``[k, n]``.

    ``raw`` holds whole rows of bytes, of one or two codes each; ``table`` the numbers of each byte in turn.
    ``columns`` neighbouring codes share one of ``scales`` and ``zeros``, of shape ``[k, groups]``. All is
    computed in the type of ``out``, which is theirs.
    """
    last = first + out.shape[1]
    for row in range(out.shape[0]):
        codes, numbers = raw[row], out[row]
        for group in range(first // columns, (last + columns - 1) // columns):
            low, high = max(first, group * columns), min(last, (group + 1) * columns)
            scale, zero = scales[row, group], zeros[row, group]
            if per_byte == 1:
                part = codes[low:high]
                for i in range(part.size):
                    numbers[low - first + i] = (table[part[i]] - zero) * scale
            else:
                if low & 1:
                    numbers[low - first] = (table[2 * codes[low >> 1] + 1] - zero) * scale
                part, place = codes[(low + 1) >> 1 : high >> 1], low + (low & 1) - first
                for i in range(part.size):
                    numbers[place + 2 * i] = (table[2 * part[i]] - zero) * scale
                    numbers[place + 2 * i + 1] = (table[2 * part[i] + 1] - zero) * scale
                if high & 1 and high > low:
                    numbers[high - 1 - first] = (table[2 * codes[high >> 1]] - zero) * scale
