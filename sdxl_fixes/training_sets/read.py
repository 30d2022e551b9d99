"""Read a training set without loading it: images, sizes and captions of kohya's configuration, a folder, or a
metadata.jsonl."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_fixes.errors import printable
from sdxl_fixes.options import whole
from sdxl_fixes.training_sets import kohya_config
from sdxl_fixes.training_sets.images import (
    Dataset,
    Found,
    caption_in,
    image_of,
    measure,
    read_text,
    size_in,
)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff")
KINDS = "a kohya .toml or .json, a metadata.jsonl or a folder of images"


def read(path: Path, progress: bool = False) -> list[Dataset]:
    """The data sets of ``path``: a kohya ``--dataset_config`` (.toml, .json), a metadata.jsonl (one object a
    line), a folder of images with captions in .txt files of the same name, or one of
    folders named ``REPEATS_name``. Of a kohya configuration, pictures, repeats and prompts are those that
    kohya trains; of a .txt the first line. Raises ValueError or OSError, naming the file, for a source that
    is none of these or holds no usable image."""
    if not path.exists():
        raise OSError(f"there is no {path}: give {KINDS}")
    unreadable = "left out"
    if path.suffix.lower() in (".toml", ".json"):
        unreadable = kohya_config.STOPS
        content = load_toml(path) if path.suffix.lower() == ".toml" else kohya_config.read_json(path)
        parts = list(kohya_config.from_config(path, content))
    elif path.suffix == ".jsonl":
        parts = [(Dataset(str(path)), list(_from_lines(path, path.parent)))]
    elif path.is_dir():
        dataset = Dataset(str(path))
        parts = [(dataset, list(_from_folder(dataset, path)))]
    else:
        raise ValueError(f"{path} is no data set: expected {KINDS}")
    for dataset, found in parts:
        measure(dataset, found, progress, unreadable)
    datasets = [dataset for dataset, _ in parts]
    full, empty = ([each for each in datasets if bool(each.samples) is has] for has in (True, False))
    sentences = [_empty(dataset) for dataset in empty]
    if not full:
        raise ValueError(sentences[0])
    full[0].problems += [f"{sentence}, left out" for sentence in sentences]
    return full


def _empty(dataset: Dataset) -> str:
    why = f" ({printable(dataset.problems[0])})" if dataset.problems else ""
    return f"{dataset.name} holds no usable image{why}"


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises ValueError for one that is broken, and on Python 3.10 without tomli."""
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError as error:
        raise ValueError(f"reading {path} on Python 3.10 needs tomli: pip install tomli") from error
    try:
        content = path.read_text(encoding="utf-8")
        if content.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
        return dict(tomllib.loads(content))
    except (
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of too many digits
        raise ValueError(f"{path} is not TOML: {error}") from error


def _from_folder(dataset: Dataset, path: Path) -> Iterator[Found]:
    if (path / "metadata.jsonl").is_file():
        return _from_lines(path / "metadata.jsonl", path)
    images = [each for each in sorted(path.iterdir()) if each.suffix.lower() in IMAGES and each.is_file()]
    if images:
        return (Found(each, _caption(each, None), 1, None, _first_line) for each in images)
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    named = [folder for folder in folders if folder.name.partition("_")[0].isdecimal()]
    if folders and not named:
        names = printable(", ".join(folder.name for folder in folders[:3]))
        dataset.problems.append(
            f"only folders in it: {names}: give one of them, or name them REPEATS_name as kohya does"
        )
    return (
        Found(
            each,
            _caption(each, folder.name.partition("_")[2] or None),
            whole(str(folder), "the number before _", int(folder.name.partition("_")[0]), 0, 1_000_000),
            None,
            _first_line,
        )
        for folder in named
        for each in kohya_config.pictures(folder, dataset.problems)
    )


def _caption(image: Path, otherwise: str | None) -> str | None:
    file = image.with_suffix(".txt")
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else otherwise


def _first_line(caption: str) -> str:
    return caption.split("\n")[0].strip()


def _from_lines(file: Path, base: Path) -> Iterator[Found]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                entry = json.loads(line)
                name = entry.get("file_name") or entry["image_path"]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'{where}: expected an object with "file_name" or "image_path" ({error})'
                ) from error
            image, size = image_of(where, base, name), size_in(where, entry.get("image_size"))
            yield Found(image, caption_in(where, entry), 1, size, str)
