"""A score from 0 to 9 for every picture, learnt from which of two pictures people find better.

    python examples/bigasp/rank.py --table pictures.parquet --pairs pairs.parquet --output ranked
        --vision openai/clip-vit-base-patch32

1. every judged picture also meets a copy of itself that is blurred or saved as a bad JPEG, and wins;
2. a classifier of two embeddings learns who wins; what it is worth is told on pictures that it never saw;
3. in the arena the classifier judges random pairs, and Elo turns the wins into ratings;
4. ten bins of equal width between the lowest and the highest rating are the scores;
5. a ranker learns the score from one embedding, and scores the whole table.

Reads columns ``path`` of the table, ``winner`` and ``loser`` (paths) of the pairs, each pair once; a tie is
the pair in both orders. Writes scored.parquet (the table with ``score``), bins.html (ten pictures per bin)
and report.json.
A column ``quality`` (made pictures have it) is what the report compares the order with.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from sdxl_fixes.sample_table import SampleTable

BINS = 10
WRITTEN = ("scored.parquet", "bins.html", "report.json")


class Eye:
    """Embeddings of pictures by a transformers vision model."""

    def __init__(self, name: str, device: str, batch: int) -> None:
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model, self.device, self.batch = AutoModel.from_pretrained(name).eval().to(device), device, batch

    @torch.inference_mode()
    def __call__(self, paths: Sequence[str], corrupt: int | None = None) -> torch.Tensor:
        """[N, width], float32 on the CPU; with a seed ``corrupt``, of corrupted copies."""
        found = []
        for first in range(0, len(paths), self.batch):
            images = [Image.open(path).convert("RGB") for path in paths[first : first + self.batch]]
            if corrupt is not None:
                images = [corrupted(image, corrupt, first + k) for k, image in enumerate(images)]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
            seen = getattr(self.model, "get_image_features", self.model)(pixel_values=pixels)
            seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
            found.append(seen.flatten(1).float().cpu())
        return torch.cat(found)


def corrupted(image: Image.Image, seed: int, number: int) -> Image.Image:
    """A worse copy: blur, by 1/100 to 1/25 of the longer side, or JPEG at quality 20 to 70."""
    random = np.random.default_rng([seed, number])
    if random.random() < 0.5:
        return image.filter(ImageFilter.GaussianBlur(max(image.size) * random.uniform(0.01, 0.04)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(random.integers(20, 71)))
    return Image.open(file).convert("RGB")


class Classifier(nn.Module):
    """The logit that ``a`` beats ``b``: swapping them turns its sign."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(2 * width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 1)
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        there, back = self.net(torch.cat((a, b), 1)), self.net(torch.cat((b, a), 1))
        return (there - back).squeeze(1)


def fit(model: nn.Module, inputs: Sequence[torch.Tensor], loss_of: Any, steps: int, seed: int) -> None:
    """AdamW at one cycle of the learning rate, on batches of up to 512."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(inputs[0]), (min(512, len(inputs[0])),), generator=generator)
        loss_of(*(each[rows] for each in inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def arena(classifier: Classifier, embeddings: torch.Tensor, rounds: int, seed: int) -> np.ndarray:
    """Elo ratings, [N], from 1500: in each round every picture meets two others, drawn at random."""
    ratings, random = np.full(len(embeddings), 1500.0), np.random.default_rng(seed)
    for number in range(rounds):
        a = random.permutation(len(ratings))
        b = np.roll(a, 1)
        with torch.inference_mode():
            wins = (classifier(embeddings[a], embeddings[b]) > 0).numpy()
        gain = 10 * (wins - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        gain = gain * (
            1 if number < rounds // 2 else 0.2
        )  # the second half lets the noise of single games settle
        ratings[a] += gain
        ratings[b] -= gain
    return ratings


def bins(ratings: np.ndarray) -> np.ndarray:
    """0..9, of equal width between the lowest and the highest rating."""
    span = max(np.ptp(ratings), 1e-9)
    return np.minimum((BINS * (ratings - ratings.min()) / span).astype(int), BINS - 1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank."""
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def judged(args: argparse.Namespace, eye: Eye) -> tuple[Classifier, dict[str, float], torch.Tensor]:
    """The classifier, its accuracies on pictures that it never saw, and the embeddings' (mean, spread)."""
    pairs = pd.read_parquet(args.pairs)
    paths = sorted({*pairs.winner, *pairs.loser})
    place = {path: k for k, path in enumerate(paths)}
    clean, worse = eye(paths), eye(paths, corrupt=args.seed)
    scale = torch.stack((clean.mean(0), clean.std(0) + 1e-6))
    clean, worse = (clean - scale[0]) / scale[1], (worse - scale[0]) / scale[1]
    winner, loser = (torch.tensor([place[path] for path in pairs[side]]) for side in ("winner", "loser"))
    unseen = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(paths)) < len(paths) // 5)
    train = ~unseen[winner] & ~unseen[loser]  # split by picture: split by pair, a picture is on both sides
    test = unseen[winner] & unseen[loser]
    if not train.any() or not test.any():
        raise SystemExit(f"--pairs {args.pairs}: {len(pairs)} pairs are too few to learn from and to test on")
    classifier = Classifier(clean.shape[1])
    better = torch.cat((clean[winner[train]], clean[~unseen]))
    beaten = torch.cat((clean[loser[train]], worse[~unseen]))
    fit(
        classifier,
        (better, beaten),
        lambda a, b: nn.functional.softplus(-classifier(a, b)).mean(),
        args.steps,
        args.seed,
    )
    with torch.inference_mode():
        people = (classifier(clean[winner[test]], clean[loser[test]]) > 0).float().mean().item()
        copies = (classifier(clean[unseen], worse[unseen]) > 0).float().mean().item()
    count = int(test.sum()) + int(unseen.sum())
    both = (people * int(test.sum()) + copies * int(unseen.sum())) / count
    return classifier, {"pairs": people, "corrupted": copies, "both": both, "of": count}, scale


def check(args: argparse.Namespace) -> pd.DataFrame:
    """The table. Raises SystemExit, before anything is loaded, for settings that lead nowhere and for an
    ``output`` of another run: ``bins.html`` would mix both."""
    for name, least in {"arena_pictures": BINS, "rounds": 1, "steps": 1, "batch_size": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise SystemExit(f"--{name} {getattr(args, name)}: expected {least} or more")
    for name, columns in {"pairs": {"winner", "loser"}, "table": {"path"}}.items():
        file = getattr(args, name)
        if not file.exists():
            raise SystemExit(f"--{name} {file}: there is no such file")
        found = pd.read_parquet(file)
        if lacking := columns - {*found.columns}:
            raise SystemExit(f"--{name} {file} lacks the column(s) {', '.join(sorted(lacking))}")
    args.output.mkdir(parents=True, exist_ok=True)
    if old := [name for name in WRITTEN if (args.output / name).exists()]:
        raise SystemExit(
            f"--output {args.output} holds {', '.join(old)} of another run: remove it, or give another "
            "--output"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vision", required=True, help="a transformers vision model: a name or a folder")
    parser.add_argument("--arena_pictures", type=int, default=8192, help="drawn from the table")
    parser.add_argument("--rounds", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000, help="of each of the two trainings")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    table = check(args)
    torch.manual_seed(args.seed)

    eye = Eye(args.vision, args.device, args.batch_size)
    classifier, accuracy, (mean, spread) = judged(args, eye)
    chosen = np.random.default_rng(args.seed).permutation(len(table))[: args.arena_pictures]
    embeddings = (eye(table.path.to_numpy()[chosen].tolist()) - mean) / spread
    ratings = arena(classifier, embeddings, args.rounds, args.seed)
    target = torch.from_numpy(bins(ratings))

    held = len(target) // 10
    ranker = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(len(mean), 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, BINS)
    )
    fit(
        ranker,
        (embeddings[held:], target[held:]),
        lambda x, y: nn.functional.cross_entropy(ranker(x), y),
        args.steps,
        args.seed,
    )
    with torch.inference_mode():
        off = (ranker(embeddings[:held]).argmax(1) - target[:held]).abs()
        table["score"] = -1
        table.loc[chosen, "score"] = ranker(embeddings).argmax(1).numpy()
        rest = np.flatnonzero(table.score < 0)
        for first in range(0, len(rest), 1024):
            rows = rest[first : first + 1024]
            part = (eye(table.path.to_numpy()[rows].tolist()) - mean) / spread
            table.loc[rows, "score"] = ranker(part).argmax(1).numpy()
    table.to_parquet(args.output / WRITTEN[0])

    page = SampleTable(args.output / WRITTEN[1], "Ten pictures of every score")
    random, shown = np.random.default_rng(args.seed), []
    for score in range(BINS):
        rows = random.permutation(np.flatnonzero(table.score == score))[:10]
        shown += [(f"{score}", f"{k}", Image.open(table.path[row])) for k, row in enumerate(rows)]
    page.update(shown)

    report = {
        "pair accuracy": accuracy,
        "exact bin": (off == 0).float().mean().item(),
        "within one bin": (off <= 1).float().mean().item(),
        "pictures per score": np.bincount(table.score, minlength=BINS).tolist(),
    }
    if "quality" in table:
        quality = table.quality.to_numpy()
        report["rank correlation with the known quality"] = {
            "rating": spearman(ratings, quality[chosen]),
            "score": spearman(table.score.to_numpy(), quality),
        }
    (args.output / WRITTEN[2]).write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
