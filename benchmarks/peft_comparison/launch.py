"""Runs a script of PEFT's comparison with our method registered.

``python launch.py run.py -v experiments/neft/NAME``; or, with PEFT's Makefile,
``make PYTHON="python .../launch.py" results/neft--NAME.json``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def run_script(arguments: list[str]) -> None:
    """Runs ``arguments[0]`` as Python does, after the import that registers the method."""
    import neftsurgery.peft  # noqa: F401

    script = Path(arguments[0]).resolve()
    sys.argv = [str(script), *arguments[1:]]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1:])
