"""Pictures that kohya's trainers do not train on: from a folder, or the split that sd-scripts makes and its
finetuning throws away. They are encoded by the trainer's own VAE, text encoders and strategies."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.command_line import flag, flags_of
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.log import warn
from sdxl_fixes.trainers.heldout import HeldOut, Picture, Pixels, bucketed, in_folder, untouched_draws
from sdxl_fixes.training_sets.images import Sample
from sdxl_fixes.validation import evaluating

from .run import SESSION

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SplitFlags:
    """The flags' values."""

    heldout_split: float | None = flag(
        None,
        "hold out this share of the training pictures, drawn by --seed, in place of --heldout_dir; the "
        "network trainer has --validation_split",
        group="heldout",
    )


SPLIT_FLAGS = flags_of(SplitFlags)


def check(args: argparse.Namespace) -> None:
    """Have sd-scripts make the split. Raises FlagError where it cannot, and for flags that name no pictures
    or two kinds of them."""
    share = getattr(args, "heldout_split", None)
    if share is None:
        return
    if not 0 < share < 1:
        raise FlagError(f"--heldout_split {share:g}: expected a share in (0, 1), or leave it out")
    if not args.heldout_steps or args.heldout_dir:
        raise FlagError(
            "--heldout_split needs --heldout_steps, and takes the place of --heldout_dir: give the one, "
            "leave out the other"
        )
    if hasattr(args, "validation_split"):
        raise FlagError(
            "--heldout_split: this script has --validation_split of its own, which --heldout_steps takes: "
            "give that, with --validation_seed"
        )
    args.validation_split, args.validation_seed = share, getattr(args, "seed", None) or 0


def datasets(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The data sets are made: which pictures are held out is known."""
    made = original(*args, **kwargs)
    heldout, run = _heldout(), SESSION.run
    if heldout is None or run is None:
        return made
    trained, split = made
    if run.args.heldout_dir:
        pictures = bucketed(in_folder(run.args.heldout_dir), _buckets(trained.datasets[0]))
    else:
        pictures = [
            picture
            for dataset in (split.datasets if split is not None else ())
            for picture in bucketed(_samples(dataset), _buckets(dataset))
        ]
    heldout.name(_untrained(pictures, trained.datasets))
    return made


def cache_text(
    original: Callable[..., Any],
    self: Any,
    models: list[Any],
    accelerator: Accelerator,
    *args: Any,
    **kw: Any,
) -> Any:
    """The captions are encoded once, after which the text encoders may be gone: ours, too."""
    result = original(self, models, accelerator, *args, **kw)
    heldout = _heldout()
    if heldout is not None and SESSION.run is not None:
        with torch.no_grad(), untouched_draws():
            for picture in heldout.pictures:
                heldout.captions[picture.caption] = _embed(picture.caption, models, SESSION.run.args)
    return result


def begin(accelerator: Accelerator, vae: Any, text_encoders: Any) -> None:
    """Before the first step: everything else is encoded."""
    heldout, run = _heldout(), SESSION.run
    if heldout is None or run is None or heldout.samples is not None:
        return
    if not heldout.total:
        raise FixError(
            "--heldout_steps knows the data sets of sd-scripts' own configuration, not those of "
            "--dataset_class: leave one of the two out"
        )
    from library.sdxl_model_util import VAE_SCALE_FACTOR
    from library.sdxl_train_util import get_size_embeddings

    models = [*text_encoders, accelerator.unwrap_model(text_encoders[-1])] if text_encoders else []
    args, device = run.args, accelerator.device

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
        return found.mul(VAE_SCALE_FACTOR)

    def conditioning(picture: Picture, pixels: Pixels) -> Any:
        if picture.caption not in heldout.captions:
            heldout.captions[picture.caption] = _embed(picture.caption, models, args)
        text, pooled = heldout.captions[picture.caption]
        sizes = [torch.tensor([pair]) for pair in (pixels.original, pixels.crop, pixels.target)]
        embedded = get_size_embeddings(*sizes, pooled.device)
        return (text, torch.cat([pooled, embedded.to(pooled.dtype)], dim=1)), {}

    with _on(vae, device), evaluating(accelerator._models), accelerator.autocast():
        heldout.encode(latents, conditioning)
    heldout.captions.clear()


def _embed(
    caption: str, models: Sequence[Any], args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net is told of a caption, as training tells it: text [1, n, 2048], pooled [1, 1280]."""
    from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

    tokens, encoding = TokenizeStrategy.get_strategy(), TextEncodingStrategy.get_strategy()
    if getattr(args, "weighted_captions", False):
        ids, weights = tokens.tokenize_with_weights(caption)
        first, second, pooled = encoding.encode_tokens_with_weights(tokens, list(models), ids, weights)
    else:
        first, second, pooled = encoding.encode_tokens(tokens, list(models), list(tokens.tokenize(caption)))
    return torch.cat([first, second], dim=2), pooled


def _samples(dataset: Any) -> list[Sample]:
    from sdxl_fixes.training_sets.images import Found, sizes

    infos = sorted(dataset.image_data.values(), key=lambda info: info.absolute_path)
    found = [Found(Path(info.absolute_path), info.caption, 1, None, str) for info in infos if not info.is_reg]
    measured = zip(found, sizes(found, "left out"), strict=True)
    return [
        Sample(item.image, size, str(item.caption)) for item, size in measured if not isinstance(size, str)
    ]


def _buckets(dataset: Any) -> list[tuple[int, int]]:
    """The (width, height) that a data set's pictures are brought to."""
    if dataset.enable_bucket:
        return [(int(width), int(height)) for width, height in dataset.bucket_manager.resos]
    return [(int(dataset.width), int(dataset.height))]


def _untrained(pictures: list[Picture], datasets: Sequence[Any]) -> list[Picture]:
    """Those that no data set trains on. (Rounding of sd-scripts' split can give one picture to both sides,
    and without a seed it draws the two sides each by itself.)"""
    trained = {Path(info.absolute_path).resolve() for each in datasets for info in each.image_data.values()}
    left = [picture for picture in pictures if picture.image.resolve() not in trained]
    if gone := len(pictures) - len(left):
        warn(
            f"--heldout_steps: {gone} of {len(pictures)} held-out pictures are trained on, too, and left out"
        )
    return left


@contextlib.contextmanager
def _on(model: torch.nn.Module, device: torch.device) -> Any:
    """``model`` on ``device`` meanwhile, without gradients."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _heldout() -> HeldOut | None:
    return None if SESSION.run is None else SESSION.run.heldout
