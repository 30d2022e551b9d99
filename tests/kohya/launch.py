"""launch.py HOW TRACE.json SCRIPT ARGS...: run a real sd-scripts trainer on the tiny SDXL, as ``HOW`` says.

HOW is unpatched, install (sdxl_fixes.kohya.install(), then the script) or module (what ``python -m sdxl_fixes.kohya`` does).
TRACE.json receives the losses that the script reports, the timesteps given to the U-Net, and the scheduler's tables.
"""

import json
import os
import runpy
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


def trace(record):
    import library.sdxl_original_unet as unet
    import library.train_util as train_util
    import torch

    forward, add = unet.SdxlUNet2DConditionModel.forward, train_util.LossRecorder.add
    noising = train_util.get_noise_noisy_latents_and_timesteps

    def traced_forward(self, x, timesteps=None, *args, **kwargs):
        if torch.is_grad_enabled():
            record["timesteps"].append(timesteps.tolist())
        return forward(self, x, timesteps, *args, **kwargs)

    def traced_add(self, *, epoch, step, loss):
        record["losses"].append(loss)
        return add(self, epoch=epoch, step=step, loss=loss)

    def traced_noising(args, noise_scheduler, latents, *rest, **kwargs):  # upstream's names: the patches check them
        all_snr = noise_scheduler.all_snr
        record["all_snr_900"], record["all_snr_999"] = float(all_snr[900]), float(all_snr[999])
        record["alphas_cumprod_999"] = float(noise_scheduler.alphas_cumprod[999])
        return noising(args, noise_scheduler, latents, *rest, **kwargs)

    import library.sdxl_lpw_stable_diffusion as pipeline

    generate = pipeline.SdxlStableDiffusionLongPromptWeightingPipeline.__call__

    def traced_generate(self, *args, **kwargs):
        images = generate(self, *args, **kwargs)
        kept = {key: self.scheduler.config.get(key) for key in ("timestep_spacing", "prediction_type", "clip_sample")}
        record["preview"] = {**kept, "terminal_sigma": float(self.scheduler.sigmas[0]), "timesteps": self.scheduler.timesteps.tolist()}
        return images

    pipeline.SdxlStableDiffusionLongPromptWeightingPipeline.__call__ = traced_generate
    unet.SdxlUNet2DConditionModel.forward = traced_forward
    train_util.LossRecorder.add = traced_add
    train_util.get_noise_noisy_latents_and_timesteps = traced_noising


if __name__ == "__main__":
    how, out, script, *arguments = sys.argv[1:]
    sys.path[:0] = [os.environ["SD_SCRIPTS"], HERE, str(Path(HERE).parent)]
    import tiny
    import torch

    torch.set_num_threads(1)
    if "START_METHOD" in os.environ:  # what Windows and macOS do
        torch.multiprocessing.set_start_method(os.environ["START_METHOD"])
    tiny.apply()
    record = {"losses": [], "timesteps": []}
    trace(record)
    sys.argv = [str(Path(os.environ["SD_SCRIPTS"]) / script), *arguments]
    try:
        if how == "module":
            sys.argv.insert(0, "sdxl_fixes.kohya")
            runpy.run_module("sdxl_fixes.kohya", run_name="__main__", alter_sys=True)
        else:
            if how == "install":
                import sdxl_fixes.kohya

                sdxl_fixes.kohya.install()
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(out).write_text(json.dumps(record))
