"""Model cards as the Hub shows them, and the base and tensors that most tests use."""

from __future__ import annotations

from html.parser import HTMLParser

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from neftsurgery.sources.hub_id import HubId

COMMIT = "1f" * 20
KNOWN = HubId("org/base", COMMIT)
#: Neurons by tensor, in three layers of two kinds.
LLAMA = {
    f"model.layers.{layer}.{kind}.weight": layer + number + 1
    for layer in range(3)
    for number, kind in enumerate(("mlp.up_proj", "mlp.down_proj"))
}
#: As the Hub renders READMEs: with tables and HTML.
RENDER = MarkdownIt("gfm-like", {"html": True, "linkify": False})


class Tags(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(key.startswith("on") for key, _ in attrs), attrs
        self.addresses |= {value for key, value in attrs if key in ("href", "src")}

    def handle_data(self, data):
        self.text += data


PLAIN_TAGS = {
    *("h1", "h2", "p", "a", "img", "strong", "code", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


def rendered(card):
    return Tags(RENDER.render(ModelCard(card).text))
