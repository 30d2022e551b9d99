"""Batches of one size and one number of chunks, of the store's latents and the prompts drawn for the epoch;
and how fast they come.

    python examples/bigasp/loader.py --table scored.parquet --latents latents --model MODEL --workers 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from latents import Latents
from prompt import LIMIT, Prompts
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from sdxl_fixes.buckets import ChunkBucketBatchSampler
from sdxl_fixes.prompts import layout, split_ids, token_ids

COLUMNS = ("caption", "tags", "source", "watermarks", "score")


class Rows(Sequence[dict[str, Any]]):
    """Rows of a table, in the order of ``numbers``. They stay in Arrow's columns: as Python objects they take
    several times the memory, and every process that reads them makes them its own by counting references."""

    def __init__(self, table: Any, numbers: np.ndarray) -> None:
        self.columns, self.numbers = dict(zip(table.column_names, table.columns, strict=True)), numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        number = int(self.numbers[place])
        return {name: column[number].as_py() for name, column in self.columns.items()}


class Pictures(Dataset[dict[str, Any]]):
    """The store's pictures, asked for by (place, epoch): a worker process has no epoch of its own."""

    def __init__(self, table: Path, store: Path, model: str, prompts: Prompts) -> None:
        self.store, self.prompts, self.folder = Latents(store), prompts, store
        self.tokenizers = [
            AutoTokenizer.from_pretrained(model, subfolder=n) for n in ("tokenizer", "tokenizer_2")
        ]
        try:
            found = pyarrow.parquet.read_table(table)
        except (OSError, ValueError) as error:  # Arrow's
            raise SystemExit(f"--table {table}: it is no parquet file that can be read ({error})") from error
        missing = {*COLUMNS, "path"} - {*found.column_names}
        if missing:
            raise SystemExit(f"{table} lacks the column(s) {', '.join(sorted(missing))}: see prompt.py")
        samples = [self.store.facts(place) for place in range(len(self.store))]
        rows = np.array([row for row, _, _ in samples], np.int64)
        paths = found.column("path")
        if len(rows) and (
            rows.max() >= len(found) or any(paths[row].as_py() != path for row, path, _ in samples)
        ):
            raise SystemExit(f"{store} was encoded from another table than {table}: give that one")
        self.rows = Rows(found.select(COLUMNS), rows)
        self.sizes = np.array([size for _, _, size in samples])  # of the latents, [N, 2]
        self.buckets = np.unique(self.sizes, axis=0, return_inverse=True)[1].reshape(-1)

    def chunks(self, epoch: int) -> np.ndarray:
        return self.prompts.chunks(self.rows, self.tokenizers[0], epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, asked: tuple[int, int]) -> dict[str, Any]:
        place, epoch = asked
        sample, text = self.store[place], self.prompts.draw(self.rows[place], epoch, place)
        ids = [split_ids(token_ids(each, [text])[0])[:LIMIT] for each in self.tokenizers]
        return {
            "latents": sample.latent,
            "time_ids": torch.tensor(sample.time_ids()),
            "chunks": ids,
            "prompts": text,
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """``latents`` [B, C, h, w], ``time_ids`` [B, 6], ``ids`` and ``ids_2`` [B, n, 77], ``prompts``; and
        whatever other tensors the samples have, stacked."""
        count = max(len(ids) for sample in samples for ids in sample["chunks"])
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        for k, name in enumerate(("ids", "ids_2")):
            each = self.tokenizers[k]
            ends = (each.bos_token_id, each.eos_token_id, each.pad_token_id)
            columns[name] = [layout(chunks[k], *ends, count) for chunks in columns["chunks"]]
        del columns["chunks"]
        return {
            name: torch.stack(column) if isinstance(column[0], torch.Tensor) else column
            for name, column in columns.items()
        }


class Asked:
    """A sampler's batches with the epoch that they are of."""

    def __init__(self, sampler: ChunkBucketBatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.sampler:
            yield [(place, self.sampler.epoch) for place in batch]


def loader(pictures: Pictures, sampler: ChunkBucketBatchSampler, workers: int) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        pictures,
        batch_sampler=Asked(sampler),  # type: ignore[arg-type]
        collate_fn=pictures.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a pipeline's folder or name: its tokenizers are used")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures = Pictures(args.table, args.latents, args.model, Prompts(args.seed))
    sampler = ChunkBucketBatchSampler(
        pictures.buckets, pictures.chunks, batch_size=args.batch_size, seed=args.seed
    )
    start = time.perf_counter()
    account = sampler.account()
    planned, start, samples, size = time.perf_counter() - start, time.perf_counter(), 0, 0
    for batch in loader(pictures, sampler, args.workers):
        samples, size = samples + len(batch["latents"]), size + batch["latents"].nbytes
    seconds = time.perf_counter() - start
    print(
        f"epoch 0: {samples} samples of {account.samples} in {account.batches} batches, "
        f"planned in {planned:.2f} s; "
        f"{account.chunks:.2f} chunks a sample (no batching: {account.floor:.2f}); "
        f"{samples / seconds:.0f} samples/s, {size / 1e6 / seconds:.0f} MB/s of latents"
    )


if __name__ == "__main__":
    main()
