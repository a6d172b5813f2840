"""What is measured of a tuned model, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from benchmarks.selection.examples import CHINESE, Codec, Example
from benchmarks.selection.models import evaluate, mean_loss, translate
from benchmarks.selection.options import Scale
from benchmarks.selection.text import SentencePair, Text

SHOWN = 3  # translations that are stored for readers


def measure(model: Any, test: Sequence[Example], codec: Codec, text: Text, sizes: Scale) -> dict[str, Any]:
    """Losses in nats per token on ``test`` and the pre-training tasks; each test example's summed loss."""
    found = evaluate(model, test)
    old = {name: round(mean_loss(model, make()), 5) for name, make in _old(codec, text, sizes).items()}
    return {
        "test": round(sum(loss for loss, _ in found) / sum(count for _, count in found), 5),
        "old": old,
        "sentences": {"loss": [round(loss, 3) for loss, _ in found]},
    }


def translation(model: Any, codec: Codec, pairs: Sequence[SentencePair], sizes: Scale) -> dict[str, Any]:
    """BLEU and chrF of greedy translations into Chinese, and each sentence's chrF.

    ``astray`` is the loss when each Chinese sentence follows the English of another one. It shows how much
    of the loss is due to translation and how much to Chinese alone.
    """
    translations = translate(model, codec, pairs, CHINESE, sizes.answer)
    references = [chinese for _, chinese in pairs]
    others = [english for english, _ in (*pairs[1:], pairs[0])]
    bleu = BLEU(tokenize="zh").corpus_score(translations, [references])
    chrf = CHRF()
    return {
        "astray": round(mean_loss(model, codec.forward(zip(others, references, strict=True))), 5),
        "bleu": round(bleu.score, 3),
        "chrf": round(chrf.corpus_score(translations, [references]).score, 3),
        "exact": sum(map(str.__eq__, translations, references)),
        "sentences": {
            "chrf": [
                round(chrf.sentence_score(*pair).score, 1)
                for pair in zip(translations, ([one] for one in references), strict=True)
            ],
        },
        "shown": translations[:SHOWN],
    }


def _old(codec: Codec, text: Text, sizes: Scale) -> dict[str, Callable[[], list[Example]]]:
    """Examples of each pre-training task."""
    pairs = text.test[: sizes.old]
    return {
        "english": lambda: codec.english(pairs),
        "chinese": lambda: codec.chinese(pairs),
        "backward": lambda: codec.backward(pairs),
        "articles": lambda: codec.pieces(text.unseen, sizes.piece)[: sizes.old],
    }
