"""Crop coordinates of latents that a script caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .run import SESSION

COLUMN = "sdxl_fixes_crop_top_lefts"


def encode(original: Callable[..., dict[str, Any]], batch: Any, vae: Any) -> dict[str, Any]:
    """The script's latents, with the crop that they were made of beside them."""
    crops = [tuple(crop) for crop in batch["crop_top_lefts"]]
    return {**original(batch, vae), COLUMN: crops}


def loader(original: Callable[..., None], self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
    """The script's loader of cached latents, whose examples get the kept crop in place of the one just
    drawn."""
    if COLUMN in getattr(dataset, "column_names", ()) and SESSION.called_by_script():
        SESSION.reached("crops")
        kwargs["collate_fn"] = WithKeptCrops(kwargs["collate_fn"])
    original(self, dataset, *args, **kwargs)


class WithKeptCrops:
    """A collate function that replaces ``crop_top_lefts``; a class, so that workers can be sent it."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self.collate([{**example, "crop_top_lefts": tuple(example[COLUMN])} for example in examples])
