"""The coding of one block, compiled: differences against a base, symbols to code, and back.

An element's difference is that of its bits and the base's, both ordered by value, as a zigzag number. The
symbols of a table stand for ranges of numbers: a symbol is coded by rANS (Duda, "Asymmetric numeral systems",
arXiv:1311.2540) with static frequencies per context, which follows from the base element's exponent; the
place within its range is plain bits. `docs/patch-format.md` specifies all of it.

Two kinds of block: where few elements change, each context has the gaps between its changes; where many do,
every element has its difference. Integers only: float comparison and arithmetic lose -0 and NaN payloads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..tensors.compiled import compiled
from .elements import CHUNK, CLASSES, FINE, HASH, NEVER, PRECISION

u16, u32, u64, i64 = np.uint16, np.uint32, np.uint64, np.int64
_LOW = u64((1 << PRECISION) - 1)
_LEAST_STATE = u64(1 << 15)
_HALF = u64(0xFFFFFFFF)
_WORD = u64(0xFFFF)
_PLAIN = u64(0xFF << 32)
_SYMBOL = u64(0xFF)
_TOP = u64(FINE - 1)


#: Without counts of references: the compiler cannot remove all of them from loops that branch.
_inlined = numba.njit(error_model="numpy", forceinline=True, _nrt=False)  # type: ignore[call-overload]


@intrinsic
def _leading_zeros(typing_context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


# What follows branches on what is coded only where that is rarely mispredicted.


@_inlined
def _mask(condition):  # type: ignore[no-untyped-def]
    """All bits if the condition holds, else none."""
    return u64(0) - u64(condition)


@_inlined
def _hash(number):  # type: ignore[no-untyped-def]
    return (number * u64(0x9E3779B97F4A7C15)) >> u64(64 - HASH)


# `Elements.rules` is unpacked once per kernel: the compiler cannot know that writing leaves it alone.


@_inlined
def _place(element, top, negative, positive):  # type: ignore[no-untyped-def]
    """The place of an element in the order of values."""
    return element ^ positive ^ ((negative ^ positive) & _mask((element & top) != u64(0)))


@_inlined
def _changed(base, zigzag, top, full, negative, positive):  # type: ignore[no-untyped-def]
    """The element at a difference from ``base``: the inverse of `differences`."""
    d = (zigzag >> u64(1)) ^ (full & _mask((zigzag & u64(1)) != u64(0)))
    place = (_place(base, top, negative, positive) + d) & full
    # Places of positive elements have the highest bit: it was flipped, or the order is that of the bits.
    return place ^ negative ^ ((negative ^ positive) & _mask((place & top) != u64(0)))


@compiled(error_model="numpy", _nrt=False)
def differences(base, tuned, rules, numbers):  # type: ignore[no-untyped-def]
    """Fill ``numbers`` with the zigzag numbers of the differences of two blocks' places."""
    _, _, top, full, negative, positive = rules
    for i in range(base.shape[0]):
        there = _place(u64(base[i]), top, negative, positive)
        d = (_place(u64(tuned[i]), top, negative, positive) - there) & full
        numbers[i] = ((d << u64(1)) & full) ^ (full & _mask((d & top) != u64(0)))


@compiled(error_model="numpy", _nrt=False)
def enter(numbers, hot):  # type: ignore[no-untyped-def]
    """Put ``numbers`` into the hash table ``hot``; of two with one hash, the first."""
    hot[:] = 0
    hot[0] = 1  # 0 has this place: no number is in its own but those that are put there
    for i in range(len(numbers)):
        place = _hash(u64(numbers[i]))
        if hot[place] == u64(place == u64(0)):
            hot[place] = numbers[i]


@compiled(error_model="numpy", _nrt=False)
def classify(numbers, hot, classes):  # type: ignore[no-untyped-def]
    """Fill ``classes``: fine ones, but for the numbers in the hash table ``hot``, which may be empty."""
    for i in range(len(numbers)):
        number = u64(numbers[i])
        octave = u64(63) - _leading_zeros(number | (u64(1) << _TOP)) - _TOP
        classes[i] = u16((octave << _TOP) + (number >> octave))
    if len(hot) > 0:
        for i in range(len(numbers)):
            place = _hash(u64(numbers[i]))
            if hot[place] == u64(numbers[i]):
                classes[i] = u64(CLASSES) + place


@compiled(error_model="numpy", _nrt=False)
def count(bits, rules, classes, counts):  # type: ignore[no-untyped-def]
    """Add to ``counts``, ``[exponents, classes]``, what comes with the exponents of ``bits``."""
    shift, mask, _, _, _, _ = rules
    for i in range(len(classes)):
        counts[(u64(bits[i]) >> shift) & mask, u64(classes[i])] += u32(1)


@_inlined
def _put(number, bits, extras, acc, fill, n):  # type: ignore[no-untyped-def]
    """Append the lowest ``bits`` of a number."""
    if bits > u64(32):
        acc |= (number & _HALF) << fill
        extras[n] = u32(acc & _HALF)
        acc >>= u64(32)
        number >>= u64(32)
        bits -= u64(32)
        n += u64(1)
    acc |= (number & ((u64(1) << bits) - u64(1))) << fill
    fill += bits
    extras[n] = u32(acc & _HALF)
    full = fill >> u64(5)
    return acc >> (full << u64(5)), fill & u64(31), n + full


@_inlined
def _push(state, entries, place, words, w):  # type: ignore[no-untyped-def]
    """Put a symbol into a rANS state: row ``place`` of `tables.Alphabet.encoding`. Words go to the front."""
    full = u64(state >= entries[place, 0])
    words[w - u64(1)] = u16(state & _WORD)
    state >>= full << u64(4)
    whole = (state * entries[place, 1]) >> (entries[place, 2] & u64(63))
    return state + whole * (entries[place, 3] & _WORD) + (entries[place, 3] >> u64(16)), w - full


@_inlined
def _close(state, words, w):  # type: ignore[no-untyped-def]
    words[w - u64(1)] = u16(state & _WORD)
    words[w - u64(2)] = u16(state >> u64(16))
    return w - u64(2)


@_inlined
def _open(words, w):  # type: ignore[no-untyped-def]
    return (u64(words[w]) << u64(16)) | u64(words[w + u64(1)]), w + u64(2)


@_inlined
def _pop(state, home, symbols, entries, words, w):  # type: ignore[no-untyped-def]
    """Take a symbol out of a rANS state; returns its entry, see `tables.Alphabet.decoding`."""
    slot = state & _LOW
    symbol = (home << u64(8)) + u64(symbols[(home << u64(PRECISION)) + slot])
    entry = entries[symbol]
    state = (entry & _WORD) * (state >> u64(PRECISION)) + slot - ((entry >> u64(16)) & _WORD)
    longer = (state << u64(16)) | u64(words[w])
    low = state < _LEAST_STATE
    return longer if low else state, entry, w + u64(low)


@_inlined
def _take(bits, extras, acc, fill, e):  # type: ignore[no-untyped-def]
    """The next ``bits`` plain bits. They come from the back of the code."""
    number, moved = u64(0), u64(0)
    if bits > u64(32):
        number = (acc | (u64(extras[e]) << fill)) & _HALF
        acc = u64(extras[e]) >> (u64(32) - fill)
        e -= u64(1)
        moved = u64(32)
        bits -= u64(32)
    short = u64(fill < bits)
    acc |= (u64(extras[e]) * short) << fill
    fill += short << u64(5)
    number |= (acc & ((u64(1) << bits) - u64(1))) << moved
    return number, acc >> bits, fill - bits, e - short


@compiled(error_model="numpy", _nrt=False)
def find_changes(base, numbers, rules, contexts, homes, gaps, changes, most, last, since):  # type: ignore[no-untyped-def]
    """The events of a block in order: first one per context, then one per change.

    ``homes`` gets the context of each; ``gaps`` how many elements of the context come before its next change,
    `NEVER` if none follows; ``changes`` the difference, 0 for the first ones.
    """
    shift, mask, _, _, _, _ = rules
    for first in range(most):
        homes[first] = first
        changes[first] = 0
        last[first] = first
    n = u64(most)
    for i in range(u64(base.shape[0])):
        c = u64(contexts[(u64(base[i]) >> shift) & mask])
        if numbers[i] == 0:
            since[i & u64(3), c] += 1  # four counters: to add to the same one again takes its time
        else:
            gaps[last[c]] = since[0, c] + since[1, c] + since[2, c] + since[3, c]
            since[:, c] = 0
            changes[n] = numbers[i]
            homes[n] = c
            last[c] = n
            n += u64(1)
    for context in range(most):
        gaps[last[context]] = NEVER


@compiled(error_model="numpy", _nrt=False)
def encode_changes(n, most, homes, gaps, changes, steps, kinds, gap_code, code, words, extras):  # type: ignore[no-untyped-def]
    """Code ``n`` events of `find_changes`; ``steps`` and ``kinds`` are the classes of gaps and changes.

    Returns where ``words`` begin, and how many ``extras`` come. Classes are replaced by places in tables.
    """
    _, gap_places, gap_least, gap_bits, gap_entries = gap_code
    _, places, least, bits, entries = code
    acc, fill, e = u64(0), u64(0), u64(0)
    for i in range(n):
        c = u64(homes[i])
        if i >= most:
            place = u64(places[c, kinds[i]])
            kinds[i] = place
            symbol = place & _SYMBOL
            if bits[symbol] > 0:
                acc, fill, e = _put(u64(changes[i]) - least[symbol], bits[symbol], extras, acc, fill, e)
        place = u64(gap_places[c, steps[i]])
        steps[i] = place
        symbol = place & _SYMBOL
        if gap_bits[symbol] > 0:
            acc, fill, e = _put(u64(gaps[i]) - gap_least[symbol], gap_bits[symbol], extras, acc, fill, e)
    if fill:
        extras[e] = u32(acc)
        e += u64(1)
    x, y, w = _LEAST_STATE, _LEAST_STATE, u64(words.shape[0])
    for i in range(n - 1, -1, -1):
        x, w = _push(x, gap_entries, u64(steps[i]), words, w)
        if i >= most:
            y, w = _push(y, entries, u64(kinds[i]), words, w)
    w = _close(y, words, w)
    return _close(x, words, w), e


@compiled(error_model="numpy", _nrt=False)
def decode_changes(base, out, rules, contexts, most, gap_code, code, words, w, extras, e, left):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the block that `encode_changes` coded; ``words`` are read from ``w`` up, ``extras``
    from ``e`` down. Returns where they end, and whether both states and the plain bits end as they should.

    It stops where they have passed each other: around them is as much as a chunk takes.
    """
    gap_least, gap_symbols, gap_entries = gap_code
    least, symbols, entries = code
    shift, mask, top, full, negative, positive = rules
    n = u64(base.shape[0])
    w, e = u64(w), u64(e)
    x, w = _open(words, w)
    y, w = _open(words, w)
    acc, fill = u64(0), u64(0)
    for first in range(most):
        x, entry, w = _pop(x, u64(first), gap_symbols, gap_entries, words, w)
        rest, acc, fill, e = _take((entry >> u64(32)) & u64(255), extras, acc, fill, e)
        left[first] = i64((gap_least[entry >> u64(40)] + rest) & _HALF)
    i = u64(0)
    while i < n and w <= u64(2) * (e + u64(1)):
        a = u64(base[i])
        c = u64(contexts[(a >> shift) & mask])
        k = left[c]
        left[c] = k - 1
        if k == 0:
            y, entry, w = _pop(y, c, symbols, entries, words, w)
            rest, acc, fill, e = _take((entry >> u64(32)) & u64(255), extras, acc, fill, e)
            number = (least[entry >> u64(40)] + rest) & full
            a = _changed(a, number, top, full, negative, positive)
            x, entry, w = _pop(x, c, gap_symbols, gap_entries, words, w)
            rest, acc, fill, e = _take((entry >> u64(32)) & u64(255), extras, acc, fill, e)
            left[c] = i64((gap_least[entry >> u64(40)] + rest) & _HALF)
        out[i] = a
        i += u64(1)
    return w, e, i == n and x == _LEAST_STATE and y == _LEAST_STATE and acc == u64(0)


@compiled(error_model="numpy", _nrt=False)
def encode_values(base, numbers, rules, contexts, code, kinds, wide, words, extras):  # type: ignore[no-untyped-def]
    """Code the ``numbers`` of all elements; ``kinds`` are their classes. Returns as `encode_changes`.

    ``wide`` is room for where those with plain bits are.
    """
    _, places, least, bits, entries = code
    shift, mask, _, _, _, _ = rules
    n, count = u64(base.shape[0]), u64(0)
    for i in range(n):
        place = u64(places[u64(contexts[(u64(base[i]) >> shift) & mask]), u64(kinds[i])])
        kinds[i] = place
        wide[count] = i
        count += u64(bits[place & _SYMBOL] > u64(0))
    acc, fill, e = u64(0), u64(0), u64(0)
    for k in range(count):
        i = u64(wide[k])
        symbol = u64(kinds[i]) & _SYMBOL
        acc, fill, e = _put(u64(numbers[i]) - least[symbol], bits[symbol], extras, acc, fill, e)
    if fill:
        extras[e] = u32(acc)
        e += u64(1)
    x, y, z, t = _LEAST_STATE, _LEAST_STATE, _LEAST_STATE, _LEAST_STATE
    w, i = u64(words.shape[0]), n
    while i > u64(0):
        i -= u64(1)
        v, w = _push(t, entries, u64(kinds[i]), words, w)
        x, y, z, t = v, x, y, z  # the states take turns
    w = _close(t, words, w)
    w = _close(z, words, w)
    w = _close(y, words, w)
    return _close(x, words, w), e


@compiled(error_model="numpy", _nrt=False)
def decode_values(base, out, rules, contexts, code, words, w, extras, e, found):  # type: ignore[no-untyped-def]
    """As `decode_changes`, of what `encode_values` coded. ``found`` is room for what is in a chunk."""
    shift, mask, top, full, negative, positive = rules
    least, symbols, entries = code
    numbers, wide = found
    w, e = u64(w), u64(e)
    x, w = _open(words, w)
    y, w = _open(words, w)
    z, w = _open(words, w)
    t, w = _open(words, w)
    acc, fill = u64(0), u64(0)
    n, start = u64(base.shape[0]), u64(0)
    while start < n and w <= u64(2) * (e + u64(1)):
        some = min(u64(CHUNK), n - start)
        count = u64(0)
        for i in range(some):
            home = u64(contexts[(u64(base[start + i]) >> shift) & mask])
            v, entry, w = _pop(x, home, symbols, entries, words, w)
            x, y, z, t = y, z, t, v  # the states take turns
            wide[count] = (entry & _PLAIN) | i
            numbers[i] = least[entry >> u64(40)]
            count += u64((entry & _PLAIN) != u64(0))
        for k in range(count):
            i = wide[k] & u64(0xFFFF)
            rest, acc, fill, e = _take(wide[k] >> u64(32), extras, acc, fill, e)
            numbers[i] += rest
        for i in range(some):
            out[start + i] = _changed(u64(base[start + i]), u64(numbers[i]), top, full, negative, positive)
        start += some
    done = x == _LEAST_STATE and y == _LEAST_STATE and z == _LEAST_STATE and t == _LEAST_STATE
    return w, e, start == n and done and acc == u64(0)
