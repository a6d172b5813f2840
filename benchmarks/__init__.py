"""Benchmarks that anyone can run: this tool, the physical limit, and what people use instead, in one run.

``python -m benchmarks files``, ``training``, ``selection``, ``lossless`` and ``quantized`` measure.
``python -m benchmarks render`` makes the pages again from stored results. All take ``--help``. The folders:

* ``harness``: measures one process, runs contestants side by side, controls the page cache, stores results.
  Standard library only, so that the measuring process stays small (see ``harness.process``).
* ``checkpoints``: writes the checkpoints.
* ``limits``, ``rivals``: what this tool is compared with. Each is a script that runs in its own process.
* ``files``: the suite for commands on files: diff, extract, apply, in place.
* ``training``: the suite for training steps.
* ``selection``: the experiment on which neurons to train.
* ``lossless``: the suite for lossless patches: size and speed beside general compressors and the entropy.
* ``quantized``: the suite for quantized checkpoints: diff beside plain reads and torch.
* ``page``: turns results into ``docs/benchmarks.md``, ``docs/benchmarks-training.md``,
  ``docs/benchmarks-lossless.md``, ``docs/benchmarks-quantized.md``, ``docs/results.md`` and charts.

Tests run each suite once, very small (``tests/benchmarks``). Not tested are the parts of the files suite that
only repeat commands at other sizes, and the rivals that need mergekit, which the tests do not install.
"""
