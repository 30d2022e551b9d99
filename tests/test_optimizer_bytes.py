"""The bytes that optimizers keep, against hand arithmetic, and the recipes' table of them."""

import json

import lab
import optimizer_bytes
import pytest
import recipes
import torch
from optimizer_bytes import OPTIMIZERS, RESULT, Kept, average, shapes, table

PAGE = recipes.FOLDER.parent.parent / "docs" / "recipes.md"
FOUND = json.loads((lab.RESULTS / f"{RESULT}.json").read_text())
STEP = SIZE = 4  # one number in float32
N = 64 * 128


@pytest.fixture
def eager():
    """torchao's steps, not compiled."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("shape", "expected"), [((64, 128), 4 * N + STEP), ((8, 4, 3, 3), 4 * 288 + STEP), ((5,), 20 + STEP)]
)
def test_adamw_keeps_two_numbers_of_the_weights_kind(shape, expected):
    assert OPTIMIZERS["torch's AdamW"].of(shape) == expected
    assert OPTIMIZERS["torch's AdamW, float32 weights"].of(shape) == 2 * expected - STEP
    assert OPTIMIZERS["torch's AdamW"].states({shape: 3, (7,): 2}) == 3 * expected + 2 * (28 + STEP)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AdamW8bit", 2 * (N + N // 256 * 4 + 256 * 4) + STEP),  # codes, a scale for 256, what codes mean
        ("AdamW4bit", 2 * (N // 2 + N // 128 * 4 + 16 * 4) + STEP),
    ],
)
def test_torchao_keeps_codes_scales_and_their_meaning(eager, name, expected):
    kept = OPTIMIZERS[f"`torchao.optim.{name}`"]
    assert kept.of((64, 128)) == expected
    assert kept.of((10, 10)) == 4 * 100 + STEP  # small tensors are left as they are


def test_optimi_keeps_what_rounding_took_as_well():
    pytest.importorskip("optimi")
    name = "`optimi.AdamW` (`pip install torch-optimi`), Kahan sums"
    assert OPTIMIZERS[name].of((64, 128)) - 6 * N in (0, STEP)


@pytest.mark.parametrize(
    ("shape", "numbers"), [((64, 128), 64 + 128), ((8, 4, 3, 3), 2 * 8 * 4 * 3), ((5,), 5)]
)
def test_adafactor_keeps_rows_and_columns_in_float32(shape, numbers):
    """And the size of the weights."""
    pytest.importorskip("transformers")
    assert OPTIMIZERS["Adafactor, kohya's `fused_backward_pass`"].of(shape) == 4 * numbers + SIZE


def test_what_two_parameters_share_is_not_counted_twice(monkeypatch):
    class Sharing(torch.optim.SGD):
        common = torch.zeros(100)

        def step(self):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"common": self.common, "own": torch.zeros(3)}

    monkeypatch.setattr(optimizer_bytes, "Sharing", Sharing, raising=False)
    assert Kept("optimizer_bytes.Sharing").of((2,)) == 12


def test_the_average_is_in_float32():
    assert average((3, 5)) == 60


def test_the_table_is_of_sdxl_s_u_net():
    """Its numbers are those that kohya's own U-Net was counted to have."""
    known = shapes()
    number = sum(count * torch.Size(shape).numel() for shape, count in known.items())
    assert number == FOUND["parameters"] == recipes.UNET and FOUND["average"] == 4 * recipes.UNET
    assert FOUND["torch's AdamW"]["states"] == 4 * recipes.UNET + STEP * known.total()
    assert FOUND["Adafactor, kohya's `fused_backward_pass`"]["states"] == (
        4 * recipes.ADAFACTOR + SIZE * known.total()
    )
    assert FOUND["torch's AdamW"]["released"] == 2 * 1280 * 2560 * 9  # the largest convolution's gradient
    text = PAGE.read_text(encoding="utf-8")
    assert "\n".join(table(FOUND)) in text
    assert f"{number:,} parameters" in text and f"{FOUND['average'] / 1e9:.2f} GB" in text


def test_second_moments_in_bfloat16_hardly_fall():
    """What docs/recipes.md says of AdamW with states in bfloat16, against float32's."""

    def roots(dtype):
        generator, weights = torch.Generator().manual_seed(1), torch.zeros(512, dtype=dtype)
        parameter = torch.nn.Parameter(weights)
        optimizer, found = torch.optim.AdamW([parameter], lr=0.0), []
        for step in range(4000):
            scale = 1.0 if step < 2000 else 0.2
            parameter.grad = (scale * torch.randn(512, generator=generator)).to(dtype)
            optimizer.step()
            if step in (1999, 3999):
                found.append(float(optimizer.state[parameter]["exp_avg_sq"].float().sqrt().mean()))
        return found

    half, single = roots(torch.bfloat16), roots(torch.float32)
    ratios = [a / b for a, b in zip(half, single, strict=True)]
    assert ratios == pytest.approx([1.2, 2.9], abs=0.06)


def test_second_moments_in_float32_fall_and_come_back_from_a_state(eager):
    """Of weights in bfloat16, against torch's own of the same gradients and weights in float32."""
    from torchao.optim import _AdamW

    from sdxl_fixes.trainers.adamw import AdamW

    def made(kind, dtype, **options):
        weights = torch.linspace(-1, 1, 512).to(dtype)
        return kind([torch.nn.Parameter(weights)], lr=1e-4, weight_decay=0.0, **options)

    def step(optimizer, seed):
        (parameter,) = optimizer.param_groups[0]["params"]
        gradient = torch.randn(512, generator=torch.Generator().manual_seed(seed)).bfloat16()
        parameter.grad = (gradient if seed < 200 else gradient / 64).to(parameter.dtype)
        optimizer.step()
        return optimizer.state[parameter]

    single, ours = made(torch.optim.AdamW, torch.float32), made(AdamW, torch.bfloat16)
    for seed in range(400):
        if seed == 300:
            again = made(AdamW, torch.bfloat16)
            again.load_state_dict(ours.state_dict())
            again.param_groups[0]["params"][0].data.copy_(ours.param_groups[0]["params"][0].data)
            ours = again
        wanted = step(single, seed)
        found = step(ours, seed)
    for name in ("exp_avg", "exp_avg_sq"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-9)
    assert found["step"] == wanted["step"] == 400
    theirs = made(_AdamW, torch.bfloat16)
    for seed in range(400):
        kept = step(theirs, seed)
    assert kept["exp_avg_sq"].float().mean() > 1.1 * wanted["exp_avg_sq"].mean()
