"""The page in a browser: no errors, no requests, and every figure at every width."""

from __future__ import annotations

import numpy as np
import pytest
from chromium import browser, find_chromium
from report_support import write_scores

import neftsurgery as ns
from neftsurgery.demo.planted import make_base, make_tuned
from neftsurgery.neuron_utilization.report_section import utilization_section
from neftsurgery.neuron_utilization.result import TensorUtilization, Utilization, with_ranks
from neftsurgery.neurons.layout import Layout
from neftsurgery.reporting.report import plan_report
from neftsurgery.tensors.header import TensorInfo

_LOOK = """({
  pictures: [...document.querySelectorAll('figure')].map(figure => {
    const shown = figure.querySelector('.picture svg') ?? figure.querySelector('table');
    const box = shown.getBoundingClientRect();
    return [figure.id, box.width, box.height, figure.querySelectorAll('tbody tr').length];
  }),
  ids: [...document.querySelectorAll('[id]')].map(element => element.id),
  wide: document.documentElement.scrollWidth,
  scripts: document.scripts.length,
  background: getComputedStyle(document.body).backgroundColor,
  text: document.body.innerText,
  ink: [...new Set([...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill))],
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(find_chromium(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's scores and patch."""
    folder = tmp_path_factory.mktemp("demo")
    make_tuned(folder / "tuned", make_base(folder / "base"))
    pair = folder / "base", folder / "tuned"
    ns.diff(*pair, out=folder / "scores.safetensors").close()
    ns.extract(*pair, neurons=64, out=folder / "neuron_patch.safetensors").close()
    return folder


def check(page, file, made):
    page.requests.clear()
    page.complaints.clear()
    for width in (1280, 400):
        for dark in (False, True):
            page.show(width=width, dark=dark)
            page.open(file)
            seen = page.evaluate(_LOOK)
            assert [name for name, *_ in seen["pictures"]] == list(made.figures)
            assert all(across > 200 and high > 20 and rows for _, across, high, rows in seen["pictures"])
            tables = ("sensitive", "forms")
            assert all(across <= 640 for name, across, *_ in seen["pictures"] if not name.startswith(tables))
            assert seen["wide"] <= width
            assert len(set(seen["ids"])) == len(seen["ids"])
            assert seen["scripts"] == 0
            brightness = [
                int(part) for part in seen["background"].removeprefix("rgb(").rstrip(")").split(",")
            ]
            assert (sum(brightness) < 150) is dark
            for figure in made.figures.values():
                assert figure.title in seen["text"]
                assert figure.reading in seen["text"]
                assert figure.units in seen["text"]
    assert page.complaints == []
    assert all(request == file.as_uri() or request.startswith("data:") for request in page.requests)
    return seen


@pytest.mark.slow
def test_the_demos_pair(page, demo, tmp_path):
    made = ns.report(
        [demo / "scores.safetensors", demo / "neuron_patch.safetensors"],
        out=tmp_path / "report.html",
        neurons=64,
    )
    assert len(made.figures) == 7 + 1 + 2
    check(page, tmp_path / "report.html", made)
    shared = made.describe()["figures"]["overlap"]["rows"][0]
    assert (shared["shared"], shared["jaccard"]) == (64, 1.0)


@pytest.mark.slow
def test_a_lossless_patch(page, demo, tmp_path):
    ns.extract(demo / "base", demo / "tuned", lossless=True, out=tmp_path / "whole.safetensors").close()
    made = ns.report(tmp_path / "whole.safetensors", out=tmp_path / "report.html")
    assert list(made.figures) == ["changed", "stored", "forms"]
    seen = check(page, tmp_path / "report.html", made)
    assert "mlp.gate_proj" in seen["text"]


@pytest.mark.slow
def test_two_fine_tunes_of_textgenrnn(page, shared_data, tmp_path):
    models = shared_data / "checkpoints" / "textgenrnn"
    files = []
    for name in ("hacker_news", "reddit_apple_android"):
        files.append(tmp_path / f"{name}.safetensors")
        ns.diff(
            models / "base.safetensors",
            models / f"{name}.safetensors",
            axis={"*kernel": 1},
            out=files[-1],
        ).close()
    made = ns.report(files, out=tmp_path / "report.html", neurons="5%")
    assert len(made.figures) == 7 + 7 + 2
    check(page, tmp_path / "report.html", made)


@pytest.mark.slow
def test_hostile_names_are_only_text(page, tmp_path, rng_scores):
    """Tensor names, file names and facts are text, whatever they contain."""
    hostile = "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"
    tensors, widths = rng_scores(
        [f"layers.{i}.{hostile}" for i in range(2)] + ["$x^{$", "{{ 7*7 }}", "\x1b[2J", "a&b;"]
    )
    file = tmp_path / "a'b\"<b>&.safetensors"
    write_scores(
        file,
        tensors,
        widths,
        anatomy=hostile,
        base={"name": "<svg onload=alert(2)>"},
        tuned={"repo": hostile},
    )
    made = ns.report(file, out=tmp_path / "page.html", neurons="50%")
    seen = check(page, tmp_path / "page.html", made)
    assert page.evaluate("document.title") == "a'b\"<b>&.safetensors"
    assert "{{ 7*7 }}" in seen["text"]
    assert "$x^{$" in seen["text"]


@pytest.fixture
def rng_scores():
    import numpy as np

    def make(names):
        rng = np.random.default_rng(0)
        tensors = {}
        for name in names:
            base = rng.random(30) + 0.5
            tensors[name] = {"score": rng.random(30), "base_sq": base, "delta_sq": base * rng.random(30)}
        return tensors, dict.fromkeys(names, 4)

    return make


def made_up_utilization(layers, kinds, count, rng):
    """The utilization of a made-up model with hostile names."""
    tensors = []
    for layer in range(layers):
        for kind in kinds:
            info = TensorInfo(f"model.layers.{layer}.{kind}.weight", "F32", (count, 8))
            before = rng.random(count)
            after = before + 0.02 * layer * rng.standard_normal(count)
            small, large = np.zeros(count, np.int32), np.zeros(count, np.int64)
            place = info, Layout.of(info.shape, (0,)), f"model.layers.{layer}", kind
            trained = rng.random(count) < 0.1
            tensors.append(TensorUtilization(*place, before, after, small, small, large, large, trained))
    facts = {"states": "preceding", "strongly": "5%", "patch": {"outside": 3}}
    return Utilization(with_ranks(tensors), facts | {"text": {"name": "<b>.txt", "texts": 3, "tokens": 60}})


@pytest.mark.slow
def test_a_utilization(page, demo, tmp_path):
    found = made_up_utilization(
        32, ["mlp.up_proj", "<script>alert(1)</script>"], 40, np.random.default_rng(0)
    )
    assert found.groups()["indirectly_affected"].neurons > 100
    made = ns.report(
        demo / "neuron_patch.safetensors",
        more=[utilization_section(found, "Use of neurons")],
        out=tmp_path / "report.html",
    )
    assert list(made.figures) == ["map", "use-groups", "use-buckets", "use-map"]
    seen = check(page, tmp_path / "report.html", made)
    assert "trained, not ranked" in seen["text"]
    assert "<script>alert(1)</script>" in seen["text"]


@pytest.mark.slow
def test_a_utilization_in_which_no_neuron_moved(page, tmp_path):
    """Figures without data are drawn empty."""
    found = made_up_utilization(1, ["mlp.up_proj"], 3, np.random.default_rng(0))
    plan = plan_report([], out=tmp_path / "report.html", other_inputs=["base"])
    made = plan.run(more=[utilization_section(found, "Use of neurons")])
    seen = check(page, tmp_path / "report.html", made)
    assert "No neuron is strongly affected." in seen["text"]
