"""benchmarks/tiny_sdxl.py: it trains what the demo loads, goes on where it stopped, and makes the world."""

import json

import pytest
import tiny_sdxl
import torch
from PIL import Image

from sdxl_fixes.demo import world
from sdxl_fixes.demo.world import DATA, OBJECTS, Variation, load_world


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(folder, *more):
    sizes = ("--steps", "2", "--varied_steps", "1", "--plain_steps", "1", "--falling_steps", "1")
    where = ("--output", str(folder / "model"), "--batch", "2")
    tiny_sdxl.main(["train", str(folder / "state"), *where, *sizes, *more])


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    command(tmp_path)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    steps, step = [], tiny_sdxl.Training.step

    def once(self):
        if self.done == 2 and not steps:
            steps.append(self.done)
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(tiny_sdxl.Training, "step", once)
    with pytest.raises(KeyboardInterrupt):
        command(stopped, "--save_seconds", "0")  # saved after every step
    command(stopped)
    first, second = (
        torch.load(folder / "state", weights_only=True)["averaged"] for folder in (tmp_path, stopped)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    # what it writes is what the demo loads, and is of the class and the sizes that are there
    config, ours = (
        json.loads((folder / "unet" / "config.json").read_text())
        for folder in (tmp_path / "model", DATA / "tiny-sdxl")
    )
    same = config.keys() - {"_diffusers_version", "_name_or_path"}
    assert {name: config[name] for name in same} == {name: ours.get(name) for name in same}
    monkeypatch.setattr(world, "DATA", tmp_path)
    (tmp_path / "model").rename(tmp_path / "tiny-sdxl")
    loaded = world.load_tiny_sdxl().state_dict()
    assert all(torch.equal(value, first[name].half().float()) for name, value in loaded.items())


def test_the_network_starts_as_half_the_identity():
    unet, noise = tiny_sdxl.build_unet(), torch.randn(2, world.CHANNELS, 8, 8)
    conditioning = load_world().conditioning(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with torch.no_grad():
        output = unet(noise, torch.tensor(500), **conditioning).sample
    torch.testing.assert_close((output * noise).mean(), torch.tensor(0.5), atol=0.1, rtol=0)


def test_the_world_is_what_the_script_makes_of_textures_and_words():
    """Of drawings, one made here: the package is not at hand."""
    pytest.importorskip("skimage")
    from safetensors.torch import load_file

    stored = load_file(DATA / "world.safetensors")
    made = torch.stack([tiny_sdxl.texture(name) for name in world.TEXTURES])
    assert (made.int() - stored["textures"].int()).abs().max() <= 1  # pillow's versions round differently
    assert len(tiny_sdxl.CODES) == len(OBJECTS) == len(stored["objects"])


def test_a_drawing_keeps_its_colours_and_its_alpha(tmp_path):
    (tmp_path / "assets").mkdir()
    image = Image.new("RGBA", (256, 256), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 128, 256))
    image.save(tmp_path / "assets" / "2764-fe0f.webp", lossless=True, exact=True)
    drawn = tiny_sdxl.drawing(tmp_path, "2764")
    assert drawn.shape == (4, 64, 64) and drawn.dtype == torch.uint8
    assert drawn[:, 32, 48].tolist() == [255, 0, 0, 255] and drawn[3, 32, 16] == 0
    with pytest.raises(SystemExit, match=r"1f34e\.webp is missing: expected @lobehub"):
        tiny_sdxl.drawing(tmp_path, "1f34e")


def test_variation_moves_as_far_as_it_fits_and_mirrors():
    """The corners of an object stay on the canvas, in affine_grid's terms: input = theta (output, 1)."""
    vary = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.9]])
    for variation, mirrored in ((Variation(), False), (tiny_sdxl.MUCH, True)):
        theta = variation.theta(vary)
        for row, (x, y) in zip(theta, ((1, -1), (-1, 1)), strict=True):
            # where the object's far edge, at +-1 of the input, comes to lie in the output
            edge = [(side * torch.sign(row[k, k]) - row[k, 2]) / row[k, k] for k, side in ((0, x), (1, y))]
            assert all(abs(float(value)) <= 1 + 1e-6 for value in edge)
            if variation.moved is None:
                assert [abs(float(value)) for value in edge] == pytest.approx([1, 1])
        assert bool((theta[:, 0, 0] < 0).any()) is mirrored
