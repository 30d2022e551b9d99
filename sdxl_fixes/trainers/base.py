"""What a base model says of itself: with --match_base it decides what is trained, and flags that say
otherwise are refused; with --keep_base the frozen base is asked by it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_fixes.checkpoint import Sampling, sampling_of_config
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.model_files.header import read_header
from sdxl_fixes.model_files.model_file import EDM_MARKERS, PICKLES, is_pickle, read_said
from sdxl_fixes.schedule import NoiseSchedule

STOCK = Sampling(NoiseSchedule.sdxl(), "epsilon")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_V_NAME = re.compile(r"v[-_. ]?pred", re.IGNORECASE)
# the flag that needs the base -> the beginning and the end of the sentence about one that cannot be told
_MATCH = ("--match_base", "or leave --match_base out and give the flags that it was trained with")
_KEEP = ("--keep_base must know how the base is sampled", "or leave --keep_base out")


@dataclass(frozen=True)
class Base:
    """A model by its name, how it is sampled, and by what it says so."""

    name: str
    sampling: Sampling
    by: str

    def __str__(self) -> str:
        return f"{self.name}: {self.sampling}, by {self.by}"


def read_base(name: str | None, revision: str | None = None) -> Base:
    """The base model ``name`` for --match_base: a file, a diffusers folder, or a name on the Hugging Face
    Hub, of which the scheduler config is read. One that says nothing is SDXL's own. Raises FlagError for what
    cannot be told."""
    if not name:
        raise FlagError(
            "--match_base needs --pretrained_model_name_or_path: give the base model, or leave it out"
        )
    return _read(name, revision, _MATCH)


def read_teacher(name: str | None, revision: str | None = None) -> Sampling:
    """How the base model ``name`` is sampled, for --keep_base: by the same, and as strictly, since a teacher
    that is taken for another teaches noise. SDXL's own way without a name."""
    return _read(name, revision, _KEEP).sampling if name else STOCK


def _read(name: str, revision: str | None, words: tuple[str, str]) -> Base:
    path = Path(name)
    try:
        if not path.exists():
            config = hub_config(name, revision)
            return Base(name, sampling_of_config(config), "its scheduler config on the Hugging Face Hub")
        said = read_said(path)
        return Base(name, *(said or (STOCK, _convention(path))))
    except (OSError, ValueError) as error:
        sentence = " ".join(str(error).split())
        named = "" if name in sentence else f"{name}: "
        raise FlagError(f"{words[0]}: {named}{sentence}; {words[1]}") from error


def hub_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The scheduler config of a model on the Hugging Face Hub (or of its copy in the cache), or of a folder.
    Raises OSError if it cannot be had."""
    if not Path(name).is_dir() and (
        not _HUB_NAME.fullmatch(name) or Path(name).suffix in (".safetensors", *PICKLES)
    ):
        raise FileNotFoundError(f"{name} is no folder and no name on the Hugging Face Hub")
    from diffusers import DDPMScheduler

    config: dict[str, Any] = DDPMScheduler.load_config(name, subfolder="scheduler", revision=revision)
    return config


def _convention(path: Path) -> str:
    """By what a model that says nothing is SDXL's own. Raises ValueError where something hints at another."""
    if path.is_file():
        header = read_header(path)
        predicts = header.metadata.get("modelspec.prediction_type")
        if edm := [marker for marker in EDM_MARKERS if marker in header.tensors]:
            raise ValueError(f"{path} is an EDM model by its marker {edm[0]}: take another base model")
        if predicts == "sd3":
            raise ValueError(
                f"{path} says flow (modelspec.prediction_type sd3), but not of which shift: stamp it"
            )
        if _V_NAME.search(path.stem):
            raise ValueError(
                f"{path} is named as if it were of v-prediction, and says nothing: stamp it (sdxl-fixes "
                "stamp), rename it"
            )
        if predicts == "epsilon" and "modelspec.merged_from" in header.metadata:
            raise ValueError(
                f"{path} was merged, and kohya's tools then write epsilon whatever it was: stamp it "
                "(sdxl-fixes stamp --force --from FILE, one of those that it was merged of)"
            )
        if predicts == "epsilon":
            return "its metadata modelspec.prediction_type epsilon"
    return "convention, since nothing in it says otherwise"


def check_flags(
    base: Base, flags: TrainingFlags, prediction: tuple[str, str] | None, trains: Collection[str]
) -> None:
    """Raise FlagError if the trainer does not train what ``base`` is (``trains``: the prediction types that
    it can), or if a flag says otherwise: those of the schedule, or ``prediction``, a flag as it was given and
    the prediction type that it means."""
    said = base.sampling
    if said.prediction_type not in trains:
        raise FlagError(
            f"--match_base: {base}, and this trainer trains {' or '.join(trains)}: take another base model"
        )
    if prediction is not None and prediction[1] != said.prediction_type:
        raise _contradiction(prediction[0], base)
    if not flags.agrees_with(said.schedule):
        raise _contradiction(flags.schedule_words, base)


def _contradiction(words: str, base: Base) -> FlagError:
    return FlagError(f"{words} contradicts --match_base ({base}): leave one of the two out")


def check_others(base: Base, others: Mapping[str, str | None]) -> None:
    """Raise FlagError if a model that training goes on from (flag -> its file) says that it was trained
    otherwise than ``base``."""
    for flag, name in others.items():
        path = Path(name) if name else None
        if path is None or not path.exists() or is_pickle(path):
            continue
        try:
            said = read_said(path)
        except OSError:  # the trainer says so
            continue
        except ValueError as error:
            raise FlagError(f"{_MATCH[0]}: {error}; {_MATCH[1]}") from error
        if said is not None and said[0] != base.sampling:
            raise FlagError(
                f"--match_base: --{flag} {Base(str(path), *said)}, and the base model {base}: the two do not "
                "belong together"
            )
