"""Imports the package once and forks a child for each run, so that a run costs only what its verb costs.

Runs as a program. Each line on standard input is a job, as JSON; each line on standard output is its
outcome. A job is a verb of the Python API or a command line. A signal may follow after some time, and a
system call may fail where `faults.c` is preloaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import time
from typing import Any

VERBS = ("apply", "revert", "extract", "merge", "export_lora")


def main() -> None:
    import neftsurgery as ns
    from neftsurgery.cli.main import run

    verbs = {name: getattr(ns, name) for name in VERBS}
    if "--torch" in sys.argv:
        import torch
        import transformers

        import neftsurgery.training.train_plan

        torch.set_num_threads(1)  # a fork does not take the threads of a pool along
        assert all((transformers.Trainer, neftsurgery.training.train_plan))
    shared = mmap.mmap(-1, 16)
    with contextlib.suppress(OSError):
        sys.stdin.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    warm(ns)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        shared[:] = bytes(16)
        child = os.fork()
        if not child:
            work(job, verbs, run, shared)
        if job.get("after") is not None:
            time.sleep(job["after"])
            os.kill(child, job["signal"])  # not waited for yet, so the number is still this child's
        _, ended, usage = os.wait4(child, 0)
        status, peak = os.waitstatus_to_exitcode(ended), usage.ru_maxrss * 1024
        seen, hit = (int.from_bytes(shared[place : place + 8], "little") for place in (0, 8))
        print(json.dumps({"status": status, "seen": seen, "hit": hit, "peak": peak}), flush=True)


def warm(ns: Any) -> None:
    """Before the first fork, import and compile what commands import and compile when they run."""
    import importlib
    import tempfile

    import numpy as np
    from safetensors.numpy import save_file

    from neftsurgery.cli.main import _COMMANDS

    for name in _COMMANDS.keys() - {"train", "demo"}:
        importlib.import_module(f"neftsurgery.cli.commands.{name}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{side}" for side in "ab"]
        for number, path in enumerate(paths):
            save_file({"a.weight": np.full((4, 4), number, np.float32), "b": np.ones(4, np.float32)}, path)
        ns.diff(*paths, out=f"{folder}/scores").close()
        ns.report(f"{folder}/scores", out=f"{folder}/report.html")
        ns.extract(*paths, lossless=True, out=f"{folder}/patch").close()
        ns.apply(paths[0], f"{folder}/patch", out=f"{folder}/out")


def work(job: dict[str, Any], verbs: dict[str, Any], run: Any, shared: mmap.mmap) -> None:
    """Runs in the child. Never returns."""
    code = 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # until the command line has handlers of its own
    try:
        for number in (1, 2):
            os.dup2(os.open(job["log"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(job.get("environment", {}))
        if job.get("cwd"):
            os.chdir(job["cwd"])
        if job.get("files"):
            resource.setrlimit(resource.RLIMIT_NOFILE, (job["files"], job["files"]))
        if job.get("seconds"):
            signal.alarm(job["seconds"])  # ends the process
        if "fault" in job:
            arm(job["fault"])
        code = execute(job, verbs, run)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    except SystemExit as left:  # a signal that came when all was done
        code = int(left.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if "fault" in job:
            library = ctypes.CDLL(None)
            library.faults_disarm()
            for place, count in ((0, library.faults_seen), (8, library.faults_hit)):
                count.restype = ctypes.c_long
                shared[place : place + 8] = count().to_bytes(8, "little")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def arm(fault: dict[str, Any]) -> None:
    function = ctypes.CDLL(None).faults_arm
    function.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    function(os.fsencode(fault["root"]), fault["kinds"], fault["nth"], fault["style"], fault["number"])


def execute(job: dict[str, Any], verbs: dict[str, Any], run: Any) -> int:
    if "words" in job:
        try:
            run(job["words"])
        except SystemExit as left:
            return int(left.code or 0)
    import neftsurgery as ns

    options = dict(job["options"])
    if "selection" in options:
        options["selection"] = ns.Selection.load(options["selection"])
    verbs[job["verb"]](*job["arguments"], **options)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also as the background job of a script
    main()
