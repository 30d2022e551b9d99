"""Chunk buckets: what padding costs the real SDXL, and what buckets do to quality at equal samples.

python benchmarks/chunk_buckets.py     about 8 minutes on two cores; writes docs/evidence/chunk-buckets.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import digits
import lab
import numpy as np
import style
import torch
from torch import nn

from sdxl_fixes import Objective
from sdxl_fixes.buckets import ChunkBucketBatchSampler

ZERO = lab.STOCK.zero_terminal_snr()
CHUNK, WIDTH, FILLERS, BATCH = 75, 64, 200, 64
LAYOUTS = {
    "padded": "random batches, every prompt padded to 227 tokens (kohya's `--max_token_length 225`)",
    "longest": "random batches, padded to the longest prompt of the batch, 77n tokens",
    "buckets": "chunk buckets, 77n tokens, no padding to other lengths",
    "cut": "random batches, every prompt cut to 77 tokens (diffusers' scripts)",
}


# ---------------------------------------------------------------- prompts


class Prompts:
    """For every image a prompt of fillers, with the word that names its class somewhere in it. Tokens are
    frozen random vectors."""

    def __init__(self, classes: torch.Tensor, seed: int, late: bool = False) -> None:
        """``late``: prompts whose word comes after the first chunk."""
        rng = np.random.default_rng(seed)
        drawn = np.minimum(buckets.tokens(20 * len(classes), rng), 3 * CHUNK)
        self.lengths = drawn[drawn > CHUNK * late][: len(classes)]
        self.chunks = -(-self.lengths // CHUNK)
        first = CHUNK * late
        self.place = first + (rng.random(len(classes)) * (self.lengths - first)).astype(np.int64)
        tokens = rng.integers(digits.CLASSES, digits.CLASSES + FILLERS, (len(classes), 3 * CHUNK))
        tokens[np.arange(len(classes)), self.place] = classes.numpy()
        pad = digits.CLASSES + FILLERS  # as BOS, EOS and padding
        self.tokens = torch.from_numpy(np.where(np.arange(3 * CHUNK) < self.lengths[:, None], tokens, pad))
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(pad + 1, WIDTH, generator=generator)
        self.places = 0.5 * torch.randn(CHUNK + 2, WIDTH, generator=generator)  # of a token in its chunk

    def context(self, index: Any, layout: str) -> torch.Tensor:
        """[B, tokens, WIDTH]: 227 or 77n tokens, with BOS and EOS."""
        chunks = {"padded": 3, "cut": 1}.get(layout, int(self.chunks[index].max()))
        end = torch.full((len(index), 1), len(self.vectors) - 1)
        pieces = [
            torch.cat((end, self.tokens[index, n * CHUNK : (n + 1) * CHUNK], end), 1) for n in range(chunks)
        ]
        # each chunk is encoded by itself, as CLIP does
        encoded = [self.vectors[piece] + self.places for piece in pieces]
        if layout == "padded":  # BOS of the first and EOS of the last chunk only
            encoded = [piece[:, (n > 0) : CHUNK + 2 - (n < chunks - 1)] for n, piece in enumerate(encoded)]
        return torch.cat(encoded, 1)

    def batches(self, layout: str, seed: int) -> Iterator[Any]:
        """Indices of one batch after the other, without end."""
        if layout == "buckets":
            sampler = ChunkBucketBatchSampler(
                np.zeros(len(self.chunks), int), self.chunks, batch_size=BATCH, seed=seed
            )
            while True:
                yield from sampler
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.chunks))
            yield from (order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH))


class Reader(digits.Network):
    """The digits' network, which reads the class in the prompt by cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleList(
            nn.MultiheadAttention(digits.WIDTH, 4, kdim=WIDTH, vdim=WIDTH, batch_first=True) for _ in range(2)
        )
        self.queries = nn.Parameter(0.1 * torch.randn(digits.WIDTH))

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(32) / 32)
        condition = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        hidden = self.enter(x.flatten(1))
        for number, block in enumerate(self.blocks):
            if number % 2 == 0:
                query = (hidden + condition + self.queries)[:, None]
                hidden = (
                    hidden + self.readers[number // 2](query, context, context, need_weights=False)[0][:, 0]
                )
            hidden = hidden + block(hidden + condition)
        return self.leave(hidden).reshape(x.shape)  # type: ignore[no-any-return]


def work(job: lab.Job, folder: Path) -> dict[str, Any]:
    layout, data = job.key, digits.Digits(job.seed)
    prompts = Prompts(data.classes, job.seed)
    torch.manual_seed(job.seed)
    objective, batches = Objective(ZERO, "v_prediction"), prompts.batches(layout, job.seed)
    network, tokens, samples = Reader(), 0, 0

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, tuple[Any, ...]]:
        nonlocal tokens, samples
        index = torch.from_numpy(np.asarray(next(batches)))
        context = prompts.context(index, layout)
        tokens, samples = tokens + context.shape[0] * context.shape[1], samples + len(index)
        return data.images[index], (context,)

    network = digits.train_network(network, objective, batch, job.seed, digits.STEPS)
    result = {"tokens": tokens / samples, "samples": samples}
    for name, count in (("any", 600), ("late", 300)):
        asked = torch.arange(count) % digits.CLASSES
        test = Prompts(asked, job.seed + 500, late=name == "late")
        generated = torch.empty(count, 1, digits.SIDE, digits.SIDE)
        for chunks in (1, 2, 3):
            index = torch.from_numpy(np.flatnonzero(test.chunks == chunks))
            if len(index):
                generated[index] = digits.sample(
                    network, ZERO, "v_prediction", "dpmpp_2m", 25, job.seed, (test.context(index, layout),)
                )
        right = digits.agrees(generated, data, asked)
        if name == "any":
            result["distance"] = digits.distance(generated, data.held_out)
            right = right[torch.from_numpy(test.place < CHUNK)]
        result[name] = float(right.double().mean())
    return result


# ---------------------------------------------------------------- the real SDXL's arithmetic


def arithmetic() -> dict[int, tuple[float, float]]:
    """:func:`flops`, counted once."""
    return {int(tokens): tuple(counts) for tokens, counts in lab.cached("sdxl-flops", flops).items()}  # type: ignore[misc]


def flops() -> dict[int, tuple[float, float]]:
    """Tokens -> (U-Net forward, both text encoders) in 10^12 operations per sample at 1024 x 1024. Counted on
    models without weights."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = lab.sdxl_unet()
        sizes = dict(vocab_size=49408, max_position_embeddings=77)
        small = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **sizes
        )
        large = CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            **sizes,
        )
        encoders = [CLIPTextModel(small), CLIPTextModelWithProjection(large)]
        with FlopCounterMode(display=False) as one_chunk:
            for encoder in encoders:
                encoder(torch.zeros(1, 77, dtype=torch.long))
        found = {}
        for tokens, chunks in ((77, 1), (154, 2), (231, 3), (227, 3)):
            extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
            with FlopCounterMode(display=False) as counter:
                unet(
                    torch.zeros(1, 4, 128, 128),
                    torch.zeros(1),
                    torch.zeros(1, tokens, 2048),
                    added_cond_kwargs=extra,
                )
            found[tokens] = counter.get_total_flops() / 1e12, chunks * one_chunk.get_total_flops() / 1e12
    assert 2.56e9 < sum(p.numel() for p in unet.parameters()) < 2.57e9, "this is not SDXL's U-Net"
    return found


def page(found: dict[str, list[Any]]) -> list[str]:
    counted = arithmetic()
    chunks = np.minimum(-(-buckets.tokens(10**6, np.random.default_rng(0)) // CHUNK), 3)
    shares = {n: float((chunks == n).mean()) for n in (1, 2, 3)}
    lines = [
        "# Chunk buckets, measured",
        "",
        f"Generated by `benchmarks/chunk_buckets.py` ({lab.versions('chunk-buckets')}).",
        "",
        "## Arithmetic of the real SDXL",
        "",
        "Operations per sample at 1024 x 1024, counted by torch on models of SDXL's size without weights: "
        "the U-Net forward and backward",
        "(three times forward) and both text encoders forward (frozen, not cached). Prompts as in "
        "[buckets.md](../buckets.md): "
        + ", ".join(f"{100 * share:.0f} % of {n}" for n, share in shares.items())
        + " chunks.",
        "",
        "| context | U-Net, 10^12 | text encoders, 10^12 | together, over 77 tokens |",
        "|---|---:|---:|---:|",
    ]
    total = {tokens: 3 * unet + text for tokens, (unet, text) in counted.items()}
    for tokens in (77, 154, 231):
        unet, text = counted[tokens]
        lines.append(f"| {tokens} tokens | {3 * unet:.2f} | {text:.2f} | {total[tokens] / total[77]:.3f} |")
    mean_unet, mean_text = (
        sum(share * counted[77 * n][part] for n, share in shares.items()) for part in (0, 1)
    )
    lines.append(
        f"| chunk buckets, on average | {3 * mean_unet:.2f} | {mean_text:.2f} | "
        f"{(3 * mean_unet + mean_text) / total[77]:.3f} |"
    )
    lines.append(
        f"| all padded to 227 tokens | {3 * counted[227][0]:.2f} | {counted[227][1]:.2f} | "
        f"{total[227] / total[77]:.3f} |"
    )
    lines += [
        "",
        f"So padding everything costs {100 * (total[227] / (3 * mean_unet + mean_text) - 1):.1f} % more "
        "arithmetic than buckets",
        "do: less than the",
        "share of padding suggests, since most of SDXL's work does not depend on the prompt. Times are not "
        "arithmetic: a real",
        "trainer's are in [buckets.md](../buckets.md).",
        "",
        "## Quality at equal steps",
        "",
        "Digits from the word that names them, somewhere among fillers in a prompt of up to 225 tokens "
        "(method in `benchmarks/digits.py`",
        f"and this file), {digits.STEPS} steps of {BATCH} samples (chunk buckets have one smaller batch per "
        "chunk count and epoch),",
        f"v-prediction, zero terminal SNR; {lab.about('chunk-buckets')}. Every",
        "layout is sampled as a UI would: prompts in their own length, except *padded* and *cut*, which are "
        "sampled as trained. Energy",
        "distance x 1000 to held-out digits; share of samples of the class that was asked, for words in the "
        "first chunk, and for",
        "prompts with",
        "the word after it. Changes are against *longest*, bold where the interval excludes 0.",
        "",
        "| layout | tokens per sample | samples | distance | change | right, in chunk 1, % | change | "
        "right, after it, % | change |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    real = lab.cached("digits", digits.reference)
    lines.append(
        f"| *real digits* | | | {1000 * real['distance']:.1f} | | {100 * real['agreement']:.1f} | | "
        f"{100 * real['agreement']:.1f} | |"
    )
    base = found["longest"]
    for layout, results in found.items():
        cells = [f"{np.mean([r[what] for r in results]):.0f}" for what in ("tokens", "samples")]
        for what, scale in (("distance", 1000), ("any", 100), ("late", 100)):
            change = [scale * (r[what] - b[what]) for r, b in zip(results, base, strict=True)]
            cells += [
                lab.show([scale * r[what] for r in results], 1),
                "" if layout == "longest" else lab.change(change, 1),
            ]
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    meanings = [f"- *{layout}*: {meaning}" for layout, meaning in LAYOUTS.items()]
    return [*lines, "", *meanings, "", "![Right samples by layout](chunk-buckets.png)"]


def plot(found: dict[str, list[Any]]) -> Any:
    figure, axis = style.figure(4.0)
    for number, (what, label, colour) in enumerate(
        (("any", "word in the first chunk", style.DARK), ("late", "word after it", style.ACCENT))
    ):
        points = [lab.interval([100 * r[what] for r in results]) for results in found.values()]
        means, halves = zip(*points, strict=True)
        places = [place + 0.34 * (number - 0.5) for place in range(len(found))]
        axis.bar(places, means, 0.32, yerr=halves, label=label, color=colour, ecolor=style.INK, capsize=3)
    axis.set_xticks(range(len(found)), list(found))
    axis.set(ylabel="of the class that was asked, %", ylim=(0, 100))
    style.above(figure)
    return figure


KEYS = list(LAYOUTS)

if __name__ == "__main__":
    lab.experiment("chunk-buckets", __doc__, work, KEYS, page, plot)
