"""What the bigASP example costs at 10 and 100 million pictures: bytes, hours, money. Prints the tables of
docs/at-scale.md; a reader puts in rates of his own.

    python benchmarks/at_scale.py
    python benchmarks/at_scale.py --images 25e6 --gpus 32 --train 12 --dollars 3
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields

TFLOP_FORWARD, TFLOP_STEP = 6.76, 26.9  # of a 1024 x 1024 picture; the step with checkpointing
UNET = 2.567e9  # parameters
KILO, MEGA, GIGA, TERA = 1e3, 1e6, 1e9, 1e12
HOUR = 3600.0


@dataclass(frozen=True)
class Rates:
    """All that the tables are made of. Comments say where a number is from: [m] measured by us, [p]
    published by bigASP's author, [d] derived, [e] an estimate that nobody measured here."""

    # pictures a second on one GPU
    train: float = 10.4  # [m] H100, AMP, compiled blocks
    encode: float = (
        20.0  # [e] 4.88 TFLOP a picture (counted) at 100 TFLOP/s (guessed: the VAE runs in float32)
    )
    embed: float = 1000.0  # [e] CLIP ViT-B/32; reading and resizing the picture is what it waits for
    caption: float = 2.0  # [e] JoyCaption, 8 G parameters, 60 tokens, in batches
    # of the run
    gpus: float = 8.0  # bigASP v2's
    epochs: float = 6.0  # [p] v2: 40 M samples of 6.7 M pictures
    dollars: float = 2.5  # an hour of one GPU: your contract's; no claim of a price
    checkpoints: float = 2.0  # kept
    heldout: float = 1000.0  # pictures, at 10 timesteps each
    validations: float = 400.0  # in the whole training
    # bytes
    picture: float = 1e6  # [p]
    latent: float = 109e3  # [m] fp16, packed, made like photographs' (bf16: 84e3)
    embedding: float = 1024.0  # 512 numbers of 16 bits
    row: float = 250.0  # [m] parquet of made captions and 20 tags a picture
    shard: float = 67.1e6  # examples/bigasp/latents.py
    # one core of a CPU, a second
    loads: float = 9000.0  # [m] latents read at random and unpacked
    prompts: float = 31_000.0  # [m] drawn from the table's columns, and their chunks counted
    facts: float = 58_000.0  # [m] samples read at random, not unpacked: loader.py does it at its start
    held_row: float = 198.0  # [m] bytes of a made row in loader.py's columns


def amount(number: float) -> str:
    """Bytes, for people."""
    size, name = next(
        ((size, name) for size, name in ((TERA, "TB"), (GIGA, "GB"), (MEGA, "MB")) if number >= size),
        (KILO, "KB"),
    )
    return f"{number / size:.3g} {name}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * HOUR:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / HOUR:,.0f} h" if seconds < 1000 * HOUR else f"{seconds / HOUR / 24:,.0f} days"


def steps(rates: Rates, images: float) -> list[tuple[str, float, str]]:
    """The GPU's steps: name, GPU hours, what the rate is."""
    forward = rates.train * TFLOP_STEP / TFLOP_FORWARD
    work = (
        ("embed, for ranking", images / rates.embed, "estimate"),
        ("caption", images / rates.caption, "estimate"),
        ("encode", images / rates.encode, "estimate"),
        ("train", rates.epochs * images / rates.train, "measured"),
        ("validate", rates.validations * rates.heldout * 10 / forward, "derived"),
    )
    return [(name, seconds / HOUR, kind) for name, seconds, kind in work]


def stored(rates: Rates, images: float) -> list[tuple[str, float]]:
    """What lies on disks, bytes."""
    state = 4 * UNET * (1 + 2 + 1)  # float32 weights, AdamW's two moments, EMA
    models = 2 * (
        4 * UNET + 4 * 0.82e9
    )  # the folder of the weights and of the average, text encoders with them
    return [
        ("pictures", images * rates.picture),
        ("latents", images * rates.latent),
        ("embeddings", images * rates.embedding),
        ("table", images * rates.row),
        ("checkpoints that are kept", rates.checkpoints * (state + models)),
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def costs(rates: Rates, counts: list[float]) -> Iterator[str]:
    """GPU hours and money of every step."""
    each = [steps(rates, images) for images in counts]
    head = ("step (GPU hours, $)", *(f"{images / MEGA:g} M" for images in counts), "rate is")
    rows = []
    for k, (name, _, kind) in enumerate(each[0]):
        cells = (f"{found[k][1]:,.0f} h, ${found[k][1] * rates.dollars:,.0f}" for found in each)
        rows.append((name, *cells, kind))
    sums = [sum(hours for _, hours, _ in found) for found in each]
    rows.append(("**sum**", *(f"**{hours:,.0f} h, ${hours * rates.dollars:,.0f}**" for hours in sums), ""))
    rows.append(
        (f"training on {rates.gpus:g} GPUs", *(duration(f[3][1] * HOUR / rates.gpus) for f in each), "")
    )
    yield from table(head, rows)


def disks(rates: Rates, counts: list[float]) -> Iterator[str]:
    """Bytes of everything."""
    each = [dict(stored(rates, images)) for images in counts]
    rows = [(name, *(amount(found[name]) for found in each)) for name in each[0]]
    rows.append(("shards of latents, files", *(f"{i * rates.latent / rates.shard:,.0f}" for i in counts)))
    yield from table(("what", *(f"{images / MEGA:g} M" for images in counts)), rows)


def limits(rates: Rates, counts: list[float]) -> Iterator[str]:
    """What one process of the example needs beside the GPU."""
    need = rates.gpus * rates.train
    rows = [
        ("loader: cores that keep up with all GPUs", *(f"{need / rates.loads:.3g}" for _ in counts)),
        ("loader: from the store", *(f"{amount(need * rates.latent)}/s" for _ in counts)),
        ("prompts of an epoch, one core", *(duration(i / rates.prompts) for i in counts)),
        ("loader.py's start: facts of all samples", *(duration(i / rates.facts) for i in counts)),
        ("loader.py's rows in memory, a GPU's processes", *(amount(i * rates.held_row) for i in counts)),
    ]
    yield from table(("a process", *(f"{images / MEGA:g} M" for images in counts)), rows)


def report(rates: Rates, counts: list[float]) -> str:
    parts = (costs(rates, counts), disks(rates, counts), limits(rates, counts))
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=float, nargs="+", default=[10e6, 100e6])
    for field in fields(Rates):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    args = vars(parser.parse_args())
    print(report(Rates(**{field.name: args[field.name] for field in fields(Rates)}), args["images"]))


if __name__ == "__main__":
    main()
