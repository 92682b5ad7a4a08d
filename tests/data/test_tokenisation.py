"""A document's first ids are those of the whole document, however it is cut; documents begin and end as the tokenizer
begins and ends a text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from compressor.data.tokenisation import Tokenisation
from compressor.errors import CalibrationError

SPECIAL = ["<unk>", "</s>", "<bos>", "[CLS]", "[SEP]"]
LENGTH = 6_000


@cache
def sample(kind: str) -> str:
    """A text of some kind, of 6,000 characters."""
    draw = random.Random(kind)
    words = ["".join(draw.choices("aeionrst", k=draw.randint(1, 7))) for _ in range(60)]
    pools = {
        "words": [word + end for word in words for end in (" ", " ", " ", ", ", ".\n", "\n\n  ")],
        "endless word": words,
        "blanks": [" ", " ", " ", "\n", "\t"],
        "one letter": ["a"],
        "digits": [*"0123456789"],
        "numbers": [f"{draw.randrange(10**9)} " for _ in range(60)],
        "several bytes": [*"äöü€漢字仮名🙂🙃", "é ", "한국", "\u0301"],
        "marks": ["</s>", "<bos>", "a", " ", ".."],
        "code": ["def f(x):\n", "    return x\n", "\n\n", "        # ----\n", "}}}}", "\r\n"],
    }
    found = ""
    while len(found) < LENGTH:
        found += draw.choice(pools[kind])
    return found[:LENGTH]


KINDS = ["words", "endless word", "blanks", "one letter", "digits", "numbers", "several bytes", "marks", "code"]
GROUPS_FROM_THE_RIGHT = r"\d{1,3}(?=(\d{3})*(?!\d))| ?[^\s\d]+|\s+(?!\S)|\s+"


def trained(model: Any, trainer: Any, **parts: Any) -> Any:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([sample(kind)[:1500] for kind in KINDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", bos_token="<bos>")


@cache
def tokenizer(name: str) -> Any:
    """Tokenizers of the kinds that models come with, trained on the spot."""
    settings: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    bpe = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name == "byte-level BPE":
        return trained(models.BPE(), bpe, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    if name == "digits grouped from the right":
        split = pre_tokenizers.Split(Regex(GROUPS_FROM_THE_RIGHT), "isolated")
        return trained(models.BPE(), bpe, pre_tokenizer=pre_tokenizers.Sequence([split, bytes_only]))
    if name == "BPE across words":
        pieces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, max_token_length=12, **settings)
        return trained(models.BPE(unk_token="<unk>"), trainer, normalizer=pieces)
    if name in ("Unigram", "Unigram across words"):
        split = pre_tokenizers.Metaspace(split=name == "Unigram")
        trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", max_piece_length=8, **settings)
        return trained(models.Unigram(), trainer, pre_tokenizer=split, decoder=decoders.Metaspace())
    if name == "WordPiece":
        trainer = trainers.WordPieceTrainer(vocab_size=400, **settings)
        return trained(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.BertPreTokenizer())
    trainer = trainers.WordLevelTrainer(vocab_size=60, **settings)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


TOKENIZERS = [
    "byte-level BPE",
    "digits grouped from the right",
    "BPE across words",
    "Unigram",
    "Unigram across words",
    "WordPiece",
    "WordLevel",
]


class Pieces:
    """A text in pieces of 100 characters, which counts how many were read."""

    def __init__(self, text: str) -> None:
        self.text, self.read = text, 0

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.text), 100):
            self.read += 1
            yield self.text[start : start + 100]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ids_are_those_of_the_whole(name: str, kind: str) -> None:
    cut = tokenizer(name)
    whole = cut(sample(kind), add_special_tokens=False)["input_ids"]
    for wanted in (7, 100):
        pieces, tokens = Pieces(sample(kind)), Tokenisation(cut, "x", special_tokens=False)
        tokens.add(pieces, wanted)
        found = tokens.stream.tolist()
        assert found == [*whole, cut.eos_token_id][: len(found)]
        assert len(found) >= min(wanted, len(whole) + 1)
        if kind in ("words", "marks", "code"):
            assert pieces.read < LENGTH / 100  # not the whole text


def test_documents_after_the_first() -> None:
    cut = tokenizer("byte-level BPE")
    first, second = (cut(sample(kind)[:size])["input_ids"] for kind, size in (("words", 300), ("code", LENGTH)))
    tokens = Tokenisation(cut, "x", special_tokens=True)
    tokens.add([sample("words")[:300]], 400)
    tokens.add(Pieces(sample("code")), 400)
    assert tokens.stream[:400].tolist() == [*first, cut.eos_token_id, *second][:400]


# How documents begin and end -----------------------------------------------------------------------------------


def with_marks(begin: str, end: str) -> Any:
    """A tokenizer of words whose post-processor puts marks around a text."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*SPECIAL, "a", "b"])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = {mark: SPECIAL.index(mark) for mark in (*begin.split(), *end.split())}
    inner.post_processor = processors.TemplateProcessing(f"{begin} $A {end}".strip(), None, list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<bos>", unk_token="<unk>")


def stream(cut: Any, *texts: str, special_tokens: bool = True, is_rendered: bool = False) -> str:
    tokens = Tokenisation(cut, "x", special_tokens=special_tokens)
    for text in texts:
        tokens.add([text], 1000, is_rendered=is_rendered)
    return " ".join(cut.convert_ids_to_tokens(tokens.stream.tolist()))


@pytest.mark.parametrize(
    ("begin", "end", "says"),
    [
        ("", "", "a b </s> b </s>"),
        ("<bos>", "", "<bos> a b </s> <bos> b </s>"),
        ("", "</s>", "a b </s> b </s>"),
        ("<bos>", "</s>", "<bos> a b </s> <bos> b </s>"),
        ("[CLS]", "[SEP]", "[CLS] a b [SEP] [CLS] b [SEP]"),
        ("[CLS] <bos>", "", "[CLS] <bos> a b </s> [CLS] <bos> b </s>"),
    ],
)
def test_documents_begin_and_end_as_the_tokenizer_does(begin: str, end: str, says: str) -> None:
    cut = with_marks(begin, end)
    assert stream(cut, "a b", "b") == says
    assert stream(cut, "a b", "b", special_tokens=False) == "a b </s> b </s>"
    assert stream(cut, "a b", "b", is_rendered=True) == "a b </s> b </s>"  # as a template has begun them


def test_a_text_that_begins_so_already_is_left_as_it_is() -> None:
    assert stream(with_marks("<bos>", ""), "<bos> a", "b") == "<bos> a </s> <bos> b </s>"


def test_the_first_text_may_be_empty() -> None:
    assert stream(with_marks("<bos>", ""), "", "b") == "<bos> </s> <bos> b </s>"


@pytest.mark.parametrize(("begin", "end"), [("<bos>", ""), ("<bos>", "</s>"), ("", "</s>"), ("[CLS]", "[SEP]")])
@pytest.mark.parametrize("text", ["<bos>", "</s>", "<bos> <bos>", "[SEP]"])
def test_the_first_text_may_be_nothing_but_special_tokens(begin: str, end: str, text: str) -> None:
    tokens = Tokenisation(with_marks(begin, end), "x", special_tokens=True)
    tokens.add([text], 10)
    assert tokens.special_tokens == {"begin": [begin] if begin else [], "end": [end] if end else []}


def test_what_was_added_is_said() -> None:
    tokens = Tokenisation(with_marks("<bos>", "</s>"), "x", special_tokens=True)
    tokens.add(["a"], 10)
    assert tokens.special_tokens == {"begin": ["<bos>"], "end": ["</s>"]}


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python that begins a text with its own token."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(bos_token="<", eos_token=">", unk_token="?", **settings)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(128)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(self, ids: list[int], others: Any = None) -> list[int]:
        return [self.bos_token_id, *ids]


def test_tokenizers_in_python() -> None:
    assert stream(Letters(), "abc", "d").replace(" ", "") == "<abc><d>"


def test_a_tokenizer_that_cuts_otherwise_with_its_special_tokens() -> None:
    class Odd:
        eos_token_id = None

        def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text), 1] if add_special_tokens else [2]}

    with pytest.raises(
        CalibrationError, match=r"^source 'x': special tokens change how a text is cut; say `special_tokens: false`\.$"
    ):
        Tokenisation(Odd(), "x", special_tokens=True).add(["abc"], 5)
