"""The drop-in schedulers inside diffusers' real SDXL pipelines, whose U-Net is replaced by the exact model of
Gaussian data."""

import diffusers
import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.guidance import rescale_guidance, rescaled_guidance
from sdxl_fixes.schedulers import SAMPLERS, fix_scheduler

ZERO = NoiseSchedule.sdxl().zero_terminal_snr()
PROMPT = {"prompt_embeds": torch.ones(2, 7, 32), "pooled_prompt_embeds": torch.ones(2, 32)}
NEGATIVE = {
    "negative_prompt_embeds": torch.zeros(2, 7, 32),
    "negative_pooled_prompt_embeds": torch.zeros(2, 32),
}
UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2),
    cross_attention_dim=32,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8
    ).eval()
    texts = dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    return dict(unet=unet, vae=vae, **texts)


def pipeline(cls, parts, scheduler, **more):
    pipe = cls(**parts, scheduler=scheduler, add_watermarker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class KnowsTheImage:
    """A perfect network for data that is one image: it returns the v that leads to ``x0`` from any noise
    level of ``schedule``."""

    def __init__(self, schedule, x0):
        self.schedule, self.x0, self.asked = schedule, x0, []

    def __call__(self, sample, timestep, **kwargs):
        row = int(timestep)
        assert row == float(timestep)
        self.asked.append(row)
        alpha, sigma = (
            self.schedule.sqrt_alphas_cumprod[row],
            self.schedule.sqrt_one_minus_alphas_cumprod[row],
        )
        sample = sample[:, :4]
        x0 = self.x0.repeat(len(sample) // len(self.x0), 1, 1, 1)
        return ((alpha * (sample - alpha * x0) / sigma - sigma * x0).float(),)


class KnowsTheFlow(KnowsTheImage):
    """The same for rectified flow: the velocity, at any s = t/1000."""

    def __call__(self, sample, timestep, **kwargs):
        self.asked.append(float(timestep))
        x0 = self.x0.repeat(len(sample) // len(self.x0), 1, 1, 1)
        return ((sample[:, :4] - x0) / (float(timestep) / 1000),)


X0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def knows(parts, monkeypatch):
    network = KnowsTheImage(ZERO, X0)
    monkeypatch.setattr(parts["unet"], "forward", network)
    return network


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(parts, knows, sampler):
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, ZERO.scheduler(sampler, "v_prediction"))
    got = pipe(
        **PROMPT, num_inference_steps=9, guidance_scale=1.0, output_type="latent", height=8, width=8
    ).images
    assert knows.asked[0] == 999 and len(set(knows.asked)) == 9
    assert torch.allclose(got, X0, atol=1e-3)


FLOW = NoiseSchedule.flow(6)


@pytest.fixture
def knows_flow(parts, monkeypatch):
    network = KnowsTheFlow(FLOW, X0)
    monkeypatch.setattr(parts["unet"], "forward", network)
    return network


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rectified_flow_from_text_and_from_an_image(parts, knows_flow, sampler):
    scheduler = FLOW.scheduler(sampler, "flow_prediction")
    options = dict(guidance_scale=1.0, output_type="latent")
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, scheduler)
    got = pipe(**PROMPT, num_inference_steps=9, height=8, width=8, **options).images
    assert knows_flow.asked[0] == 1000 and len(set(knows_flow.asked)) == 9
    assert torch.allclose(got, X0, atol=1e-3)
    knows_flow.asked.clear()
    pipe = pipeline(diffusers.StableDiffusionXLImg2ImgPipeline, parts, scheduler)
    got = pipe(**PROMPT, image=X0, strength=0.5, num_inference_steps=10, **options).images
    assert len(set(knows_flow.asked)) == 5 and knows_flow.asked[0] < 1000
    assert torch.allclose(got, X0, atol=1e-3)


def test_timesteps_of_one_s_own_in_a_flow_pipeline(parts, knows_flow):
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, FLOW.scheduler("euler", "flow_prediction"))
    options = dict(timesteps=[1000, 750.5, 300], guidance_scale=1.0, output_type="latent", height=8, width=8)
    got = pipe(**PROMPT, **options).images
    assert knows_flow.asked == [1000, 750.5, 300]
    assert torch.allclose(got, X0, atol=1e-3)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image(parts, knows, sampler, strength):
    pipe = pipeline(
        diffusers.StableDiffusionXLImg2ImgPipeline, parts, ZERO.scheduler(sampler, "v_prediction")
    )
    got = pipe(
        **PROMPT,
        image=X0,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    assert len(set(knows.asked)) == int(10 * strength) and (knows.asked[0] == 999) == (strength == 1.0)
    assert torch.allclose(got, X0, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_what_is_not_masked(parts, knows, sampler):
    """The unmasked half is noised again to every timestep of the list, the masked half drawn."""
    pipe = pipeline(
        diffusers.StableDiffusionXLInpaintPipeline, parts, ZERO.scheduler(sampler, "v_prediction")
    )
    kept = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(10))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    options = dict(
        image=kept,
        mask_image=mask,
        strength=1.0,
        num_inference_steps=8,
        guidance_scale=1.0,
        height=8,
        width=8,
    )
    got = pipe(**PROMPT, **options, output_type="latent").images
    assert torch.allclose(got[..., :4], kept[..., :4], atol=1e-3)
    assert torch.allclose(got[..., 4:], X0[..., 4:], atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_controlnet_which_sets_no_begin_index(parts, knows, sampler):
    controlnet = diffusers.ControlNetModel.from_unet(parts["unet"]).eval()
    scheduler = ZERO.scheduler(sampler, "v_prediction")
    pipe = pipeline(diffusers.StableDiffusionXLControlNetPipeline, parts, scheduler, controlnet=controlnet)
    picture = torch.zeros(1, 3, 8, 8)
    got = pipe(
        **PROMPT,
        image=picture,
        num_inference_steps=7,
        guidance_scale=1.0,
        output_type="latent",
        height=8,
        width=8,
    ).images
    assert knows.asked[0] == 999
    assert torch.allclose(got, X0, atol=1e-3)


def test_the_pipeline_is_the_loop(parts):
    """The benchmark's bare loop and the real pipeline take the same steps."""
    scheduler = ZERO.scheduler("dpmpp_2m", "v_prediction")
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, scheduler)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = dict(num_inference_steps=6, guidance_scale=1.0, output_type="latent", height=8, width=8)
    got = pipe(**PROMPT, latents=latents, **options).images
    again, x = ZERO.scheduler("dpmpp_2m", "v_prediction"), latents
    again.set_timesteps(6)
    added = {
        "text_embeds": PROMPT["pooled_prompt_embeds"],
        "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(2, 1),
    }
    with torch.no_grad():
        for t in again.timesteps:
            output = parts["unet"](
                again.scale_model_input(x, t), t, PROMPT["prompt_embeds"], added_cond_kwargs=added
            ).sample
            x = again.step(output, t, x).prev_sample
    assert torch.equal(got, x)


def test_a_pipeline_folder_loads_without_and_with_the_plugin(parts, tmp_path):
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, diffusers.EulerDiscreteScheduler())
    fix_scheduler(pipe, ZERO, "v_prediction").save_pretrained(tmp_path)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert type(plain.scheduler) is diffusers.EulerDiscreteScheduler
    assert (
        plain.scheduler.config.prediction_type == "v_prediction"
        and plain.scheduler.config.rescale_betas_zero_snr
    )
    assert fix_scheduler(plain).scheduler.noise_schedule == ZERO


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("sampler", "prediction_type"),
    [("euler", "v_prediction"), ("dpmpp_2m", "flow_prediction")],
)
def test_rescaled_guidance_is_the_pipeline_s_own_where_it_has_one(parts, sampler, prediction_type):
    schedule = FLOW if prediction_type == "flow_prediction" else ZERO
    scheduler = schedule.scheduler(sampler, prediction_type)
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, scheduler)
    options = {
        **PROMPT,
        **NEGATIVE,
        "num_inference_steps": 5,
        "guidance_scale": 9.0,
        "output_type": "latent",
        "height": 8,
        "width": 8,
    }

    def run(**more):
        return pipe(**options, **more, generator=torch.Generator().manual_seed(0)).images

    plain, theirs = run(), run(guidance_rescale=0.7)
    with rescaled_guidance(pipe, 0.7):
        ours = run()
    assert not torch.allclose(plain, theirs, atol=1e-2)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(run(), plain)


def test_without_guidance_nothing_is_rescaled(parts):
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, parts, ZERO.scheduler("euler", "v_prediction"))
    options = {
        **PROMPT,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "height": 8,
        "width": 8,
    }
    plain = pipe(**options, generator=torch.Generator().manual_seed(0)).images
    with rescaled_guidance(pipe, 0.7):
        assert torch.equal(pipe(**options, generator=torch.Generator().manual_seed(0)).images, plain)


class Pipeline:
    """A U-Net and a scheduler that returns what it is given."""

    class Scheduler:
        def step(self, model_output):
            return model_output

    def __init__(self):
        self.unet, self.scheduler = torch.nn.Identity(), self.Scheduler()

    def stepped(self, both):
        self.unet((both,))
        return self.scheduler.step(both.mean(0, keepdim=True))


BOTH = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_nested_rescaled_guidance_rescales_twice_and_leaves_nothing():
    """The outer's rescale is applied to what the inner's returns: to its deviation it is idempotent at 1."""
    pipe = Pipeline()
    plain = BOTH.mean(0, keepdim=True)
    half = rescale_guidance(plain, BOTH[1:], 0.5)
    with rescaled_guidance(pipe, 0.5):
        with rescaled_guidance(pipe, 0.5):
            assert torch.allclose(pipe.stepped(BOTH), rescale_guidance(half, BOTH[1:], 0.5))
        assert torch.allclose(pipe.stepped(BOTH), half)
    assert torch.equal(pipe.stepped(BOTH), plain) and "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks


def test_a_step_that_somebody_set_is_put_back_also_after_an_error():
    pipe = Pipeline()
    pipe.scheduler.step = own = lambda model_output: -model_output
    with pytest.raises(KeyboardInterrupt), rescaled_guidance(pipe, 1.0):
        expected = -rescale_guidance(BOTH.mean(0, keepdim=True), BOTH[1:], 1.0)
        assert torch.allclose(pipe.stepped(BOTH), expected)
        raise KeyboardInterrupt
    assert pipe.scheduler.step is own and not pipe.unet._forward_hooks


def test_a_constant_prediction_is_left_as_it_is():
    guided = torch.stack([torch.full((4, 8, 8), 0.3), torch.randn(4, 8, 8)])
    got = rescale_guidance(guided, torch.randn(2, 4, 8, 8), 0.7)
    assert torch.equal(got[0], guided[0]) and torch.isfinite(got).all() and not torch.equal(got[1], guided[1])


def test_rescale_guidance_has_the_conditional_spread():
    guided, conditional = torch.randn(3, 4, 8, 8) * 5, torch.randn(3, 4, 8, 8) * 2
    full = rescale_guidance(guided, conditional, 1.0)
    assert torch.allclose(full.flatten(1).std(1), conditional.flatten(1).std(1), rtol=1e-5)
    assert torch.allclose(rescale_guidance(guided, conditional, 0.25), 0.25 * full + 0.75 * guided, atol=1e-5)
    assert rescale_guidance(guided.half(), conditional.half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"rescale must lie in \[0, 1\], got 7"):
        rescale_guidance(guided, conditional, 7)
