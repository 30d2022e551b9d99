"""What kohya's sd-scripts train of a ``--dataset_config``: which pictures, how often, with which prompts, and
what stops them. Its rules as of 0.10.1 to 0.11.1; tested against its own data sets."""

from __future__ import annotations

import difflib
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_fixes.errors import printable, shown
from sdxl_fixes.options import flag, number, tables, text, whole
from sdxl_fixes.training_sets.images import Dataset, Found, image_of, size_in, sizes

MOST_REPEATS = 1_000_000  # of an image per epoch
PLAIN = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PLUGINS = {".avif": "pillow-avif-plugin", ".jxl": "pillow-jxl-plugin"}  # needed by kohya for these
PICTURES = tuple(end for low in (*PLAIN, *PLUGINS) for end in (low, low.upper()))
# pictures to many programs, left out by kohya
OTHERS = re.compile(r"\.(png|jpe?g|webp|bmp|avif|jxl|gif|tiff?|heic)$", re.IGNORECASE)
_CACHE = "metadata_cache.json"
STOPS = "kohya stops"

# every key that kohya takes, by the lowest place that may hold it: in [general], in [[datasets]], in
# [[datasets.subsets]] of a folder or of a metadata file
_GENERAL = frozenset(
    "color_aug face_crop_aug_range flip_aug num_repeats random_crop shuffle_caption keep_tokens "
    "keep_tokens_separator secondary_separator caption_separator enable_wildcard token_warmup_min "
    "token_warmup_step caption_prefix caption_suffix custom_attributes resize_interpolation "
    "caption_dropout_every_n_epochs caption_dropout_rate caption_tag_dropout_rate".split()
)
_FOLDER = frozenset("caption_extension class_tokens cache_info".split())
_DATASET = frozenset(
    "batch_size bucket_no_upscale bucket_reso_steps enable_bucket max_bucket_reso min_bucket_reso "
    "validation_seed validation_split resolution network_multiplier skip_image_resolution".split()
)
_OWN = frozenset("image_dir is_reg alpha_mask conditioning_data_dir".split())
_METADATA = frozenset("metadata_file image_dir alpha_mask".split())


@dataclass(frozen=True)
class Wording:
    """The options that make a prompt of a caption."""

    prefix: str | None = None
    suffix: str | None = None
    wildcard: bool = False
    separator: str = ","
    secondary: str | None = None
    shuffled: bool = False  # tags are taken apart and joined again
    keep_separator: str | None = None
    dropped: bool = False  # every caption, always

    @classmethod
    def of(cls, where: str, options: Mapping[str, Any]) -> Wording:
        """From a subset's options. Raises ValueError for one of a wrong kind."""
        rate = number(where, options, "caption_dropout_rate", 0, 1)
        every = whole(
            where,
            "caption_dropout_every_n_epochs",
            options.get("caption_dropout_every_n_epochs", 0),
            0,
            1 << 31,
        )
        shuffled = flag(where, options, "shuffle_caption") or any(
            number(where, options, key, 0, 1 << 31)
            for key in ("token_warmup_step", "caption_tag_dropout_rate")
        )
        separator = text(where, options, "caption_separator")
        if separator == "" and shuffled:
            raise ValueError(f"{where}: caption_separator is '': expected what stands between two tags")
        return cls(
            text(where, options, "caption_prefix"),
            text(where, options, "caption_suffix"),
            flag(where, options, "enable_wildcard"),
            "," if separator is None else separator,
            text(where, options, "secondary_separator"),
            shuffled,
            text(where, options, "keep_tokens_separator"),
            rate == 1 or every == 1,
        )

    def prompt(self, caption: str) -> str:
        """What is trained; the longest of what may be drawn, with every tag, in the caption's order."""
        if self.dropped:
            return ""
        caption = f"{self.prefix} {caption}" if self.prefix else caption
        caption = f"{caption} {self.suffix}" if self.suffix else caption
        lines = caption.split("\n")
        lines = [_drawn(line) for line in lines] if self.wildcard else lines[:1]
        return max((self._separated(self._joined(line)) for line in lines), key=len)

    def _separated(self, line: str) -> str:
        return line.replace(self.secondary, self.separator) if self.secondary else line

    def _joined(self, line: str) -> str:
        """The tags as they are joined after a shuffle."""
        if not self.shuffled:
            return line
        if not (self.keep_separator and self.keep_separator in line):
            return f"{self.separator} ".join(tag.strip() for tag in line.strip().split(self.separator))
        parts = line.split(self.keep_separator, 2)
        tags = [tag.strip() for part in parts for tag in part.split(self.separator)]
        return f"{self.separator} ".join(filter(None, tags))


def _drawn(line: str) -> str:
    """The longest of the {alternatives}; doubled braces mean themselves."""
    line = line.replace("{{", "\0").replace("}}", "\1")
    line = re.sub(r"\{([^}]+)\}", lambda match: max(match[1].split("|"), key=len), line)
    return line.replace("\0", "{").replace("\1", "}")


def from_config(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[Dataset, list[Found]]]:
    """The data sets of a ``--dataset_config``, read from ``path``. Raises ValueError and OSError for what
    kohya refuses at start; what stops it later, or is left out, is a sentence in ``Dataset.problems``."""
    general = content.get("general", {})
    if not isinstance(general, dict):
        raise ValueError(f"{path}: general is {shown(general)}: expected a table")
    datasets = tables(f"{path}: datasets", content.get("datasets", []))
    if not datasets:
        raise ValueError(f"{path} has no [[datasets]]: expected a --dataset_config of kohya's sd-scripts")
    odd = _unknown(str(path), content, frozenset(("general", "datasets")))
    odd += _unknown(f"{path} [general]", general, _GENERAL | _FOLDER | _DATASET | {"conditioning_data_dir"})
    for place, entry in enumerate(datasets, 1):
        name = f"{path} [[datasets]] {place}" if len(datasets) > 1 else str(path)
        settings = {**general, **{key: value for key, value in entry.items() if key != "subsets"}}
        dataset = Dataset(name, settings=settings, problems=odd if place == 1 else [])
        yield dataset, list(_of_dataset(dataset, entry))


def _of_dataset(dataset: Dataset, entry: Mapping[str, Any]) -> Iterator[Found]:
    name, settings = dataset.name, dataset.settings
    subsets = tables(f"{name}: subsets", entry.get("subsets", []))
    metadata = ["metadata_file" in subset for subset in subsets]
    if any(metadata) and not all(metadata):
        raise ValueError(
            f"{name} has subsets with metadata_file and subsets without, which kohya refuses: put them into "
            "[[datasets]] of their own"
        )
    finetuning = any(metadata)
    folder = frozenset() if finetuning else _FOLDER
    dataset.problems += _unknown(name, entry, _GENERAL | folder | _DATASET | {"subsets"})
    found, regular, seen = list[Found](), list[Found](), set[str]()
    for place, subset in enumerate(subsets, 1):
        where, options = f"{name} [[datasets.subsets]] {place}", {**settings, **subset}
        own = _METADATA if finetuning else _OWN
        dataset.problems += _unknown(where, subset, _GENERAL | folder | own)
        repeats = whole(where, "num_repeats", options.get("num_repeats", 1), -MOST_REPEATS, MOST_REPEATS)
        if repeats < 1:
            dataset.problems.append(f"{where}: num_repeats is {repeats}, and kohya leaves such a subset out")
            continue
        key = text(where, subset, "metadata_file" if finetuning else "image_dir")
        if not key:
            raise ValueError(f"{where} has neither image_dir nor metadata_file: expected one of them")
        if key in seen:
            dataset.problems.append(f"{where}: {printable(key)} is there twice, and kohya takes the first")
            continue
        part = list(
            _from_metadata(dataset, where, Path(key), options, repeats)
            if finetuning
            else _from_folder(dataset, where, Path(key), options, repeats)
        )
        if part:
            seen.add(key)
        (regular if flag(where, subset, "is_reg") and not finetuning else found).extend(part)
    if "resolution" not in settings and not finetuning:
        dataset.problems.append(
            f"{name} has no resolution: counted with 1024; kohya needs it, there or as --resolution"
        )
    if finetuning:  # kohya knows them by the name in the metadata: the last of one name is trained
        return iter({item.name: item for item in found}.values())
    return iter(found + _repeated(regular, sum(int(item.repeats) for item in found)))


def _repeated(regular: list[Found], wanted: int) -> list[Found]:
    """Regularisation images, in their order until there are as many as training images, then again and again
    one more of each."""
    kept, count = list[Found](), 0
    for item in regular:
        if count >= wanted:
            break
        kept.append(item)
        count += int(item.repeats)
    rounds, rest = divmod(max(0, wanted - count), len(kept)) if kept else (0, 0)
    return [replace(item, repeats=item.repeats + rounds + (place < rest)) for place, item in enumerate(kept)]


def _unknown(where: str, table: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    sentences = []
    for key in table.keys() - known:
        near = difflib.get_close_matches(str(key), known, 1)
        meant = f", did you mean {near[0]}?" if near else ""
        sentences.append(f"{where}: {printable(str(key))} is no key that kohya knows there, {STOPS}{meant}")
    return sorted(sentences)


def _from_folder(
    dataset: Dataset, where: str, folder: Path, options: Mapping[str, Any], repeats: int
) -> Iterator[Found]:
    tokens, extension = text(where, options, "class_tokens"), options.get("caption_extension", ".caption")
    if not isinstance(extension, str) or not extension.strip(".") or any(c in extension for c in "/\\\0"):
        end = 'expected the end of a file name, such as ".txt"'
        raise ValueError(f"{where}: caption_extension is {shown(extension)}: {end}")
    extension = extension if extension.startswith(".") else "." + extension
    wording = Wording.of(where, options)
    if not folder.is_dir():
        dataset.problems.append(f"{where}: there is no image_dir {printable(str(folder))}, it is left out")
        return iter(())
    cached = flag(where, options, "cache_info") and (folder / _CACHE).is_file()
    if cached:
        images = list(_from_cache(folder / _CACHE, repeats, wording))
    else:
        images = [
            Found(image, None, repeats, None, wording.prompt) for image in pictures(folder, dataset.problems)
        ]
    images = _large_enough(where, options, images)
    if not (images or flag(where, options, "is_reg")):
        dataset.problems.append(f"{where}: {printable(str(folder))} holds no picture{_below(folder)}")
    images = images if flag(where, options, "is_reg") else _trained(where, dataset, images)
    return iter(images) if cached else _captioned(dataset, images, extension, tokens, wording.wildcard)


def pictures(folder: Path, problems: list[str]) -> list[Path]:
    """The files of ``folder`` itself that kohya takes for pictures, sorted as it sorts them; sentences about
    others that look like some are added to ``problems``."""
    names = sorted(name for name in os.listdir(folder) if OTHERS.search(name) and not name.startswith("."))
    for name in names:
        if not name.endswith(PICTURES):
            problems.append(f"{folder / name}: kohya takes no such file, left out")
    for end, plugin in PLUGINS.items():
        if count := sum(name.endswith((end, end.upper())) for name in names):
            problems.append(f"{folder}: {count} {end}: kohya trains these only with {plugin} installed")
    return [folder / name for name in names if name.endswith(PICTURES) and (folder / name).is_file()]


def _below(folder: Path) -> str:
    """A hint at the sub-folders that hold pictures."""
    named = [sub.name for sub in sorted(folder.iterdir()) if sub.is_dir() and pictures(sub, [])]
    return f", but {printable(', '.join(named[:3]))} in it: kohya reads no sub-folders" if named else ""


def _captioned(
    dataset: Dataset, images: list[Found], extension: str, tokens: str | None, wildcard: bool
) -> Iterator[Found]:
    for item in images:
        caption = tokens
        if file := _caption_file(item.image, extension):
            try:
                caption = _lines_of(file, wildcard)
            except ValueError as error:
                dataset.problems.append(f"{file}: {error}, {STOPS}")
                continue
        yield replace(item, caption=caption)


def _caption_file(image: Path, extension: str) -> Path | None:
    """The caption of ``image``: its name with another end, or without the last four of five and more parts
    between underscores, where kohya's face detection puts numbers."""
    base = os.path.splitext(image)[0]
    parts = base.split("_")
    bases = [base, "_".join(parts[:-4] if len(parts) >= 5 else parts)]
    return next((Path(end) for end in (each + extension for each in bases) if os.path.isfile(end)), None)


def _lines_of(file: Path, wildcard: bool) -> str:
    """The first line or, where a line is drawn, those that are not blank. Raises ValueError, without the
    name, for what kohya stops at."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    if lines == [""]:
        raise ValueError("it is empty")
    lines = [line.strip() for line in lines]
    return "\n".join(filter(None, lines)) if wildcard else lines[0]


def _from_cache(file: Path, repeats: int, wording: Wording) -> Iterator[Found]:
    """What ``cache_info`` wrote at an earlier start, and kohya believes."""
    for name, entry in read_json(file).items():
        where = f"{file}, {shown(name)}"
        image = image_of(where, Path(), name)
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {shown(entry)}: expected an object with caption and resolution")
        size = size_in(where, entry.get("resolution"))
        yield Found(image, text(where, entry, "caption"), repeats, size, wording.prompt)


def _large_enough(where: str, options: Mapping[str, Any], images: list[Found]) -> list[Found]:
    """Without the images that skip_image_resolution leaves out, unreadable ones among them."""
    limit = options.get("skip_image_resolution")
    if limit is None:
        return images
    sides = limit if isinstance(limit, list) and len(limit) == 2 else (limit, limit)
    area = math.prod(whole(where, "skip_image_resolution", side, 1, 1 << 20) for side in sides)
    return [
        replace(item, size=size)
        for item, size in zip(images, sizes(images, STOPS), strict=True)
        if not isinstance(size, str) and math.prod(size) > area
    ]


def _trained(where: str, dataset: Dataset, images: list[Found]) -> list[Found]:
    """Without the images that validation_split holds out."""
    settings = dataset.settings
    share = number(where, settings, "validation_split", 0, 1)
    if not share:
        return images
    if not images:
        dataset.problems.append(f"{where}: there is no picture for validation_split to hold out, {STOPS}")
    seed = settings.get("validation_seed")
    if seed is None:
        dataset.problems.append(
            f"{where}: which images validation_split holds out is drawn anew at each start without "
            "validation_seed; counted with one draw"
        )
    drawn = list(images)
    random.Random(0 if seed is None else whole(where, "validation_seed", seed, 0, 1 << 63)).shuffle(drawn)
    return drawn[: math.ceil(len(drawn) * (1 - share))]


def _from_metadata(
    dataset: Dataset, where: str, file: Path, options: Mapping[str, Any], repeats: int
) -> Iterator[Found]:
    if not file.is_file():
        raise OSError(f"{where}: there is no metadata_file {printable(str(file))}")
    folder, wording = text(where, options, "image_dir"), Wording.of(where, options)
    entries = _lines(file) if str(file).endswith(".jsonl") else read_json(file)
    found = []
    for name, entry in entries.items():
        place = f"{file}, {shown(name)}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} is {shown(entry)}: expected an object with caption, tags, image_size")
        if not (folder or os.path.isabs(name)):
            raise ValueError(f"{place} is no absolute path, and {where} has no image_dir: kohya needs one")
        image = image_of(place, Path(folder or ""), name)
        if not (image.suffix and image.exists()):  # 0.11 looks for it by the ends it knows
            image = next(filter(Path.is_file, (Path(f"{image}{end}") for end in PICTURES)), image)
        caption = _with_tags(text(place, entry, "caption") or "", text(place, entry, "tags"), wording)
        size = size_in(place, entry.get("image_size"))
        found.append(Found(image, caption, repeats, size, wording.prompt, name))
    return iter(_large_enough(where, options, found))


def _lines(file: Path) -> dict[str, Any]:
    entries = {}
    for place, line in enumerate(re.findall(r".*\n|.+", _text_of(file)), 1):
        try:
            entry = json.loads(line)
            name = entry["image_path"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{file}, line {place}: expected an object with "image_path" ({error})'
            ) from error
        image_of(f"{file}, line {place}", Path(), name)
        if "width" in entry and "height" in entry:
            entry = {**entry, "image_size": [entry["width"], entry["height"]]}
        entries[name] = entry
    return entries


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError for another."""
    try:
        content = json.loads(_text_of(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}: expected an object, as kohya's files hold"
        )
    return content


def _text_of(file: Path) -> str:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from error
    if content.startswith("\ufeff"):
        raise ValueError(
            f"{file} begins with a byte order mark, which kohya refuses: save it as UTF-8 without one"
        )
    return content


def _with_tags(caption: str, tags: str | None, wording: Wording) -> str:
    if tags is None:
        return caption
    if not wording.wildcard:
        return wording.separator.join(filter(None, (caption, tags)))
    tags = tags.replace("\n", wording.separator)
    return (
        "\n".join(f"{line}{wording.separator}{tags}" for line in caption.split("\n") if line.strip()) or tags
    )
