# SPDX-License-Identifier: Apache-2.0
"""One text that is being written: what may be sent of it, where it ends, and how its tokens are chosen."""

import pytest
import torch
from byte_tokenizers import chatml, sentences
from conftest import tiny_tokenizer
from demo_folder import spaced_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_parm.noise import Sampling
from trl_parm.server.texts import Chosen, Decoder, Settings, Text, choose, token_text, until_stop


TOKENIZERS = {
    "bytes": chatml(),
    "characters": sentences(),
    "words": spaced_tokenizer(),
    "wordpieces": tiny_tokenizer(),
}
TEXTS = ["grüß Gott, 世界! 👩‍🚀🇦🇹", " two  spaces\n\nand lines ", "a�b", "", "naïve ﷽"]


def pieces(tokenizer, tokens: list[int]) -> list[str]:
    decoder = Decoder(tokenizer)
    return [*map(decoder.add, tokens), decoder.rest()]


@pytest.mark.parametrize("name", ["bytes", "characters"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(name, text):
    """Of tokens that are parts of characters too; none of these is told before it is whole."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, tokens)
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
    if name == "bytes" and "�" not in text:
        assert "�" not in "".join(found)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_their_text(name, data):
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=8),
)
def test_nothing_is_sent_that_a_stop_takes_away(text, stops, cuts):
    """However a text comes in parts, what is sent is the text up to the first stop."""
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    sent, waiting, stopped = "", "", False
    for number, (start, stop) in enumerate(zip(places, places[1:])):
        last = number == len(places) - 2
        piece, waiting, stopped = until_stop(waiting + text[start:stop], stops, last)
        sent += piece
        if stopped:
            break
    # The first to be complete ends it, and of those that are complete at once the one that begins first.
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert sent == text
    else:
        assert text.startswith(sent)
        assert any(text[len(sent) :].startswith(stop) for stop in stops)
        assert not any(stop in sent for stop in stops)


def text_of(tokenizer: str = "words", **given) -> Text:
    return Text(None, 0, [5, 6], Settings(**{"most": 4, **given}), TOKENIZERS[tokenizer])


@settings(max_examples=100, deadline=None)
@given(text=st.text("abü", min_size=1, max_size=12), stop=st.text("abü", min_size=1, max_size=3))
def test_tokens_are_told_with_their_text_and_none_beyond_a_stop(text, stop):
    tokens = TOKENIZERS["bytes"](text, add_special_tokens=False)["input_ids"]
    whole = text_of("bytes", most=len(tokens), stop=(stop,), logprobs=0)
    sent, told, places = "", [], []
    for token in tokens:
        piece = whole.add(Chosen(token, -1.0, []))
        sent, told = sent + piece.text, told + [chosen.token for chosen in piece.tokens]
        places += [chosen.place for chosen in piece.tokens]
        assert TOKENIZERS["bytes"].decode(told).startswith(sent)
        if piece.finished:
            break
    assert told == tokens[: len(told)]
    assert sent == text.split(stop)[0]
    assert len(told) == len(TOKENIZERS["bytes"](sent, add_special_tokens=False)["input_ids"])
    assert places == [len(TOKENIZERS["bytes"].decode(told[:i]).rstrip("�")) for i in range(len(told))]


@pytest.mark.parametrize("name", ["bytes", "characters"])
@pytest.mark.parametrize("text", ["grüß Gott, 世界!", "a b  c"])
def test_tokens_as_texts_and_bytes_join_to_the_text(name, text):
    """Parts of characters have bytes alone, and spaces are those between the tokens."""
    tokenizer = TOKENIZERS[name]
    if name == "characters":
        text = text.encode("ascii", "ignore").decode()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [token_text(tokenizer, token, before) for before, token in zip([None, *tokens], tokens)]
    assert b"".join(bytes(as_bytes) for _, as_bytes in found).decode() == tokenizer.decode(tokens)
    assert all(shown.encode() == bytes(as_bytes) or "�" in shown for shown, as_bytes in found)


def test_bytes_of_a_byte_token_and_of_what_is_unknown():
    class Tokenizer:
        def __init__(self, piece):
            self.piece = piece

        def decode(self, ids):
            return "�"

        def convert_ids_to_tokens(self, token):
            return self.piece

    assert token_text(Tokenizer("<0xE4>"), 3, 4) == ("�", [0xE4])
    assert token_text(Tokenizer("世"), 3, None) == ("�", None)


def test_a_text_ends_by_its_length_or_an_end_token():
    text = text_of(ends=frozenset([1]))
    found = [text.add(Chosen(token, 0.0, [])) for token in (7, 8, 9, 10)]
    assert [piece.finished for piece in found] == [None, None, None, "length"]
    assert text.read == 5
    ended = text_of(ends=frozenset([1]))
    found = [ended.add(Chosen(token, 0.0, [])) for token in (7, 1)]
    assert ("".join(piece.text for piece in found), found[-1].finished, found[-1].count) == ("w1", "stop", 2)


def test_tokens_are_chosen_by_the_settings_of_each():
    scores = torch.log_softmax(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), -1)
    hot, cold = Sampling(temperature=1.5), Sampling(temperature=0.5, top_p=0.9)
    texts = [text_of(sampling=s, seed=seed) for s, seed in ((None, 0), (hot, 1), (cold, 2), (hot, 3), (None, 4))]
    texts[3].written.append(9)
    found = [chosen.token for chosen in choose(scores, texts)]
    for text, row, token in zip(texts, scores, found):
        own, sampling = row[None], text.settings.sampling
        if sampling is not None:
            own = sampling.noisy(own, [text.settings.seed], [len(text.written)])
        assert token == int(own.argmax())
    assert found != scores.argmax(-1).tolist()


def test_log_probabilities_are_told_before_temperature():
    scores = torch.log_softmax(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), -1)
    (chosen,) = choose(scores, [text_of(sampling=Sampling(2.0), seed=1, logprobs=3)])
    assert chosen.log_prob == pytest.approx(float(scores[0, chosen.token]))
    assert [token for token, _ in chosen.top] == scores[0].topk(3).indices.tolist()
