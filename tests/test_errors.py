"""Messages of errors: one line and a hint, whatever is in the names; system errors name their file."""

from __future__ import annotations

import errno
import os

import pytest

import neftsurgery as ns
from neftsurgery.errors import MachineError, MismatchError, UsageError, boundary, keyword, naming

EVIL = "a\nb\r\x1b[31m\u202e\u200bc"
SHOWN = r"a\nb\r\x1b[31m\u202e\u200bc"


def test_a_message_has_one_line_and_a_hint_whatever_is_in_it() -> None:
    error = MismatchError(EVIL, file=EVIL, tensor=EVIL, expected=EVIL, found=EVIL, hint=EVIL)
    assert str(error).split("\n") == [
        f"{SHOWN}, tensor {SHOWN}: {SHOWN} (expected {SHOWN}, found {SHOWN})",
        SHOWN,
    ]


def test_names_are_not_taken_for_options() -> None:
    error = UsageError("[[policy]] is wrong", file="[[a]].safetensors", tensor="[[b=1]]", found="[[c]]")
    assert str(error) == "[[a]].safetensors, tensor [[b=1]]: policy is wrong (found [[c]])"
    assert error.text(keyword) == str(error)


@pytest.mark.parametrize(("name", "shown"), [("", "''"), (" ", "' '"), ("a b", "a b")])
def test_an_empty_name_is_seen(name: str, shown: str) -> None:
    assert str(UsageError("no such file", file=name)) == f"{shown}: no such file"


def test_an_error_without_a_file_name_gets_one() -> None:
    def fail(error: OSError) -> OSError:
        with pytest.raises(OSError) as caught, naming("outer"), naming("inner"):
            raise error
        return caught.value

    assert fail(OSError(errno.EIO, "Input/output error")).filename == "inner"
    assert fail(OSError(errno.EIO, "Input/output error", "known")).filename == "known"
    assert fail(MachineError("ours", file="x")).filename is None


def test_the_kernel_names_no_file_of_a_descriptor_and_we_do() -> None:
    @boundary
    def work() -> None:
        with naming("the-file"):
            os.pread(1 << 20, 1, 0)

    with pytest.raises(ns.MachineError, match=r"^the-file: bad file descriptor$"):
        work()
