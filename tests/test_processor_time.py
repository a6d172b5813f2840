"""The list of the costliest test files."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from processor_time import ProcessorTime

WORK = "import time\nwhile time.process_time() < 0.3:\n    pass"


def report(plugin: ProcessorTime, nodeid: str) -> Any:
    """What pytest does with the report of one phase of a test."""
    made, steps = SimpleNamespace(nodeid=nodeid), plugin.pytest_runtest_makereport()
    next(steps)
    try:
        steps.send(made)
    except StopIteration as done:
        return done.value
    raise AssertionError


def test_processes_that_a_test_starts_count_for_its_file() -> None:
    plugin, lines = ProcessorTime(), []
    plugin.pytest_runtest_logreport(report(plugin, "a.py::one"))
    subprocess.run([sys.executable, "-c", WORK], check=True)
    plugin.pytest_runtest_logreport(report(plugin, "b.py::two[x::y]"))
    plugin.pytest_runtest_logreport(SimpleNamespace(nodeid="c.py::its worker died"))
    assert plugin.files["b.py"] > 0.2 > plugin.files["a.py"] >= 0 == plugin.files["c.py"]
    plugin.pytest_terminal_summary(SimpleNamespace(section=lines.append, write_line=lines.append))
    assert [line.split()[-1] for line in lines[1:]] == ["b.py", "a.py", "c.py"]
