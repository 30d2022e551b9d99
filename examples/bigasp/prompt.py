"""The prompt that a picture has in an epoch: one pure function of (seed, epoch, row), asked by whoever plans
the batches and by whoever loads them, so that batches of equal chunks are of the prompts that are drawn.

The words are other models': ``caption`` by JoyCaption (which :func:`caption_request` tells what to write),
``tags`` by JoyTag, ``watermarks`` by OWLv2, ``score`` by rank.py. Columns of the table:

caption     text
tags        list of words, underscores for spaces
source      a word, or empty: one more tag, as bigASP's
watermarks  boxes of detected watermarks, a list of [x0, y0, x1, y1] in 0..1 of width and height; or empty
score       0..9; pictures of score 0 are not trained on
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_fixes.token_counts import count_chunks

LIMIT = 3  # chunks
CAPTION_KINDS = {"Descriptive": 0.6, "Training Prompt": 0.2, "MidJourney": 0.1, "Descriptive, informal": 0.1}


@dataclass(frozen=True)
class Odds:
    """Chances of one draw each. The defaults are bigASP v2's, but for the last.

    empty         no prompt at all: what guidance compares with
    unscored      no score tags
    score_tags    that one, two or three of them are picked, relative
    spaces        a score tag has spaces for underscores
    tags          a random subset of the tags in place of the caption
    tokens_a_tag  that a tag is taken to cost: as many are drawn as a caption is long, at least five
    alias         a tag that has aliases is replaced by one
    mend          one underscore's tag is written with spaces where the prompt mixes both
    gap           a space follows a comma between tags
    watermark     a caption is told of the watermarks that were detected
    """

    empty: float = 0.05
    unscored: float = 0.1
    score_tags: tuple[float, float, float] = (3, 2, 1)
    spaces: float = 0.2
    tags: float = 0.1
    alias: float = 0.2
    mend: float = 0.8
    gap: float = 0.8
    tokens_a_tag: float = 2.5
    watermark: float = 1.0


@dataclass(frozen=True)
class Prompts:
    """``draw(row, epoch, index)``; ``aliases`` are other names of tags."""

    seed: int = 0
    odds: Odds = field(default_factory=Odds)
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def draw(self, row: Mapping[str, Any], epoch: int, index: int) -> str:
        """The prompt of ``row``, the table's number ``index``, in ``epoch``."""
        dice = random.Random(f"prompt {self.seed} {epoch} {index}")  # of a text: the same in every process
        if dice.random() < self.odds.empty:
            return ""
        by_tags = dice.random() < self.odds.tags and len(row["tags"])
        words = self._tags(row, dice) if by_tags else self._caption(row, dice)
        if dice.random() >= self.odds.unscored:
            words = self._scored(int(row["score"]), words, dice)
        return words

    def _caption(self, row: Mapping[str, Any], dice: random.Random) -> str:
        caption = str(row["caption"]).strip()
        if len(row["watermarks"]) and dice.random() < self.odds.watermark:
            end = "" if caption.endswith((".", "!", "?")) or not caption else "."
            caption = f"{caption}{end} {watermark(row['watermarks'])}".strip()
        return caption

    def _tags(self, row: Mapping[str, Any], dice: random.Random) -> str:
        """As many tags as the caption is long, in random order; that there is a watermark is always said."""
        must = ["watermark"] if len(row["watermarks"]) else []
        rest = sorted({*row["tags"], *([row["source"]] if row["source"] else [])} - {*must})
        length = len(str(row["caption"]).split()) * 1.35  # tokens
        count = max(5, int(length / self.odds.tokens_a_tag))
        chosen = must + dice.sample(rest, min(max(count - len(must), 0), len(rest)))
        dice.shuffle(chosen)
        style, text = dice.randrange(3), ""  # underscores, spaces, or mixed
        for tag in chosen:
            if self.aliases.get(tag) and dice.random() < self.odds.alias:
                tag = dice.choice(list(self.aliases[tag]))
            if style == 1 or (style == 2 and dice.random() < self.odds.mend):
                tag = tag.replace("_", " ")
            gap = " " if dice.random() < self.odds.gap else ""
            text += f",{gap}{tag}" if text else tag
        return text

    def _scored(self, score: int, words: str, dice: random.Random) -> str:
        """One to three of all score tags that apply, before the words."""
        apply = [f"score_{score}", *(f"score_{n}_up" for n in range(1, score + 1))]
        count = dice.choices((1, 2, 3), self.odds.score_tags)[0]
        for tag in dice.sample(apply, min(count, len(apply))):
            if dice.random() < self.odds.spaces:
                tag = tag.replace("_", " ")
            words = f"{tag}{dice.choice((', ', ' ', ','))}{words}"
        return words.strip()

    def chunks(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, epoch: int) -> NDArray[np.int32]:
        """Of all prompts of an epoch, 1..3: what ``ChunkBucketBatchSampler`` asks for."""
        counts, part = np.zeros(len(rows), np.int32), 1 << 16  # no more prompts are held in memory
        for first in range(0, len(rows), part):
            places = range(first, min(first + part, len(rows)))
            drawn = [self.draw(rows[place], epoch, place) for place in places]
            counts[places.start : places.stop] = count_chunks(tokenizer, drawn)
        return np.minimum(counts, LIMIT)


def watermark(boxes: Sequence[Sequence[float]]) -> str:
    """A sentence that says where the largest of the boxes is."""
    x0, y0, x1, y1 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    row = ("top", "", "bottom")[min(2, int(1.5 * (y0 + y1)))]
    column = ("left", "", "right")[min(2, int(1.5 * (x0 + x1)))]
    where = " ".join(filter(None, (row, column)))
    corner = "corner" if row and column else "side" if where else "centre"
    return f"There is a watermark in the {' '.join(filter(None, (where, corner)))}."


def caption_request(seed: int, index: int) -> tuple[str, int]:
    """What the captioner is asked for: the kind of text, and the number of words, N(45, 30) and at least 1
    (drawn again below it)."""
    dice = random.Random(f"request {seed} {index}")
    kind = dice.choices(list(CAPTION_KINDS), list(CAPTION_KINDS.values()))[0]
    while (words := round(dice.normalvariate(45, 30))) < 1:
        pass
    return kind, words
