"""A text file as chunks of tokens."""

from __future__ import annotations

from pathlib import Path

from recipes_support import tokenizer

from neftsurgery.neuron_utilization.tokenized_text import token_batches, tokenize_file


def test_long_texts_become_chunks_and_all_texts_count_equally(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij\n   \nkl\n")
    text = tokenize_file(path, tokenizer(), tokens=100, length=4)
    assert [len(piece.ids) for piece in text.chunks] == [4, 4, 2, 2]
    assert [piece.weight for piece in text.chunks] == [1 / 20] * 3 + [1 / 4]
    assert (text.texts, text.tokens, text.truncated) == (2, 12, False)
    assert [[len(piece.ids) for piece in batch] for batch in token_batches(text, 9)] == [[4, 4], [2, 2]]
    assert [[len(piece.ids) for piece in batch] for batch in token_batches(text, 1)] == [[4], [4], [2], [2]]
    short = tokenize_file(path, tokenizer(), tokens=11, length=100)
    assert [len(piece.ids) for piece in short.chunks] == [10, 1]
    assert (short.texts, short.tokens, short.truncated) == (2, 11, True)
    one = tokenize_file(path, tokenizer(), tokens=10, length=100)
    assert (one.texts, one.tokens, one.truncated) == (1, 10, True)
    assert one.chunks[0].weight == 1 / 10
