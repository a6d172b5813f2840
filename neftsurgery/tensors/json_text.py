"""JSON that anyone may have written: parsed in memory that is in proportion to it, or refused.

A value takes up to forty times the memory of its text: ``[],[],...`` could take gigabytes. So they are
counted.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

# What CPython takes for a value, and for a key with its entry; in the worst case half as much again.
_VALUE_BYTES, _KEY_BYTES = 64, 100
#: The entry of a tensor in a header takes 7 to 13 times its bytes, and 700,000 entries take 700 MB.
_MOST_TIMES, _MOST_BYTES = 14, 700_000_000
_FREE_BYTES = 16 << 20


def loads(raw: bytes) -> Any:
    """Parse JSON in UTF-8. Duplicate keys, NaN, 1e999 and numbers of thousands of digits are refused.

    Raises a ``ValueError`` that continues a sentence: "the header is", "not valid JSON: ...".
    """
    require_bounded(raw)
    try:
        return json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("not valid JSON: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: byte {error.start} is not UTF-8 text") from error
    except ValueError as error:
        # Python refuses whole numbers of thousands of digits, and says how to lift that limit.
        raise ValueError(f"not valid JSON: {str(error).partition('; use')[0]}") from error


def require_bounded(raw: bytes) -> None:
    """Raise a ``ValueError`` if parsing ``raw`` may take far more memory than its size suggests."""
    values = sum(map(raw.count, (b",", b"[", b"{")))
    memory = _VALUE_BYTES * values + _KEY_BYTES * raw.count(b":")
    if memory > min(_FREE_BYTES + _MOST_TIMES * len(raw), _MOST_BYTES):
        raise ValueError(f"too large: its {values:,} values would take {memory / 1e9:.1f} GB of memory")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:200]!r} occurs twice")
    return result
