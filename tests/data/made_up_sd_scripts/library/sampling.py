from diffusers import DDIMScheduler

from library.sdxl_lpw_stable_diffusion import SdxlStableDiffusionLongPromptWeightingPipeline


def get_my_scheduler(*, sample_sampler, v_parameterization):
    prediction_type = "v_prediction" if v_parameterization else "epsilon"
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)


def sample_images_common(pipe_class, accelerator, args, epoch, steps, *rest):
    if args.sample_every_n_steps and epoch is None and steps % args.sample_every_n_steps == 0:
        args.previews = [get_my_scheduler(sample_sampler="ddim", v_parameterization=args.v_parameterization)]
        pipeline = SdxlStableDiffusionLongPromptWeightingPipeline()
        pipeline.scheduler = args.previews[0]
        pipeline("prompt")
