"""One contestant, as a process: it builds its model, then steps when it is told to.

``python -m benchmarks.training.worker JOB``, JOB as JSON. Reads lines of stdin, a number of steps each, and
answers each with a JSON line on stdout; the first answer, unasked, says that it is ready.
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
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    job = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    import torch

    import benchmarks.training.ways  # noqa: F401  imports are no part of the memory that is measured

    if "peft" in job["needs"]:
        import peft  # noqa: F401
    imported = memory.resident()
    trainer = _Trainer(job)
    _forget_peak(torch, job["device"])
    for _ in range(WARM_UP):
        trainer.step()
    print(json.dumps({"ready": True}), file=told)
    for line in sys.stdin:
        seconds = [trainer.step() for _ in range(int(line))]
        print(json.dumps({"seconds": seconds, **trainer.facts(imported)}), file=told)


class _Trainer:
    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from benchmarks.training import models, ways

        self._torch, self._device = torch, job["device"]
        self._ids = models.batch(job)
        model = models.build(job)
        self._way = ways.prepare(job["contestant"], model)
        self._optimizer = (
            torch.optim.AdamW(self._way.parameters, lr=1e-5, weight_decay=0.0, fused=True)
            if self._way.parameters
            else None
        )

    def step(self) -> float:
        """One whole step; returns its seconds."""
        self._wait()
        began = time.perf_counter()
        loss = self._way.model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._way.before_step()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def facts(self, imported: int) -> dict[str, int]:
        """What was held so far: peak bytes of the process (or device) since the model was built."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        optimizer = sum(
            value.numel() * value.element_size()
            for state in states
            for value in state.values()
            if isinstance(value, self._torch.Tensor)
        )
        on_device = self._device == "cuda"
        peak = self._torch.cuda.max_memory_allocated() if on_device else memory.peak() - imported
        return {"peak": peak, "trainable": self._way.trainable, "optimizer_bytes": optimizer}


def _forget_peak(torch: Any, device: str) -> None:
    """From here on: building a model takes more for a moment, in each way alike."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.forget_peak()


if __name__ == "__main__":
    main()
