"""``sdxl-fixes buckets``: what a data set's aspect buckets cost, and what aspect x chunk buckets save."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdxl_fixes.aspects import RULES, Assigned, assign, assign_without_upscaling, resolutions
from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import printable, shown
from sdxl_fixes.names import CHUNK, LEFTOVERS, SPLITS
from sdxl_fixes.options import flag, whole
from sdxl_fixes.training_sets.images import Dataset
from sdxl_fixes.training_sets.read import read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "openai/clip-vit-large-patch14"
# beyond is a slip, and may not fit into memory
MOST_PIXELS, MOST_BATCH, MOST_RANKS, MOST_CHUNKS = 1 << 14, 1_000_000, 10_000, 1000
ROWS = {
    "batches": "batches per epoch",
    "smaller": "batches below the batch size",
    "lost": "samples lost per epoch",
    "repeated": "samples repeated per epoch",
    "chunks": f"chunks of {CHUNK} tokens that a sample costs (mean)",
    "padding": "share of chunks that are nothing but padding",
}


@dataclass(frozen=True)
class Report:
    """One data set. ``padded``, ``aspect`` and ``chunked`` have the keys of ROWS: every prompt padded to the
    limit (kohya), to the longest of its batch in aspect buckets, and in aspect x chunk buckets."""

    name: str
    samples: int
    draws: int
    batch_size: int
    resolutions: list[tuple[int, int]]  # those in use
    sizes: list[int]  # samples in each, repeats counted
    chunk_counts: dict[int, int]  # chunks -> samples, repeats counted
    aspect_error: float  # mean |bucket's aspect - image's|
    worst_aspect_error: float
    padded: dict[str, float]
    aspect: dict[str, float]
    chunked: dict[str, float]
    problems: list[str]


def report(
    dataset: Dataset,
    chunks: NDArray[Any],
    limit: int,
    batch_size: int | None = None,
    rule: str = "kohya",
    leftovers: str = "merge",
    world_size: int = 1,
    seed: int = 0,
) -> Report:
    """Plan one epoch of ``dataset`` both ways. ``chunks`` are its captions' counts, ``limit`` the trainer's
    most (``--max_token_length`` / 75). ``batch_size`` None takes the data set's own, or 1."""
    from sdxl_fixes.buckets import ChunkBucketBatchSampler
    from sdxl_fixes.token_counts import too_long

    size = (
        whole(dataset.name, "batch_size", dataset.settings.get("batch_size", 1), 1, MOST_BATCH)
        if batch_size is None
        else batch_size
    )
    found, problems = _aspects(dataset, rule), list(dataset.problems)
    for k in np.flatnonzero(found.index < 0):
        width, height = dataset.samples[k].size
        problems.append(f"{dataset.samples[k].image}: {width} x {height} pixels fit no bucket, left out")
    if too := too_long(chunks, limit, [str(sample.image) for sample in dataset.samples]):
        problems.append(too)
    problems, kept = list(map(printable, problems)), found.index >= 0
    if not kept.any():
        raise ValueError(f"{dataset.name}: no image fits a bucket ({problems[-1]})")
    index, counts = found.index[kept], np.minimum(chunks[kept], limit)
    repeats = np.array([sample.repeats for sample in dataset.samples])[kept]
    options: dict[str, Any] = dict(batch_size=size, seed=seed, repeats=repeats, world_size=world_size)
    ours = ChunkBucketBatchSampler(index, counts, leftovers=leftovers, **options).account()
    plain = ChunkBucketBatchSampler(index, np.ones_like(counts), leftovers="smaller", rank=None, **options)
    theirs, batches = plain.account(), list(plain)
    longest = sum(int(counts[batch].max()) * len(batch) for batch in batches) / sum(map(len, batches))
    used, codes = np.unique(index, return_inverse=True)
    draws = np.bincount(codes.reshape(-1), weights=repeats)
    values = np.bincount(counts, weights=repeats)
    base = {
        "batches": theirs.batches,
        "smaller": theirs.smaller,
        "lost": theirs.lost,
        "repeated": theirs.repeated,
    }
    return Report(
        name=dataset.name,
        samples=int(kept.sum()),
        draws=ours.samples,
        batch_size=size,
        resolutions=[(int(w), int(h)) for w, h in found.resolutions[used]],
        sizes=[int(n) for n in draws],
        chunk_counts={k: int(n) for k, n in enumerate(values) if n},
        aspect_error=float(np.abs(found.error[kept]).mean()),
        worst_aspect_error=float(np.abs(found.error[kept]).max()),
        padded={**base, "chunks": float(limit), "padding": 1 - ours.floor / limit},
        aspect={**base, "chunks": longest, "padding": 1 - ours.floor / longest},
        chunked={
            **{name: getattr(ours, name) for name in base},
            "chunks": ours.chunks,
            "padding": 1 - ours.floor / ours.chunks,
        },
        problems=problems,
    )


def _aspects(dataset: Dataset, rule: str) -> Assigned:
    sizes, settings, name = [sample.size for sample in dataset.samples], dataset.settings, dataset.name
    enabled, shrinks = flag(name, settings, "enable_bucket"), flag(name, settings, "bucket_no_upscale")
    width, height = _resolution(name, settings.get("resolution", 1024))
    if settings and not enabled:
        return assign(sizes, [(width, height)])
    step = whole(name, "bucket_reso_steps", settings.get("bucket_reso_steps", 64), 8, MOST_PIXELS)
    if step % 8:
        raise ValueError(f"{name}: bucket_reso_steps is {step}: expected a multiple of 8, a latent pixel")
    least, most = (256, 1024) if "resolution" in settings else (512, 2048)
    most = whole(name, "max_bucket_reso", settings.get("max_bucket_reso", most), step, MOST_PIXELS)
    least = whole(
        name, "min_bucket_reso", settings.get("min_bucket_reso", least), 1 if shrinks else step, most
    )
    if not least // step * step <= min(width, height) <= max(width, height) <= -(-most // step) * step:
        raise ValueError(
            f"{name}: resolution {width} x {height} lies outside min_bucket_reso {least} to max_bucket_reso "
            f"{most}: move the limits"
        )
    if shrinks:
        return assign_without_upscaling(sizes, width * height, step)
    found = resolutions(rule, width * height, step, least // step * step, -(-most // step) * step)
    return assign(sizes, found, 4 if rule == "novelai" else None)


def _resolution(name: str, value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name}: resolution is {shown(value)}: expected a whole number or [width, height]")
    width, height = (whole(name, "resolution", side, 1, MOST_PIXELS) for side in sides)
    return width, height


def as_text(found: Report, problems: int = 10) -> str:
    """The table, and the first ``problems`` sentences about files."""
    widths = ", ".join(
        f"{k} {'chunk' if k == 1 else 'chunks'} {100 * n / sum(found.chunk_counts.values()):.1f} %"
        for k, n in found.chunk_counts.items()
    )
    lines = [
        f"{found.name}: {found.samples} images, {found.draws} samples per epoch, batch size "
        f"{found.batch_size}",
        f"{len(found.resolutions)} aspect buckets in use, aspect error {found.aspect_error:.3f} (worst "
        f"{found.worst_aspect_error:.2f})",
        f"prompts: {widths}",
        "",
        f"{'':<50}{'padded to':>14}{'aspect':>14}{'aspect x':>14}",
        f"{'':<50}{'the limit':>14}{'buckets':>14}{'chunk buckets':>14}",
    ]
    for key, meaning in ROWS.items():
        cells = [_cell(key, column[key]) for column in (found.padded, found.aspect, found.chunked)]
        lines.append(f"{meaning:<50}" + "".join(f"{cell:>14}" for cell in cells))
    if found.problems:
        lines += ["", *found.problems[:problems]]
        lines += [f"... and {len(found.problems) - problems} more"] if len(found.problems) > problems else []
    return "\n".join(lines)


def as_json(reports: list[Report]) -> str:
    """All of it, strict JSON."""
    return json.dumps([asdict(found) for found in reports], allow_nan=False)


def _check_plot(file: Path) -> None:
    """Raise ValueError without matplotlib, OSError without the folder."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError('a picture needs matplotlib: pip install "sdxl-fixes[plot]"') from error
    if not file.absolute().parent.is_dir():
        raise OSError(f"--plot {file}: there is no folder {file.absolute().parent}")


def plot(found: Report, file: Path) -> None:
    """Write a PNG: samples per aspect bucket, chunks that a sample costs. Raises OSError if the file cannot
    be written (nothing half-written stays behind)."""
    from matplotlib.figure import Figure

    ink, soft, accent, pale = "#22252b", "#6b707a", "#2f6fde", "#b9bec8"
    figure = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    order = np.argsort([w / h for w, h in found.resolutions])
    names = ["{} x {}".format(*found.resolutions[k]) for k in order]
    left.bar(names, [found.sizes[k] for k in order], width=min(0.8, 0.1 * len(order)), color=accent)
    left.tick_params(axis="x", rotation=90, labelsize=9 if len(order) < 30 else 6)
    left.set_xlim(-0.7, len(order) - 0.3)
    columns = {
        "padded to\nthe limit": found.padded,
        "aspect\nbuckets": found.aspect,
        "aspect x\nchunk": found.chunked,
    }
    heights = [column["chunks"] for column in columns.values()]
    bars = right.bar(list(columns), heights, width=0.6, color=(pale, pale, accent))
    right.bar_label(bars, fmt="%.2f", padding=3, color=ink)
    needed = found.chunked["chunks"] * (1 - found.chunked["padding"])
    right.axhline(needed, color=ink, linewidth=1, linestyle=(0, (2, 2)))
    right.annotate(
        f"the prompts\nthemselves\n{needed:.2f}",
        (1, needed),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=ink,
        fontsize=9,
    )
    right.set_ylim(0, 1.12 * max(*heights, needed))
    for axis, title in (
        (left, "Samples per epoch in each aspect bucket"),
        (right, f"Chunks of {CHUNK} tokens per sample, batch {found.batch_size}"),
    ):
        axis.set_title(title, loc="left", fontsize=11, pad=12, color=ink)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(pale)
        axis.grid(axis="y", color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=soft, length=0)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)


def add_command(commands: Any) -> None:
    """Add ``buckets``."""
    parser = commands.add_parser(
        "buckets", help="what a data set's aspect buckets cost in padding, and what chunk buckets save"
    )
    parser.add_argument(
        "dataset",
        type=Path,
        help="kohya's --dataset_config (.toml, .json), a metadata.jsonl or a folder of images and captions",
    )
    parser.add_argument("--batch_size", type=int, help="default: the .toml's, or 1")
    parser.add_argument(
        "--max_token_length",
        type=int,
        default=225,
        help="the trainer's limit, a multiple of 75 (default 225)",
    )
    parser.add_argument("--rule", choices=RULES, default="kohya", help="whose aspect buckets")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="none",
        help="commas: a tag is not parted between chunks, as A1111 and Forge do it",
    )
    parser.add_argument(
        "--leftovers", choices=LEFTOVERS, default="merge", help="what becomes of samples that fill no batch"
    )
    parser.add_argument("--world_size", type=int, default=1, help="number of processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer",
        default=TOKENIZER,
        help=f"folder or Hugging Face name of CLIP's tokenizer (default {TOKENIZER})",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="file that keeps the counts, so that the next run tokenizes only what is new",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="also write a picture of the first data set (needs matplotlib)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdxl-fixes buckets``."""
    _check_flags(args)
    from sdxl_fixes.token_counts import count_chunks

    if args.plot is not None:
        _check_plot(args.plot)  # before an hour of counting
    shown = sys.stderr.isatty()
    datasets = read(args.dataset, shown)
    tokenizer, reports = load_tokenizer(args.tokenizer), []
    for dataset in datasets:
        chunks = count_chunks(
            tokenizer, [sample.caption for sample in dataset.samples], args.split, args.cache, shown
        )
        limit = args.max_token_length // CHUNK
        reports.append(
            report(
                dataset, chunks, limit, args.batch_size, args.rule, args.leftovers, args.world_size, args.seed
            )
        )
    if args.plot is not None:
        plot(reports[0], args.plot)
    print(as_json(reports) if args.json else "\n\n".join(map(as_text, reports)))
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    most = CHUNK * MOST_CHUNKS
    if args.max_token_length % CHUNK or not 0 < args.max_token_length <= most:
        raise ValueError(
            f"--max_token_length must be a multiple of {CHUNK}, got "
            f"{shown(args.max_token_length)}: expected {CHUNK}..{most}"
        )
    for name, least, most in (
        ("batch_size", 1, MOST_BATCH),
        ("world_size", 1, MOST_RANKS),
        ("seed", 0, 2**64 - 1),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"--{name} must be a whole number of at least {least} and at most {most}, got {shown(value)}"
            )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer from a folder or a Hugging Face name. Raises ValueError, saying what to do, without
    transformers or the files."""
    from sdxl_fixes.prompts import token_ids

    try:
        import transformers
    except ImportError as error:
        raise ValueError('counting tokens needs transformers: pip install "sdxl-fixes[buckets]"') from error

    where = (
        f"--tokenizer {name}: no CLIP tokenizer there, and none downloaded: give the folder that holds "
        "vocab.json and merges.txt, "
        "such as tokenizer/ of an SDXL model in diffusers format"
    )
    if Path(name).is_dir() and not any(
        (Path(name) / file).is_file() for file in ("vocab.json", "tokenizer.json")
    ):
        raise ValueError(where)  # transformers 5 would make an empty one
    try:
        # from 5.0 on the latter is the fast one
        kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name)
        token_ids(tokenizer, [","])
    except OSError as error:
        raise ValueError(where) from error
    except (
        Exception
    ) as error:  # tokenizers raises plain Exception, and many kinds, for as many ways of being broken
        raise ValueError(f"{where} ({printable(f'{type(error).__name__}: {error}')[:200]})") from error
    return tokenizer


def _cell(key: str, value: float) -> str:
    return (
        f"{100 * value:.1f} %" if key == "padding" else f"{value:.3f}" if key == "chunks" else f"{value:.0f}"
    )
