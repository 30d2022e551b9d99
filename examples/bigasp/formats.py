"""What stores of latents cost: bytes by compression, and samples per second by format.

    python examples/bigasp/formats.py --samples 2000 --folder /a/disk

The latents are made: no package ships the SDXL VAE's weights. "white" is Gaussian noise of spread 0.9, the
worst case, which no compressor finds anything in but its exponents; "photographs" are scikit-image's, 8 x 8
pixels to four channels by fixed random weights, of the same spread, with a posterior's noise of 0.05. Times
are the process's own, so another load on the machine does not count; reads are of what was just written.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import latents
import numpy as np
import torch
import zstandard

SHAPE = (4, 128, 128)


def white(count: int) -> torch.Tensor:
    return 0.9 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def photographs(count: int) -> torch.Tensor:
    import skimage
    from PIL import Image

    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png")
    generator = torch.Generator().manual_seed(0)
    weights, found = torch.randn(4, 192, generator=generator), []
    for name in names[:count]:
        photo = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB").resize((1024, 1024))
        pixels = torch.from_numpy(np.asarray(photo)).permute(2, 0, 1).float() / 127.5 - 1
        blocks = torch.nn.functional.pixel_unshuffle(pixels, 8).flatten(1)
        latent = (weights @ blocks).reshape(SHAPE)
        latent = 0.9 * (latent - latent.mean((1, 2), keepdim=True)) / latent.std((1, 2), keepdim=True)
        found.append(latent + 0.05 * torch.randn(SHAPE, generator=generator))
    return torch.stack(found)


def shuffled(data: bytes) -> bytes:
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, 2).T).tobytes()


def planes(zstd: zstandard.ZstdCompressor) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    def forth(data: bytes) -> bytes:
        first, second = (
            zstd.compress(plane.tobytes()) for plane in np.frombuffer(data, np.uint8).reshape(-1, 2).T
        )
        return len(first).to_bytes(4, "little") + first + second

    return forth, lambda data: latents.unpack(data, SHAPE, torch.float16).numpy().tobytes()


def compression() -> None:
    """The table of bytes per latent."""
    packers: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "none": (bytes, bytes),
        "gzip 9 (his)": (gzip.compress, gzip.decompress),
        "zstd 3": (zstandard.ZstdCompressor(3).compress, zstandard.ZstdDecompressor().decompress),
    }
    for level in (3, 19):
        packers[f"shuffle + zstd {level}"] = (
            lambda data, level=level: zstandard.ZstdCompressor(level).compress(shuffled(data)),
            zstandard.ZstdDecompressor().decompress,
        )
    packers["two planes, zstd 3"] = planes(zstandard.ZstdCompressor(3))
    packers["two planes, matches of 7 (ours)"] = planes(latents.compressor())
    print("| latents | stored as | compression | KB each | of raw | pack, MB/s | unpack, MB/s |")
    print("|---|---|---|---:|---:|---:|---:|")
    for name, made in (("white", white(6)), ("photographs", photographs(6))):
        for kind, dtype in latents.DTYPES.items():
            raw = [each.to(dtype).view(torch.uint8).numpy().tobytes() for each in made]
            total = sum(map(len, raw))
            for packer, (forth, back) in packers.items():
                start = time.process_time()
                packed = [forth(each) for each in raw]
                middle = time.process_time()
                for each in packed:
                    back(each)
                end, size = time.process_time(), sum(map(len, packed))
                speeds = f"{total / 1e6 / (middle - start):.0f} | {total / 1e6 / (end - middle):.0f}"
                print(
                    f"| {name} | {kind} | {packer} | {size / 1e3 / len(raw):.1f} "
                    f"| {size / total:.3f} | {speeds} |"
                )


def plain_files(folder: Path, packed: list[bytes]) -> Callable[[int], bytes]:
    """His: a file each."""
    for k, data in enumerate(packed):
        file = folder / f"{k % 256:02x}" / f"{k}.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    return lambda k: (folder / f"{k % 256:02x}" / f"{k}.bin").read_bytes()


def mds(folder: Path, packed: list[bytes]) -> Callable[[int], bytes]:
    with latents.MDSWriter(out=str(folder), columns={"latent": "bytes"}, size_limit=latents.SHARD) as out:
        for data in packed:
            out.write({"latent": data})
    store = latents.LocalDataset(str(folder))
    return lambda k: store[k]["latent"]


def litdata(folder: Path, packed: list[bytes]) -> Callable[[int], bytes]:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=latents.SHARD)
    for k, data in enumerate(packed):
        writer[k] = {"latent": data}
    writer.done()
    writer.merge()
    store = StreamingDataset(str(folder))
    return lambda k: store[k]["latent"]


def webdataset(folder: Path, packed: list[bytes]) -> None:
    """Written only: webdataset 1.0 reads its tars from the start and has no place for an index."""
    from webdataset import ShardWriter

    with ShardWriter(str(folder / "%06d.tar"), maxsize=latents.SHARD, verbose=0) as out:
        for k, data in enumerate(packed):
            out.write({"__key__": f"{k:08d}", "latent": data})
    for tar in folder.glob("*.tar"):
        tarfile.open(tar).close()


def stores(folder: Path, count: int) -> None:
    """The table of formats."""
    few = [latents.pack(each.half()) for each in white(64)]
    packed = [few[k % 64] for k in range(count)]
    megabytes = sum(map(len, packed)) / 1e6
    order = np.random.default_rng(0).permutation(count)
    print("| format | write, samples/s | MB over the data | random reads, samples/s | MB/s | unpacked too |")
    print("|---|---:|---:|---:|---:|---:|")
    for write in (plain_files, mds, litdata, webdataset):
        place = folder / write.__name__
        if place.exists():
            raise SystemExit(
                f"{place} exists, and is removed in the end: remove it, or give another --folder"
            )
        place.mkdir(parents=True)
        start = time.process_time()
        read = write(place, packed)
        written = count / (time.process_time() - start)
        over = sum(file.stat().st_blocks * 512 for file in place.rglob("*")) / 1e6 - megabytes
        columns = f"{write.__name__} | {written:.0f} | {over:.1f}"
        if read is None:
            print(f"| {columns} | none | | |")
        else:
            plain = rate(read, order)
            unpacked = rate(lambda k, read=read: latents.unpack(read(k), SHAPE, torch.float16), order)
            print(f"| {columns} | {plain:.0f} | {plain * megabytes / count:.0f} | {unpacked:.0f} |")
        shutil.rmtree(place)


def rate(read: Callable[[int], object], order: np.ndarray) -> float:
    start = time.process_time()
    for k in order.tolist():
        read(k)
    return len(order) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("formats"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    compression()
    print()
    stores(args.folder, args.samples)


if __name__ == "__main__":
    main()
