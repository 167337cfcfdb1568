"""A byte-level BPE tokenizer that gives each word of the prompt templates one token.

The Qwen image pipelines drop a fixed number of leading tokens, their system prefix as the real tokenizer splits it:
64 for editing, 34 for text-to-image. A vocabulary in which every template word is one token splits it the same way.
The merges are learnt here, by the textbook algorithm with a total order on ties, because the result of a library's
trainer may change with its version.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def train(corpus: Sequence[str]) -> Qwen2Tokenizer:
    """The tokenizer in which each word of `corpus` is one token (special tokens apart)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(_words(corpus, _tokenizer(alphabet, [])))
    return _tokenizer(alphabet, merges)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is a single piece.

    Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
    algorithm 1. Equal counts are settled by the pair itself.
    """
    pieces = [list(word) for word in sorted(set(words))]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """`word` with every occurrence of `pair`, from the left, joined into one piece."""
    joined: list[str] = []
    for piece in word:
        # A piece that was just joined cannot be the left half again: it is longer than `pair[0]`.
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _tokenizer(alphabet: Sequence[str], merges: Sequence[tuple[str, str]]) -> Qwen2Tokenizer:
    """Ids: the 256 bytes, then the merges in order, then the special tokens."""
    pieces = dict.fromkeys([*alphabet, *(left + right for left, right in merges), *SPECIAL])
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=131072,
    )


def _words(corpus: Sequence[str], tokenizer: Qwen2Tokenizer) -> list[str]:
    """The pieces that Qwen2's own pre-tokenizer makes of the corpus, which no merge may cross."""
    split = tokenizer.backend_tokenizer.pre_tokenizer
    special = "|".join(map(re.escape, SPECIAL))
    parts = [part for text in corpus for part in re.split(special, text) if part]
    return [word for part in parts for word, _ in split.pre_tokenize_str(part)]
