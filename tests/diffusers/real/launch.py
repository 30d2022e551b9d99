"""launch.py HOW TRACE.json SCRIPT ARGS...: run a real example script of diffusers, as ``HOW`` says.

HOW is unpatched, install (sdxl_fixes.diffusers.install(), then the script) or module (what ``python -m
sdxl_fixes.diffusers`` does). TRACE.json receives, of this process (rank 0 if there are several): the losses
that the script backpropagates, what the U-Net is given, and the schedulers of the pipelines that make images.
With TRACE_TENSORS also, of every step: the latents, their noise, what the U-Net is given and what it
predicts (and with TRACE_TENSORS=base what the U-Net that the training began with says); and what a
perceptual loss beside the script compares and gives.
"""

import functools
import json
import os
import runpy
import sys
from pathlib import Path

TENSORS = ("latents", "noise", "noisy", "predictions")


def trace(record):
    import accelerate
    import diffusers
    import torch
    from diffusers import UNet2DConditionModel

    backward, forward = accelerate.Accelerator.backward, UNet2DConditionModel.forward
    mse_loss = torch.nn.functional.mse_loss

    @functools.wraps(mse_loss)
    def traced_mse_loss(input, target, *args, **kwargs):
        record["errors"].append((input - target).detach().square().flatten(1).mean(1).tolist())
        return mse_loss(input, target, *args, **kwargs)

    @functools.wraps(backward)
    def traced_backward(self, loss, **kwargs):
        record["losses"].append(float(loss.detach()))
        return backward(self, loss, **kwargs)

    @functools.wraps(forward)
    def traced_forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
        if torch.is_grad_enabled():
            conditions = kwargs["added_cond_kwargs"]
            record["timesteps"].append(timestep.tolist())
            record["time_ids"].append(conditions["time_ids"].tolist())
            record["tokens"].append(encoder_hidden_states.shape[1])
            record["inputs"].append(
                [
                    float(x.detach().float().std())
                    for x in (sample, encoder_hidden_states, conditions["text_embeds"])
                ]
            )
            record["latents"].append(sample.detach().float().flatten(1)[:, :4].tolist())
        return forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs)

    for kind in ("", "ControlNet", "InstructPix2Pix"):
        trace_images(getattr(diffusers, f"StableDiffusionXL{kind}Pipeline"), record)
    torch.nn.functional.mse_loss = traced_mse_loss
    accelerate.Accelerator.backward = traced_backward
    UNet2DConditionModel.forward = traced_forward


def trace_tensors(tensors, folder):
    """Of every prediction that is trained: latents and noise, which is the last that is drawn like others,
    noisy latents, prediction. ``folder`` is the script's."""
    import torch
    from diffusers import UNet2DConditionModel

    if os.environ["TRACE_TENSORS"] == "base":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
        import accelerate
        import frozen_base

        load = accelerate.Accelerator.load_state

        @functools.wraps(load)
        def traced_load(self, *args, **kwargs):
            for model in self._models:
                if isinstance(model, UNet2DConditionModel):
                    frozen_base.remember(model)  # before a saved state is in it
            return load(self, *args, **kwargs)

        accelerate.Accelerator.load_state = traced_load
    drawn, draw, forward = [], torch.randn_like, UNet2DConditionModel.forward

    @functools.wraps(draw)
    def traced_draw(like, *args, **kwargs):
        made = draw(like, *args, **kwargs)
        drawn[:] = like, made
        return made

    @functools.wraps(forward)
    def traced_forward(self, sample, timestep, *args, **kwargs):
        made = forward(self, sample, timestep, *args, **kwargs)
        if torch.is_grad_enabled():
            # InstructPix2Pix gives others behind the noisy ones
            for name, value in zip(TENSORS, (*drawn, sample[:, :4], made[0]), strict=True):
                tensors[name].append(value.detach().float().tolist())
            if os.environ["TRACE_TENSORS"] == "base":
                tensors.setdefault("base", []).append(
                    frozen_base.epsilon(self, *drawn, timestep, *args, **kwargs).tolist()
                )
        return made

    if (folder / "lpl_loss.py").is_file():
        sys.path.insert(0, str(folder))
        from lpl_loss import LatentPerceptualLoss

        get_loss = LatentPerceptualLoss.get_loss

        def traced_loss(self, mine, clean):
            made = get_loss(self, mine, clean)
            for name, value in (("estimates", mine), ("estimated", clean), ("perceptual", made)):
                tensors.setdefault(name, []).append(value.detach().tolist())
            return made

        LatentPerceptualLoss.get_loss = traced_loss
    torch.randn_like = traced_draw
    UNet2DConditionModel.forward = traced_forward


def trace_images(pipeline, record):
    generate = pipeline.__call__

    @functools.wraps(generate)
    def traced(self, *args, **kwargs):
        config, left = self.scheduler.config, self.scheduler.alphas_cumprod[-1].double()
        kept = {key: config.get(key) for key in ("timestep_spacing", "prediction_type")}
        sigma = float(((1 - left) / left).sqrt())
        record["previews"].append({**kept, "class": type(self.scheduler).__name__, "terminal_sigma": sigma})
        return generate(self, *args, **kwargs)

    pipeline.__call__ = traced


if __name__ == "__main__":
    how, out, script, *arguments = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    record = {
        key: []
        for key in ("losses", "timesteps", "time_ids", "tokens", "inputs", "latents", "previews", "errors")
    }
    trace(record)
    if os.environ.get("TRACE_TENSORS"):
        record["tensors"] = {name: [] for name in TENSORS}
        trace_tensors(record["tensors"], Path(script).parent)
    sys.argv = [script, *arguments]
    try:
        if how == "module":
            sys.argv.insert(0, "sdxl_fixes.diffusers")
            runpy.run_module("sdxl_fixes.diffusers", run_name="__main__", alter_sys=True)
        else:
            if how == "install":
                import sdxl_fixes.diffusers

                sdxl_fixes.diffusers.install()
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(out).write_text(json.dumps(record))
