"""Measures on pictures of tiny-sdxl's world (sdxl_fixes/demo/world.py): brightness asked and got, a
classifier and a distance that see what a picture shows, and how a network follows the scale of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import digits
import numpy as np
import torch
from torch import nn

from sdxl_fixes import Objective
from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.world import CHANNELS, OBJECTS, PLACES, World, fold, load_world, unfold
from sdxl_fixes.prediction import x0_and_noise

# the number of each place's look: two captions of one colour look alike
LOOKS = [list(map(str, PLACES.values())).index(str(look)) for look in PLACES.values()]
NIGHT = [number for number, place in enumerate(PLACES) if place in ("at night", "on black")]
CORNER = 6  # pixels: the corners' squares show the background alone
EXTENT = 2.15  # standard deviation of a latent value
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Every second caption, as a chessboard: objects and places, [224] each."""
    pairs = [(o, p) for o in range(len(OBJECTS)) for p in range(len(PLACES)) if (o + p) % 2 == 0]
    objects, places = zip(*pairs, strict=True)
    return torch.tensor(objects), torch.tensor(places)


def background(pictures: torch.Tensor) -> torch.Tensor:
    """Mean of the four corners over the colours, -1 to 1, of RGB pictures [B, 3, H, W]: [B]."""
    rows = torch.cat((pictures[..., :CORNER, :], pictures[..., -CORNER:, :]), 2)
    return torch.cat((rows[..., :CORNER], rows[..., -CORNER:]), 3).double().mean((1, 2, 3))


def contrast(pictures: torch.Tensor) -> float:
    """Mean standard deviation of the brightness inside a picture."""
    return float(pictures.double().mean(1).flatten(1).std(1).mean())


def slope(asked: torch.Tensor, got: torch.Tensor) -> float:
    """Of the line of least squares: 1 is right, 0 is the same brightness whatever is asked."""
    asked, got = asked.double(), got.double()
    centred = asked - asked.mean()
    return float((centred * (got - got.mean())).sum() / centred.square().sum())


# ---------------------------------------------------------------- a classifier


class Classifier(nn.Module):
    """Latents [B, CHANNELS, 8, 8] -> features [B, 128], and from them scores of objects and of places."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(CHANNELS, 96, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(96, 128, 3, 2, 1), nn.SiLU(), nn.Conv2d(128, 128, 3, 2, 1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(512, 128)),
        )
        self.objects, self.places = nn.Linear(128, len(OBJECTS)), nn.Linear(128, len(PLACES))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.features(latents / EXTENT)
        return features, self.objects(nn.functional.silu(features)), self.places(nn.functional.silu(features))


def classifier(work: Path, steps: int = 1500, batch: int = 64) -> Classifier:
    """A classifier trained on the world's pictures with up to half a standard deviation of noise; kept in
    ``work``."""
    from safetensors.torch import load_file, save_file

    path, world = work / f"classifier-{steps}.safetensors", load_world()
    torch.manual_seed(0)
    network = Classifier()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    looks = torch.tensor(LOOKS)
    for _ in range(steps):
        latents, objects, places = world.draw(batch, generator)
        level = 0.5 * EXTENT * torch.rand(batch, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        _, of_objects, of_places = network(latents + level * noise)
        loss = nn.functional.cross_entropy(of_objects, objects)
        (loss + nn.functional.cross_entropy(of_places, looks[places])).backward()
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
    work.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(network.state_dict(), file)
    return network.eval()


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Truth:
    """The world's own pictures, with which samples are compared."""

    latents: torch.Tensor  # [3 x 224, CHANNELS, 8, 8], in the captions' order
    features: torch.Tensor  # [3 x 224, 128]
    asked: torch.Tensor  # [places]: mean background
    classifier: Classifier

    @classmethod
    @torch.no_grad()
    def load(cls, world: World, network: Classifier, seed: int = 10**6) -> Truth:
        """Three pictures of each caption."""
        objects, places = (rows.repeat(3) for rows in captions())
        pictures = world.pictures(objects, places, torch.Generator().manual_seed(seed))
        got, latents = background(pictures), fold(pictures)
        asked = torch.stack([got[places == place].mean() for place in range(len(PLACES))])
        return cls(latents, network(latents)[0], asked, network)

    @torch.no_grad()
    def judge(self, latents: torch.Tensor, objects: torch.Tensor, places: torch.Tensor) -> dict[str, float]:
        """Of samples [B, CHANNELS, 8, 8] of captions: "slope" of the background's brightness got over asked,
        and its standard error over captions and starting noise ("slope_data", bootstrap); mean "night"
        background, "contrast"; the energy "distance" of pictures and of "features", where 0 is right; the
        share whose "object" and "place" is the one asked for. Classifier and features see what a screen
        shows, values in -1 to 1."""
        pictures = unfold(latents)
        got = background(pictures)
        features, of_objects, of_places = self.classifier(fold(pictures.clamp(-1, 1)))
        night = torch.isin(places, torch.tensor(NIGHT))
        looks = torch.tensor(LOOKS)[places]
        again = torch.randint(len(got), (200, len(got)), generator=torch.Generator().manual_seed(1))
        slopes = [slope(self.asked[places[sample]], got[sample]) for sample in again]
        return {
            "slope": slope(self.asked[places], got),
            "slope_data": float(np.std(slopes, ddof=1)),
            "night": float(got[night].mean()),
            "contrast": contrast(pictures),
            "distance": digits.distance(latents, self.latents),
            "features": digits.distance(features, self.features),
            "object": float((of_objects.argmax(1) == objects).double().mean()),
            "place": float((of_places.argmax(1) == looks).double().mean()),
        }


# ---------------------------------------------------------------- the scale of the input


@torch.no_grad()
def response(predict: Predict, objective: Objective, latents: torch.Tensor) -> dict[str, float]:
    """How ``predict(noisy, timesteps)`` follows its input. "scale": output for 1.1 times the input over the
    output, at the middle and the last timestep (1.1 follows, 1 is blind). "gain": what a shift of the
    canvas's mean brightness by one standard deviation of its noise, at the last timestep, makes in the
    predicted epsilon; 1 takes all of it for noise."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    last = len(objective.schedule) - 1
    found: dict[str, float] = {}
    for name, t in (("middle", last // 2), ("last", last)):
        index = torch.full((len(latents),), t)
        step = objective.draw(latents, training=False, index=index, noise=noise)
        plain, louder = (predict(scale * step.noisy, step.timesteps).double() for scale in (1.0, 1.1))
        found[f"scale_{name}"] = float((plain * louder).sum() / plain.square().sum())
    alpha, sigma = (float(level[last]) for level in objective.schedule.levels()[:2])
    shift = torch.zeros_like(step.noisy)
    shift[:, 0] = sigma / shift.shape[-1]  # sigma times the unit vector of the mean brightness

    def epsilon(noisy: torch.Tensor) -> float:
        output = predict(noisy, step.timesteps)
        noise = x0_and_noise(output, objective.prediction_type, noisy, alpha, sigma)[1]
        return float(noise[:, 0].double().mean()) * noise.shape[-1]

    found["gain"] = (epsilon(step.noisy + shift) - epsilon(step.noisy - shift)) / 2
    return found
