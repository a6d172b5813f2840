"""The layer map as a figure and as text."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from matplotlib.image import imread

from neftsurgery.reporting.layer_map import LayerMap, layer_map_figure, layer_map_lines


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "$x_{1$", "<script>", "\x00\x1b[2J", "\ud800", "層.0.重", "9" * 400]
)
def test_any_name_can_be_drawn(name):
    found = LayerMap.of_counts({name: (1, 2), f"layers.0.{name}": (0, 3)})
    figure = layer_map_figure(found)
    assert imread(io.BytesIO(figure.png())).ndim == 3
    assert "<script>" not in figure.svg()
    assert all(line.isprintable() for line in layer_map_lines(found))


def test_a_figure_has_the_same_bytes_each_time():
    found = LayerMap.of_counts({f"layers.{i}.fc.weight": (i, 10) for i in range(5)})
    assert layer_map_figure(found).png() == layer_map_figure(found).png()
    assert layer_map_figure(found).svg() == layer_map_figure(found).svg()
    assert "<dc:date>" not in layer_map_figure(found).svg()


def test_the_map_as_text():
    found = LayerMap.of_counts({f"layers.{i}.fc.weight": (i, 8) for i in range(9)})
    lines = list(layer_map_lines(found))
    assert lines[0] == "fc   ▁▂▃▄▅▆▇█   50.0%"
    plain = list(layer_map_lines(found, blocks=False))
    assert plain[0] == "fc   .:-=+*#@   50.0%"
    assert all(line.isascii() for line in plain)
    assert len(next(layer_map_lines(found, layers=3)).split("  ")[1]) == 3
    assert list(layer_map_lines(LayerMap.of_counts({"a.0.b": (0, 3)}))) == []


def on_a_terminal(*words, cwd, **environment):
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", *words],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert done.wait(60) == 0
    return b"".join(parts).decode()


def test_diff_shows_a_small_map_on_a_terminal(neft, pair, tmp_path):
    assert "2 layers from left to right" not in neft("diff", "base", "tuned").out
    shown = on_a_terminal("diff", "base", "tuned", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert "2 layers from left to right" in shown
    assert "█" in shown
    plain = on_a_terminal("diff", "base", "tuned", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert "2 layers from left to right" in plain
    assert plain.isascii()
