"""The coding of one block, compiled: changes against a base to symbols, symbols to words, and back.

An element's difference is that of its bits and the base's, both ordered by value, as a zigzag number. Numbers
are coded by class: small ones exactly, others by their highest three bits, with the rest as plain bits.
Classes are coded by rANS (Duda, "Asymmetric numeral systems", arXiv:1311.2540) with static frequencies per
context, which is the base element's exponent. `docs/patch-format.md` specifies all of it.

Two forms: where few elements change, each context has the gaps between its changes; where most do, every
element has its difference. Integers only: float comparison and arithmetic lose -0 and NaN payloads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..tensors.compiled import compiled
from .elements import PRECISION

__all__ = [
    "decode_changes",
    "decode_values",
    "encode_changes",
    "encode_values",
    "find_changes",
    "find_values",
]


u16, u32, u64, i32 = np.uint16, np.uint32, np.uint64, np.int32
_LOW = u64((1 << PRECISION) - 1)
_LEAST_STATE = u64(1 << 15)
_FULL_STATE = u64(1 << (31 - PRECISION))
_HALF = u64(0xFFFFFFFF)
_WORD = u64(0xFFFF)
_NEVER = i32(2**31 - 1)

_OCTAVES = [(4 | part) << (top - 2) for top in range(4, 64) for part in range(4)]
_LEAST = np.array([*range(16), *_OCTAVES], np.uint64)  # of each class
_EXTRA = np.array([0] * 16 + [top - 2 for top in range(4, 64) for _ in range(4)], np.uint64)  # plain bits


@intrinsic
def _leading_zeros(typing_context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


# None of the following branches on what is coded: it would be mispredicted half of the time.


@numba.njit(inline="always")
def _mask(condition):  # type: ignore[no-untyped-def]
    """All bits if the condition holds, else none."""
    return u64(0) - u64(condition)


@numba.njit(inline="always")
def _class_of(number):  # type: ignore[no-untyped-def]
    top = u64(63) - _leading_zeros(number | u64(8))
    large = (top << u64(2)) + ((number >> (top - u64(2))) & u64(3))
    return large ^ ((large ^ number) & _mask(number < u64(16)))


# `Elements.rules` is unpacked once per kernel: the compiler cannot know that writing leaves it alone.


@numba.njit(inline="always")
def _place(element, top, negative, positive):  # type: ignore[no-untyped-def]
    """The place of an element in the order of values."""
    return element ^ positive ^ ((negative ^ positive) & _mask((element & top) != u64(0)))


@numba.njit(inline="always")
def _difference(base, tuned, top, full, negative, positive):  # type: ignore[no-untyped-def]
    """The zigzag number of the difference of two elements' places."""
    d = (_place(tuned, top, negative, positive) - _place(base, top, negative, positive)) & full
    return ((d << u64(1)) & full) ^ (full & _mask((d & top) != u64(0)))


@numba.njit(inline="always")
def _changed(base, zigzag, top, full, negative, positive):  # type: ignore[no-untyped-def]
    """The element at a difference from ``base``: the inverse of `_difference`."""
    d = (zigzag >> u64(1)) ^ (full & _mask((zigzag & u64(1)) != u64(0)))
    place = (_place(base, top, negative, positive) + d) & full
    # Places of positive elements have the highest bit: it was flipped, or the order is that of the bits.
    return place ^ negative ^ ((negative ^ positive) & _mask((place & top) != u64(0)))


@numba.njit(inline="always")
def _put(number, bits, extras, acc, fill, n):  # type: ignore[no-untyped-def]
    """Append the lowest ``bits`` of a number, at most 32."""
    acc |= (number & ((u64(1) << bits) - u64(1))) << fill
    fill += bits
    extras[n] = u32(acc & _HALF)
    full = fill >> u64(5)
    return acc >> (full << u64(5)), fill & u64(31), n + np.intp(full)


@numba.njit(inline="always")
def _push(state, entry, words, w):  # type: ignore[no-untyped-def]
    """Put one symbol into a rANS state; ``entry`` is its row of a table, see `tables.Table.encoding`."""
    frequency = u64(entry[1])
    words[w] = u16(state & _WORD)
    full = u64(state >= _FULL_STATE * frequency)
    state >>= full << u64(4)
    whole = (state * u64(entry[2])) >> u64(entry[3])
    return (whole << u64(PRECISION)) + (state - whole * frequency) + u64(entry[0]), w + np.intp(full)


@numba.njit(inline="always")
def _pop(state, slot, words, w, end):  # type: ignore[no-untyped-def]
    """Take the symbol of ``slot`` out of a rANS state. Past the ``end``, ``w`` grows and nothing is read."""
    state = (((slot >> u64(12)) & _LOW) + u64(1)) * (state >> u64(PRECISION)) + (slot & _LOW)
    word = u64(words[w if w < end else end])
    low = state < _LEAST_STATE
    return ((state << u64(16)) | word) if low else state, w + np.intp(low)


@numba.njit(inline="always")
def _take(bits, extras, acc, fill, e, end):  # type: ignore[no-untyped-def]
    """The next ``bits`` plain bits, at most 32; past the ``end`` as `_pop`."""
    word = u64(extras[e if e < end else end])
    short = u64(fill < bits)
    acc |= (word * short) << fill
    fill += short << u64(5)
    return acc & ((u64(1) << bits) - u64(1)), acc >> bits, fill - bits, e + np.intp(short)


@numba.njit(inline="always")
def _end(first, second, words, w):  # type: ignore[no-untyped-def]
    """Write both states, and put the words into the order of reading; returns how many there are."""
    words[w] = u16(second & _WORD)
    words[w + 1] = u16(second >> u64(16))
    words[w + 2] = u16(first & _WORD)
    words[w + 3] = u16(first >> u64(16))
    w += 4
    for i in range(w // 2):
        words[i], words[w - 1 - i] = words[w - 1 - i], words[i]
    return w


@compiled(error_model="numpy")
def find_changes(base, tuned, rules, contexts, count, events):  # type: ignore[no-untyped-def]
    """The events of a block in order: first one per context, then one per change.

    Fills ``events``: of each its context, the symbol of the gap after it, the gap (how many elements of the
    context come before its next change), the class of its difference less one, and that number. Returns how
    many there are.
    """
    homes, gap_symbols, gaps, classes, numbers = events
    shift, mask, top, full, negative, positive = rules
    last = np.zeros(256, np.int64)
    since = np.zeros(256, np.int32)
    for first in range(count):
        homes[first] = first
        last[first] = first
    n = count
    for i in range(base.shape[0]):
        a = base[i]
        b = tuned[i]
        c = u64(contexts[(u64(a) >> shift) & mask])
        if a == b:
            since[c] += i32(1)
        else:
            gap = since[c]
            since[c] = i32(0)
            gaps[last[c]] = gap
            gap_symbols[last[c]] = u64(1) + _class_of(u64(gap))
            number = _difference(u64(a), u64(b), top, full, negative, positive) - u64(1)
            numbers[n] = number
            classes[n] = _class_of(number)
            homes[n] = c
            last[c] = n
            n += 1
    for context in range(count):
        gaps[last[context]] = 0
        gap_symbols[last[context]] = 0
    return n


@compiled(error_model="numpy")
def encode_changes(n, count, events, gap_table, value_table, words, extras):  # type: ignore[no-untyped-def]
    """Code the events of `find_changes`; the tables are those of `tables.Table.encoding`.

    Returns how many ``words`` and ``extras`` it wrote.
    """
    homes, gap_symbols, gaps, classes, numbers = events
    acc, fill, e = u64(0), u64(0), 0
    for i in range(n):
        if i >= count:
            bits = _EXTRA[classes[i]]
            number = numbers[i]
            if bits > u64(32):
                acc, fill, e = _put(number, u64(32), extras, acc, fill, e)
                number >>= u64(32)
                bits -= u64(32)
            acc, fill, e = _put(number, bits, extras, acc, fill, e)
        if gap_symbols[i] > 0:
            bits = _EXTRA[gap_symbols[i] - 1]
            acc, fill, e = _put(u64(gaps[i]), bits, extras, acc, fill, e)
    if fill:
        extras[e] = u32(acc)
        e += 1
    x, y, w = _LEAST_STATE, _LEAST_STATE, 0
    for i in range(n - 1, -1, -1):
        c = homes[i]
        symbol = gap_symbols[i]
        x, w = _push(x, gap_table[c, symbol], words, w)
        if i >= count:
            symbol = classes[i]
            y, w = _push(y, value_table[c, symbol], words, w)
    return _end(x, y, words, w), e


@compiled(error_model="numpy")
def decode_changes(base, out, rules, contexts, count, gap_slots, value_slots, words, extras):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the block that `encode_changes` coded; returns 0, or 1 if the code is damaged.

    ``slots``, ``[contexts, 2^PRECISION]``, hold symbol, frequency less one, and place within the symbol.
    Behind ``words`` and ``extras`` is one more element, whose value does not matter.
    """
    shift, mask, top, full, negative, positive = rules
    n, w_end, e_end = u64(base.shape[0]), words.shape[0] - 1, extras.shape[0] - 1
    if w_end < 4:
        return 1
    x = (u64(words[0]) << u64(16)) | u64(words[1])
    y = (u64(words[2]) << u64(16)) | u64(words[3])
    w, e = 4, 0
    acc, fill = u64(0), u64(0)
    left = np.zeros(256, np.int32)
    for first in range(count):
        slot = u64(gap_slots[first, x & _LOW])
        x, w = _pop(x, slot, words, w, w_end)
        symbol = slot >> u64(24)
        if symbol == u64(0):
            left[first] = _NEVER
        else:
            rest, acc, fill, e = _take(_EXTRA[symbol - u64(1)], extras, acc, fill, e, e_end)
            left[first] = i32(_LEAST[symbol - u64(1)] + rest)
    i = u64(0)
    while True:
        while i < n:
            a = base[i]
            c = u64(contexts[(u64(a) >> shift) & mask])
            k = left[c]
            left[c] = k - i32(1)
            out[i] = a
            if k == 0:
                break
            i += u64(1)
        if i >= n:
            break
        slot = u64(value_slots[c, y & _LOW])
        y, w = _pop(y, slot, words, w, w_end)
        number = _LEAST[slot >> u64(24)]
        bits = _EXTRA[slot >> u64(24)]
        moved = u64(0)
        if bits > u64(32):
            rest, acc, fill, e = _take(u64(32), extras, acc, fill, e, e_end)
            number += rest
            moved = u64(32)
            bits -= u64(32)
        rest, acc, fill, e = _take(bits, extras, acc, fill, e, e_end)
        number += rest << moved
        out[i] = _changed(u64(a), number + u64(1), top, full, negative, positive)
        slot = u64(gap_slots[c, x & _LOW])
        x, w = _pop(x, slot, words, w, w_end)
        symbol = slot >> u64(24)
        if symbol == u64(0):
            left[c] = _NEVER
        else:
            rest, acc, fill, e = _take(_EXTRA[symbol - u64(1)], extras, acc, fill, e, e_end)
            left[c] = i32(_LEAST[symbol - u64(1)] + rest)
        i += u64(1)
    done = x == _LEAST_STATE and y == _LEAST_STATE and w == w_end and e == e_end and acc == u64(0)
    return 0 if done else 1


@compiled(error_model="numpy")
def find_values(base, tuned, rules, contexts, events):  # type: ignore[no-untyped-def]
    """The differences of all elements of a block; fills contexts, classes and numbers of ``events``."""
    homes, _, _, classes, numbers = events
    shift, mask, top, full, negative, positive = rules
    for i in range(base.shape[0]):
        a = u64(base[i])
        number = _difference(a, u64(tuned[i]), top, full, negative, positive)
        homes[i] = contexts[(a >> shift) & mask]
        classes[i] = _class_of(number)
        numbers[i] = number


@compiled(error_model="numpy")
def encode_values(n, events, value_table, words, extras):  # type: ignore[no-untyped-def]
    """Code the differences of `find_values`; returns how many ``words`` and ``extras`` it wrote.

    Elements with even and odd positions have a state each.
    """
    homes, _, _, classes, numbers = events
    acc, fill, e = u64(0), u64(0), 0
    for i in range(n):
        bits = _EXTRA[classes[i]]
        number = numbers[i]
        if bits > u64(32):
            acc, fill, e = _put(number, u64(32), extras, acc, fill, e)
            number >>= u64(32)
            bits -= u64(32)
        acc, fill, e = _put(number, bits, extras, acc, fill, e)
    if fill:
        extras[e] = u32(acc)
        e += 1
    x, y, w = _LEAST_STATE, _LEAST_STATE, 0
    if n & 1:
        c, symbol = homes[n - 1], classes[n - 1]
        x, w = _push(x, value_table[c, symbol], words, w)
    for i in range(n // 2 * 2 - 1, 0, -2):
        c, symbol = homes[i], classes[i]
        y, w = _push(y, value_table[c, symbol], words, w)
        c, symbol = homes[i - 1], classes[i - 1]
        x, w = _push(x, value_table[c, symbol], words, w)
    return _end(x, y, words, w), e


@compiled(error_model="numpy")
def decode_values(base, out, rules, contexts, value_slots, words, extras):  # type: ignore[no-untyped-def]
    """As `decode_changes`, of what `encode_values` coded."""
    shift, mask, top, full, negative, positive = rules
    n, w_end, e_end = u64(base.shape[0]), words.shape[0] - 1, extras.shape[0] - 1
    if w_end < 4:
        return 1
    x = (u64(words[0]) << u64(16)) | u64(words[1])
    y = (u64(words[2]) << u64(16)) | u64(words[3])
    w, e = 4, 0
    acc, fill = u64(0), u64(0)
    i = u64(0)
    while i < n:
        a = u64(base[i])
        slot = u64(value_slots[contexts[(a >> shift) & mask], x & _LOW])
        z, w = _pop(x, slot, words, w, w_end)
        x, y = y, z  # the two states take turns
        number = _LEAST[slot >> u64(24)]
        bits = _EXTRA[slot >> u64(24)]
        moved = u64(0)
        if bits > u64(32):
            rest, acc, fill, e = _take(u64(32), extras, acc, fill, e, e_end)
            number += rest
            moved = u64(32)
            bits -= u64(32)
        rest, acc, fill, e = _take(bits, extras, acc, fill, e, e_end)
        out[i] = _changed(a, number + (rest << moved), top, full, negative, positive)
        i += u64(1)
    done = x == _LEAST_STATE and y == _LEAST_STATE and w == w_end and e == e_end and acc == u64(0)
    return 0 if done else 1
