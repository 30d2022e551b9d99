"""Read a training set without loading it: images, sizes and captions of a kohya TOML, a folder, or a metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_fixes.progress import bar

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Sample:
    """One image: its file, size (width, height) in pixels, caption, and how often an epoch has it."""

    image: Path
    size: tuple[int, int]
    caption: str
    repeats: float = 1


@dataclass
class Dataset:
    """Samples that may share batches. ``settings`` are kohya's keys (resolution, batch_size, min_bucket_reso, ...), as far as the source
    has them. ``problems`` are sentences, each about one file; an unusable image is left out, one without a caption stays, with none."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    image: Path
    caption: str | None
    repeats: float
    size: tuple[int, int] | None


def read(path: Path, progress: bool = False) -> list[Dataset]:
    """The data sets of ``path``: a kohya ``--dataset_config`` (.toml), a metadata.jsonl of diffusers or kohya (one object a line), a folder
    of images with captions in .txt files of the same name, or one of folders named ``REPEATS_name``. Raises ValueError or OSError, naming
    the file, for a source that is none of these or holds no usable image."""
    if not path.exists():
        raise OSError(f"there is no {path}: give a kohya .toml, a metadata.jsonl or a folder of images")
    if path.suffix == ".toml":
        parts = list(_from_toml(path))
    elif path.suffix == ".jsonl":
        parts = [(Dataset(str(path)), list(_from_lines(path, path.parent, 1)))]
    elif path.is_dir():
        parts = [(Dataset(str(path)), list(_from_folder(path)))]
    else:
        raise ValueError(f"{path} is no data set: expected a kohya .toml, a metadata.jsonl or a folder of images")
    for dataset, found in parts:
        _measure(dataset, found, progress)
        if not dataset.samples:
            why = f" ({dataset.problems[0]})" if dataset.problems else ""
            raise ValueError(f"{dataset.name} holds no usable image{why}")
    return [dataset for dataset, _ in parts]


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises ValueError for one that is broken, and on Python 3.10 without tomli or toml."""
    try:
        import tomllib  # Python 3.11
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ValueError(f'reading {path} on Python 3.10 needs tomli: pip install "sdxl-fixes[buckets]"') from error
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _from_toml(path: Path) -> Iterator[tuple[Dataset, list[_Found]]]:
    content = load_toml(path)
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(f"{path} has no [[datasets]]: expected a --dataset_config of kohya's sd-scripts")
    for number, entry in enumerate(datasets):
        options = {**general, **{key: value for key, value in entry.items() if key != "subsets"}}
        found: list[_Found] = []
        for subset in entry.get("subsets", []):
            found += _from_subset(path, {**options, **subset})
        yield Dataset(f"{path} [[datasets]] {number + 1}" if len(datasets) > 1 else str(path), settings=options), found


def _from_subset(path: Path, options: dict[str, Any]) -> list[_Found]:
    repeats = options.get("num_repeats", 1)
    folder = options.get("image_dir")
    if metadata := options.get("metadata_file"):
        file = Path(metadata)
        if not file.is_file():
            raise OSError(f"{path}: there is no metadata_file {metadata}")
        base = Path(folder) if folder else file.parent
        return list(_from_lines(file, base, repeats) if file.suffix == ".jsonl" else _from_json(file, base, repeats))
    if not folder or not Path(folder).is_dir():
        raise OSError(f"{path}: there is no image_dir {folder}")
    extension = "." + str(options.get("caption_extension", ".caption")).lstrip(".")
    return list(_from_images(Path(folder), extension, repeats, options.get("class_tokens")))


def _from_folder(path: Path) -> Iterator[_Found]:
    if (path / "metadata.jsonl").is_file():
        return _from_lines(path / "metadata.jsonl", path, 1)
    images = list(_from_images(path, ".txt", 1, None))
    if images:
        return iter(images)
    named = [(folder, folder.name.partition("_")[0]) for folder in sorted(path.iterdir()) if folder.is_dir()]
    return (
        found
        for folder, repeats in named
        if repeats.isdecimal()
        for found in _from_images(folder, ".txt", int(repeats), folder.name.partition("_")[2] or None)
    )


def _from_images(folder: Path, extension: str, repeats: float, otherwise: str | None) -> Iterator[_Found]:
    for image in sorted(folder.iterdir()):
        if image.suffix.lower() in IMAGES and image.is_file():
            text = image.with_suffix(extension)
            caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else otherwise
            yield _Found(image, caption, repeats, None)


def _from_lines(file: Path, base: Path, repeats: float) -> Iterator[_Found]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                name = entry.get("file_name") or entry["image_path"]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f'{file}, line {number}: expected an object with "file_name" or "image_path" ({error})') from error
            yield _found(base / name, entry, repeats)


def _from_json(file: Path, base: Path, repeats: float) -> Iterator[_Found]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} holds a {type(entries).__name__}: expected kohya's metadata, an object of images")
    for name, entry in entries.items():
        image = base / name
        if not image.suffix:
            image = next((image.with_suffix(suffix) for suffix in IMAGES if image.with_suffix(suffix).is_file()), image)
        yield _found(image, entry, repeats)


def _found(image: Path, entry: dict[str, Any], repeats: float) -> _Found:
    texts = [entry[key] for key in ("text", "caption", "prompt") if isinstance(entry.get(key), str)][:1]
    texts += [entry["tags"]] if isinstance(entry.get("tags"), str) else []
    size = entry.get("image_size")
    known = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
    return _Found(image, ", ".join(text for text in texts if text) if texts else None, repeats, known)


def _measure(dataset: Dataset, found: list[_Found], progress: bool) -> None:
    """Sizes from the files' headers, many at a time."""
    with ThreadPoolExecutor() as pool:
        sizes = list(bar(pool.map(_size, found), "reading sizes", progress, len(found)))
    for item, size in zip(found, sizes, strict=True):
        if isinstance(size, str):
            dataset.problems.append(size)
            continue
        if not item.caption:
            what = "no caption" if item.caption is None else "the caption is empty"
            dataset.problems.append(f"{item.image}: {what}, it trains without a prompt")
        dataset.samples.append(Sample(item.image, size, item.caption or "", item.repeats))


def _size(item: _Found) -> tuple[int, int] | str:
    """Width and height, or a sentence that says why the image is left out."""
    size = item.size
    if size is None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ValueError('image sizes are read with Pillow: pip install "sdxl-fixes[buckets]"') from error
        try:
            with Image.open(item.image) as image:
                size = image.size
        except Exception as error:  # Pillow raises many kinds, for as many ways of being broken
            return f"{item.image}: unreadable, left out ({str(error) or type(error).__name__})"
    return size if min(size) > 0 else f"{item.image}: {size[0]} x {size[1]} pixels, left out"
