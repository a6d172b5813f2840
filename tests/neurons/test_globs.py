"""Names by pattern."""

from __future__ import annotations

import time

import pytest
from test_anatomy import LLAMA, infos, llama

from neftsurgery.errors import UsageError
from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.neurons.globs import matching


def test_patterns_match_whole_names_and_case() -> None:
    for option in ({"include": ["embed_tokens"]}, {"only": ["MODEL*"]}, {"axis": {"layers": 0}}):
        with pytest.raises(UsageError, match="no tensor matches"):
            read_anatomy("rows", llama(1), LLAMA, **option)  # type: ignore[arg-type]


def test_thousands_of_plain_names_are_looked_up_not_searched() -> None:
    tensors = infos({f"layers.{n}.mlp.up_proj.weight": (2, 3) for n in range(20_000)})
    started = time.process_time()
    assert len(read_anatomy("rows", tensors, LLAMA, only=list(tensors)).scored) == 20_000
    assert time.process_time() - started < 5


def test_a_pattern_without_a_match_is_refused_where_it_names_an_option() -> None:
    assert matching(["*.x", "b"], {"a.x", "b", "c"}) == {"a.x", "b"}
    assert matching("a.x", {"a.x", "b"}) == {"a.x"}
    assert matching(["no"], {"a.x"}) == set()
    with pytest.raises(UsageError, match=r"no tensor matches include '\*\.y'"):
        matching(["a.x", "*.y"], {"a.x"}, option="include")
