"""Read a training set without loading it: images, sizes and captions of a kohya TOML, a folder, or a
metadata.jsonl."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sdxl_fixes.errors import printable, shown
from sdxl_fixes.options import flag, tables, text, whole

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff")
MOST_REPEATS = 1_000_000  # of an image per epoch
_ALTERNATIVES = re.compile(r"\{\{|\}\}|\{([^}]+)\}")  # of a prompt; doubled braces mean themselves


@dataclass(frozen=True)
class Sample:
    """One image: its file, size (width, height) in pixels, caption, and how often an epoch has it."""

    image: Path
    size: tuple[int, int]
    caption: str
    repeats: float = 1


@dataclass
class Dataset:
    """Samples that may share batches. ``settings`` are kohya's keys (resolution, batch_size, min_bucket_reso,
    ...), as far as the source has them. ``problems`` are sentences, each about one file; an unusable image is
    left out, one without a caption stays, with none."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Wording:
    """Kohya's options that make a prompt of a caption."""

    prefix: str | None = None
    suffix: str | None = None
    wildcard: bool = False
    whole: bool = False  # not kohya's: every line of a caption is trained

    def prompt(self, caption: str) -> str:
        """What is trained: the first line or, of lines and {alternatives} that are drawn from, the
        longest."""
        caption = " ".join(part for part in (self.prefix, caption, self.suffix) if part)
        if self.whole:
            return caption
        if not self.wildcard:
            return caption.split("\n")[0]
        return max((_ALTERNATIVES.sub(_longest, line) for line in caption.split("\n")), key=len)


def _longest(match: re.Match[str]) -> str:
    return match[0][0] if match[1] is None else max(match[1].split("|"), key=len)


@dataclass(frozen=True)
class _Found:
    image: Path
    caption: str | None
    repeats: float
    size: tuple[int, int] | None
    wording: _Wording = _Wording()


def read(path: Path, progress: bool = False) -> list[Dataset]:
    """The data sets of ``path``: a kohya ``--dataset_config`` (.toml), a metadata.jsonl of diffusers or kohya
    (one object a line), a folder of images with captions in .txt files of the same name, or one of folders
    named ``REPEATS_name``. Captions are as kohya trains them: of a file the first line; with a .toml's prefix
    and suffix; with ``enable_wildcard`` the longest of the lines. Raises ValueError or OSError, naming the
    file, for a source that is none of these or holds no usable image."""
    if not path.exists():
        raise OSError(f"there is no {path}: give a kohya .toml, a metadata.jsonl or a folder of images")
    if path.suffix == ".toml":
        parts = list(_from_toml(path))
    elif path.suffix == ".jsonl":
        parts = [(Dataset(str(path)), list(_from_lines(path, path.parent, 1, _Wording(whole=True))))]
    elif path.is_dir():
        parts = [(Dataset(str(path)), list(_from_folder(path)))]
    else:
        raise ValueError(
            f"{path} is no data set: expected a kohya .toml, a metadata.jsonl or a folder of images"
        )
    for dataset, found in parts:
        _measure(dataset, found, progress)
        if not dataset.samples:
            why = f" ({printable(dataset.problems[0])})" if dataset.problems else ""
            raise ValueError(f"{dataset.name} holds no usable image{why}")
    return [dataset for dataset, _ in parts]


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
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of too many digits
        raise ValueError(f"{path} is not TOML: {error}") from error


def _from_toml(path: Path) -> Iterator[tuple[Dataset, list[_Found]]]:
    content = load_toml(path)
    general = content.get("general", {})
    if not isinstance(general, dict):
        raise ValueError(f"{path}: general is {shown(general)}: expected a table")
    datasets = tables(f"{path}: datasets", content.get("datasets", []))
    if not datasets:
        raise ValueError(f"{path} has no [[datasets]]: expected a --dataset_config of kohya's sd-scripts")
    for number, entry in enumerate(datasets, 1):
        name = f"{path} [[datasets]] {number}" if len(datasets) > 1 else str(path)
        options = {**general, **{key: value for key, value in entry.items() if key != "subsets"}}
        dataset, found = Dataset(name, settings=options), []
        for place, subset in enumerate(tables(f"{name}: subsets", entry.get("subsets", [])), 1):
            where = f"{name} [[datasets.subsets]] {place}"
            if (
                repeats := whole(
                    where,
                    "num_repeats",
                    {**options, **subset}.get("num_repeats", 1),
                    -MOST_REPEATS,
                    MOST_REPEATS,
                )
            ) < 1:
                dataset.problems.append(
                    f"{where}: num_repeats is {repeats}, and kohya leaves such a subset out"
                )
            else:
                found += _from_subset(where, {**options, **subset}, repeats)
        yield dataset, found


def _from_subset(where: str, options: dict[str, Any], repeats: int) -> list[_Found]:
    folder, metadata = text(where, options, "image_dir"), text(where, options, "metadata_file")
    tokens, extension = text(where, options, "class_tokens"), options.get("caption_extension", ".caption")
    if not isinstance(extension, str) or not extension.strip(".") or any(c in extension for c in "/\\\0"):
        raise ValueError(
            f"{where}: caption_extension is {shown(extension)}: "
            'expected the end of a file name, such as ".txt"'
        )
    prefix, suffix = text(where, options, "caption_prefix"), text(where, options, "caption_suffix")
    wording = _Wording(prefix, suffix, flag(where, options, "enable_wildcard"))
    if metadata:
        file = Path(metadata)
        if not file.is_file():
            raise OSError(f"{where}: there is no metadata_file {printable(metadata)}")
        base = Path(folder) if folder else file.parent
        return list((_from_lines if file.suffix == ".jsonl" else _from_json)(file, base, repeats, wording))
    if not folder:
        raise ValueError(f"{where} has neither image_dir nor metadata_file: expected one of them")
    if not Path(folder).is_dir():
        raise OSError(f"{where}: there is no image_dir {printable(folder)}")
    return list(_from_images(Path(folder), "." + extension.lstrip("."), repeats, tokens, wording))


def _from_folder(path: Path) -> Iterator[_Found]:
    if (path / "metadata.jsonl").is_file():
        return _from_lines(path / "metadata.jsonl", path, 1, _Wording(whole=True))
    images = list(_from_images(path, ".txt", 1, None, _Wording()))
    if images:
        return iter(images)
    named = [(folder, folder.name.partition("_")[0]) for folder in sorted(path.iterdir()) if folder.is_dir()]
    return (
        found
        for folder, repeats in named
        if repeats.isdecimal()
        for found in _from_images(
            folder,
            ".txt",
            whole(str(folder), "the number before _", int(repeats), 0, MOST_REPEATS),
            folder.name.partition("_")[2] or None,
            _Wording(),
        )
    )


def _from_images(
    folder: Path, extension: str, repeats: float, otherwise: str | None, wording: _Wording
) -> Iterator[_Found]:
    for image in sorted(folder.iterdir()):
        if image.suffix.lower() in IMAGES and image.is_file():
            file = image.with_suffix(extension)
            caption = (
                _caption(file.read_text(encoding="utf-8", errors="replace"), wording.wildcard)
                if file.is_file()
                else otherwise
            )
            yield _Found(image, caption, repeats, None, wording)


def _caption(content: str, wildcard: bool) -> str:
    """A caption file's first line or, where one of its lines is drawn, those that are not blank."""
    lines = [line.strip() for line in content.split("\n")]
    return "\n".join(filter(None, lines)) if wildcard else lines[0]


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from error


def _from_lines(file: Path, base: Path, repeats: float, wording: _Wording) -> Iterator[_Found]:
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                entry = json.loads(line)
                name = entry.get("file_name") or entry["image_path"]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'{where}: expected an object with "file_name" or "image_path" ({error})'
                ) from error
            yield _found(where, _image(where, base, name), entry, repeats, wording)


def _from_json(file: Path, base: Path, repeats: float, wording: _Wording) -> Iterator[_Found]:
    try:
        entries = json.loads(_text_of(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"{file} holds a {type(entries).__name__}: expected kohya's metadata, an object of images"
        )
    for name, entry in entries.items():
        where = f"{file}, {shown(name)}"
        image = _image(where, base, name)
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {shown(entry)}: expected an object with caption, tags, image_size")
        if not image.suffix:
            image = next(
                (image.with_suffix(suffix) for suffix in IMAGES if image.with_suffix(suffix).is_file()), image
            )
        yield _found(where, image, entry, repeats, wording)


def _image(where: str, base: Path, name: Any) -> Path:
    """The image of that name. Raises ValueError for what can be no file's name."""
    image = base / name if isinstance(name, str) and name and "\0" not in name else None
    if image is None or not image.name or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{where}: the image's name is {shown(name)}: expected the path of a file")
    return image


def _found(where: str, image: Path, entry: dict[str, Any], repeats: float, wording: _Wording) -> _Found:
    texts = (_text_in(where, entry, key) for key in ("text", "caption", "prompt"))
    caption, tags = (
        next((found for found in texts if found is not None), None),
        _text_in(where, entry, "tags"),
    )
    if tags is not None and wording.wildcard:  # every line of the caption gets the tags
        caption = "\n".join(
            line + ", " + tags.replace("\n", ", ") for line in (caption or "").split("\n") if line.strip()
        )
    elif tags is not None:
        caption = ", ".join(part for part in (caption, tags) if part)
    return _Found(image, caption, repeats, _size_in(where, entry), wording)


def _text_in(where: str, entry: dict[str, Any], key: str) -> str | None:
    """The text under ``key``; of a list of texts, of which diffusers draws one, the longest."""
    value = entry.get(key)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return str(max(value, key=len))
    return text(where, entry, key)


def _size_in(where: str, entry: dict[str, Any]) -> tuple[int, int] | None:
    size = entry.get("image_size")
    if size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) in (int, float) and abs(side) < 2**31 for side in size)
    ):
        raise ValueError(f"{where}: image_size is {shown(size)}: expected [width, height] in pixels")
    return int(size[0]), int(size[1])


def _measure(dataset: Dataset, found: list[_Found], progress: bool) -> None:
    """Sizes from the files' headers, many at a time."""
    with ThreadPoolExecutor() as pool:
        sizes = list(tqdm(pool.map(_size, found), "reading sizes", len(found), disable=not progress))
    for item, size in zip(found, sizes, strict=True):
        if isinstance(size, str):
            dataset.problems.append(size)
            continue
        prompt = item.wording.prompt(item.caption or "")
        if not item.caption:
            what = "no caption" if item.caption is None else "the caption is empty"
            alone = f"with {shown(prompt)} alone" if prompt else "without a prompt"
            dataset.problems.append(f"{item.image}: {what}, it trains {alone}")
        dataset.samples.append(Sample(item.image, size, prompt, item.repeats))


def _size(item: _Found) -> tuple[int, int] | str:
    """Width and height, or a sentence that says why the image is left out."""
    size = item.size
    if size is None:
        try:
            with Image.open(item.image) as image:
                size = image.size
        except Exception as error:  # Pillow raises many kinds, for as many ways of being broken
            return f"{item.image}: unreadable, left out ({str(error) or type(error).__name__})"
    return size if min(size) > 0 else f"{item.image}: {size[0]} x {size[1]} pixels, left out"
