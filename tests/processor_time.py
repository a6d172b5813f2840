"""The processor time of every test file, with the processes that it starts: the costliest are listed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest


def used() -> float:
    """Seconds of processor time of this process and of those it has waited for."""
    return sum(os.times()[:4])


class ProcessorTime:
    """A plugin that sums processor time by file, whichever process of the run a test runs in."""

    def __init__(self) -> None:
        self.last = used()
        self.files: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = used()
        report.processor_seconds, self.last = now - self.last, now
        return report

    def pytest_collection_finish(self) -> None:
        self.last = used()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.files[report.nodeid.partition("::")[0]] += report.processor_seconds

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"processor time: {sum(self.files.values()):.0f} s, of which")
        for file, seconds in self.files.most_common(15):
            terminalreporter.write_line(f"{seconds:7.1f} s  {file}")
