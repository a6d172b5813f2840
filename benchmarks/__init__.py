"""Benchmarks that anyone can run: this tool, the physical limit, and what people use instead, in one run.

``python -m benchmarks files`` and ``python -m benchmarks training`` measure, ``python -m benchmarks render``
makes the pages again from what was measured; all take ``--help``. The folders:

* ``harness``: one process measured, contestants taking turns, the page cache, the results file. Standard
  library only, so that the process that measures stays small (see ``harness.process``).
* ``checkpoints``: makes the checkpoints.
* ``limits``, ``rivals``: what is compared with, every one a script and a process of its own.
* ``files``: the suite for commands on files: diff, extract, apply, in place.
* ``training``: the suite for training steps.
* ``page``: results to ``docs/benchmarks.md``, ``docs/benchmarks-training.md`` and charts.
"""
