"""One contestant as a process: builds its model, then steps on request.

``python -m benchmarks.training.worker JOB``, with JOB as JSON. Each line of stdin is a number of steps; the
answer is a JSON line on stdout. The first line of stdout says that the worker is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

from benchmarks.harness import memory

WARM_UP = 2


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    job = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    import torch

    import benchmarks.training.contestants  # noqa: F401  the measured memory excludes imports

    if "peft" in job["needs"]:
        import peft  # noqa: F401
    imported = memory.resident()
    trainer = _Trainer(job)
    _reset_peak(torch, job["device"])
    for _ in range(WARM_UP):
        trainer.step()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        began = time.process_time()
        seconds = [trainer.step() for _ in range(int(line))]
        cpu = time.process_time() - began
        print(json.dumps({"seconds": seconds, "cpu": cpu, **trainer.facts(imported)}), file=answers)


class _Trainer:
    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from benchmarks.training import contestants, models

        self._torch, self._device = torch, job["device"]
        self._ids = models.batch(job)
        model = models.build(job)
        self._method = contestants.prepare(job["contestant"], model)
        self._optimizer = (
            torch.optim.AdamW(self._method.parameters, lr=1e-5, weight_decay=0.0, fused=True)
            if self._method.parameters
            else None
        )

    def step(self) -> float:
        """One whole step; returns its seconds."""
        self._wait()
        began = time.perf_counter()
        loss = self._method.model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._method.before_step()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def facts(self, imported: int) -> dict[str, int]:
        """Peak bytes of the process or device since the model was built, and sizes of what is trained."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        optimizer = sum(
            value.numel() * value.element_size()
            for state in states
            for value in state.values()
            if isinstance(value, self._torch.Tensor)
        )
        on_device = self._device == "cuda"
        peak = self._torch.cuda.max_memory_allocated() if on_device else memory.peak() - imported
        return {"peak": peak, "trainable": self._method.trainable, "optimizer_bytes": optimizer}


def _reset_peak(torch: Any, device: str) -> None:
    """Starts a new peak, since building the model briefly takes more memory, with every method."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.reset_peak()


if __name__ == "__main__":
    main()
