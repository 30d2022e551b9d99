"""The images of a data set: files, sizes read from headers, captions, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sdxl_fixes.errors import shown
from sdxl_fixes.options import text


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
    ...), as far as the source has them. ``problems`` are sentences, each about one file or key; an unusable
    image is left out, one without a caption stays, with none."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """An image that is named somewhere, and not looked at yet."""

    image: Path
    caption: str | None
    repeats: float
    size: tuple[int, int] | None
    prompt: Callable[[str], str]  # what is trained of a caption
    name: str = ""  # by which its data set knows it


def read_text(file: Path) -> str:
    """A file of UTF-8, with or without a byte order mark. Raises ValueError for another."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from error


def image_of(where: str, base: Path, name: Any) -> Path:
    """The image of that name. Raises ValueError for what can be no file's name."""
    image = base / name if isinstance(name, str) and name and "\0" not in name else None
    if image is None or not image.name or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{where}: the image's name is {shown(name)}: expected the path of a file")
    return image


def caption_in(where: str, entry: Mapping[str, Any]) -> str | None:
    """The caption of a metadata entry, as diffusers, Hugging Face's data sets or kohya name it."""
    texts = (_text_in(where, entry, key) for key in ("text", "caption", "prompt"))
    caption = next((found for found in texts if found is not None), None)
    tags = _text_in(where, entry, "tags")
    return caption if tags is None else ", ".join(part for part in (caption, tags) if part)


def _text_in(where: str, entry: Mapping[str, Any], key: str) -> str | None:
    """The text under ``key``; of a list of texts, of which diffusers draws one, the longest."""
    value = entry.get(key)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return str(max(value, key=len))
    return text(where, entry, key)


def size_in(where: str, size: Any) -> tuple[int, int] | None:
    """``image_size`` of a metadata entry, None without it. Raises ValueError for anything but two numbers."""
    if size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) in (int, float) and abs(side) < 2**31 for side in size)
    ):
        raise ValueError(f"{where}: image_size is {shown(size)}: expected [width, height] in pixels")
    return int(size[0]), int(size[1])


def measure(dataset: Dataset, found: list[Found], progress: bool, unreadable: str = "left out") -> None:
    """Fill in ``dataset.samples``. ``unreadable`` says what becomes of an image without a size."""
    for item, size in zip(found, sizes(found, unreadable, progress), strict=True):
        if isinstance(size, str):
            dataset.problems.append(f"{item.image}: {size}")
        else:
            dataset.samples.append(_sample(dataset, item, size))


def sizes(found: list[Found], unreadable: str, progress: bool = False) -> list[tuple[int, int] | str]:
    """Width and height of each, from the files' headers, many at a time, or why there are none."""
    with ThreadPoolExecutor() as pool:
        each = pool.map(lambda item: _size(item, unreadable), found)
        return list(tqdm(each, "reading sizes", len(found), disable=not progress))


def _sample(dataset: Dataset, item: Found, size: tuple[int, int]) -> Sample:
    prompt = item.prompt(item.caption or "")
    if not item.caption:
        what = "no caption" if item.caption is None else "the caption is empty"
        alone = f"with {shown(prompt)} alone" if prompt else "without a prompt"
        dataset.problems.append(f"{item.image}: {what}, it trains {alone}")
    return Sample(item.image, size, prompt, item.repeats)


def _size(item: Found, otherwise: str) -> tuple[int, int] | str:
    """Width and height, or why there are none."""
    size = item.size
    if size is None:
        try:
            with Image.open(item.image) as image:
                size = image.size
        except Exception as error:  # Pillow raises many kinds, for as many ways of being broken
            return f"unreadable, {otherwise} ({str(error) or type(error).__name__})"
    return size if min(size) > 0 else f"{size[0]} x {size[1]} pixels, {otherwise}"
