"""The site builds without a warning and without a network, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from pages_support import ROOT

#: Addresses of the network are refused in the process that builds.
_ALONE = """
import runpy, socket, sys
def refused(*_):
    raise OSError("the site is built without a network")
socket.socket.connect = socket.getaddrinfo = refused
sys.argv = ["mkdocs", "build", "--strict", "--site-dir", sys.argv[1]]
runpy.run_module("mkdocs", run_name="__main__")
"""


def test_the_site(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"', text)
        assert not loaded, (page.name, loaded)
    commands = (tmp_path / "site" / "commands.html").read_text()
    assert 'id="extract"' in commands
    assert "--max-per-tensor" in commands
