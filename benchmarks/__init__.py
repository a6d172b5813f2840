"""Benchmarks that anyone can run: this tool, the physical limit, and what people use instead, in one run.

``python -m benchmarks files`` measures, ``python -m benchmarks render`` makes the page again from what was
measured; both take ``--help``. The folders:

* ``harness``: one process measured, contestants taking turns, the page cache, the results file. Standard
  library only, so that the process that measures stays small (see ``harness.process``).
* ``checkpoints``: makes the checkpoints.
* ``limits``, ``rivals``: what is compared with, every one a script and a process of its own.
* ``files``: the suite for commands on files: diff, extract, apply, in place.
* ``page``: results to ``docs/benchmarks.md`` and charts.
"""
