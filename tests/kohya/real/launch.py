"""launch.py HOW TRACE.json SCRIPT ARGS...: run a real sd-scripts trainer on the tiny SDXL, as ``HOW`` says.

HOW is unpatched, install (sdxl_fixes.kohya.install(), then the script) or module (what ``python -m
sdxl_fixes.kohya`` does). TRACE.json receives the losses given to the backward pass, the timesteps and the
contexts' sizes [B, length] given to the U-Net, the prompts that were encoded, and the scheduler's tables (of
rank 0, if there are several processes; the others have TRACE.json.RANK); with TRACE_TENSORS in the
environment also every step's latents, noise and prediction (and with TRACE_TENSORS=base what the U-Net that
the training began with says of them);
with TRACE_EVALUATED what the U-Net is given without gradients, with COUNT_WAITS where a step would wait for
a GPU (tests/support/played_device.py). With TRACE_AVERAGE every process leaves the average of the weights in
TRACE.json.RANK.pt.
All of it is observed where every version of sd-scripts passes: in accelerate, torch, diffusers, and in
classes of sd-scripts that have not moved.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import checkouts

HERE = str(Path(__file__).resolve().parent)


def trace(record, times, played=None):
    import accelerate
    import accelerate.checkpointing
    import diffusers
    import library.sdxl_original_unet as unet
    import library.train_util  # noqa: F401  (before the pipeline, which cannot be imported first)
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    backward, make, schedulers = accelerate.Accelerator.backward, diffusers.DDPMScheduler.__init__, []

    @functools.wraps(make)
    def traced_make(self, *args, **kwargs):
        make(self, *args, **kwargs)
        schedulers.append(self)

    @functools.wraps(backward)
    def traced_backward(self, loss, **kwargs):
        record["losses"].append(loss.detach().item())
        if str(len(record["losses"])) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        times.append(time.perf_counter())
        for scheduler in schedulers:
            if hasattr(scheduler, "all_snr"):  # the one that is trained with
                record["all_snr_900"], record["all_snr_999"] = (
                    float(scheduler.all_snr[900]),
                    float(scheduler.all_snr[999]),
                )
                record["alphas_cumprod_999"] = float(scheduler.alphas_cumprod[999])
        return backward(self, loss, **kwargs)

    def called(module, inputs):
        if isinstance(module, unet.SdxlUNet2DConditionModel) and torch.is_grad_enabled():
            _, timesteps, context, *_ = inputs
            record["timesteps"].append(timesteps.tolist())
            record["contexts"].append(list(context.shape[:2]))
        elif isinstance(module, unet.SdxlUNet2DConditionModel) and "TRACE_EVALUATED" in os.environ:
            noisy, timesteps, *_ = inputs
            record.setdefault("evaluated", []).append([noisy.tolist(), timesteps.tolist()])

    accelerate.Accelerator.backward, diffusers.DDPMScheduler.__init__ = traced_backward, traced_make
    if "KILL_IN_STATE" in os.environ:
        kill_in_state(accelerate.checkpointing, os.environ["KILL_IN_STATE"])
    register_module_forward_pre_hook(called)
    if os.environ.get("TRACE_TENSORS"):
        trace_tensors(record.setdefault("tensors", []), unet.SdxlUNet2DConditionModel)

    import library.sdxl_lpw_stable_diffusion as pipeline
    import library.strategy_sdxl as strategy_sdxl

    encode = strategy_sdxl.SdxlTextEncodingStrategy.encode_tokens

    @functools.wraps(encode)
    def traced_encode(self, tokenize_strategy, models, tokens):
        if played is None:  # or the tokens would be read from the device
            texts = tokenize_strategy.tokenizer1.batch_decode(tokens[0].flatten(1), skip_special_tokens=True)
            record["prompts"].append(["".join(text.split()) for text in texts])
        return encode(self, tokenize_strategy, models, tokens)

    strategy_sdxl.SdxlTextEncodingStrategy.encode_tokens = traced_encode

    generate = pipeline.SdxlStableDiffusionLongPromptWeightingPipeline.__call__

    @functools.wraps(generate)  # the patches check the parameters
    def traced_generate(self, *args, **kwargs):
        images = generate(self, *args, **kwargs)
        kept = {
            key: self.scheduler.config.get(key)
            for key in ("timestep_spacing", "prediction_type", "clip_sample")
        }
        record["preview"] = {
            **kept,
            "terminal_sigma": float(getattr(self.scheduler, "sigmas", [0])[0]),
            "timesteps": self.scheduler.timesteps.tolist(),
        }
        return images

    pipeline.SdxlStableDiffusionLongPromptWeightingPipeline.__call__ = traced_generate


def kill_in_state(checkpointing, name):
    """SIGKILL while the optimizer's file of the state ``name`` is being written."""
    save = checkpointing.save

    def traced_save(obj, file, *args, **kwargs):
        if Path(file).parent.name == name and Path(file).name == "optimizer.bin":
            Path(file).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(obj, file, *args, **kwargs)

    checkpointing.save = traced_save


def trace_tensors(steps, unet):
    """[latents, noise, prediction] of every call of ``unet`` that is trained. The noise is the first that is
    drawn like the latents; an input perturbation comes after it."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    draw, drawn = torch.randn_like, []

    @functools.wraps(draw)
    def traced_draw(like, *args, **kwargs):
        made = draw(like, *args, **kwargs)
        drawn.append((like, made))
        return made

    def predicted(module, inputs, output):
        # a ControlNet, of the same class, returns several
        if isinstance(module, unet) and isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            steps.append([x.detach().float().tolist() for x in (*drawn[0], output)])
            if os.environ["TRACE_TENSORS"] == "base":
                import frozen_base

                _, timesteps, *given = inputs
                steps[-1].append(frozen_base.epsilon(module, *drawn[0], timesteps, *given).tolist())
            drawn.clear()

    torch.randn_like = traced_draw
    register_module_forward_hook(predicted)


if __name__ == "__main__":
    how, out, script, *arguments = sys.argv[1:]
    checkout = checkouts.first()
    sys.path[:0] = [str(checkout), HERE, str(Path(HERE).parents[1] / "support")]
    import tiny
    import torch

    torch.set_num_threads(1)
    if "START_METHOD" in os.environ:  # what Windows and macOS do
        torch.multiprocessing.set_start_method(os.environ["START_METHOD"])
    tiny.apply()
    times, counting, played = [], contextlib.ExitStack(), None
    record = {"losses": [], "timesteps": [], "contexts": [], "prompts": []}
    if "COUNT_WAITS" in os.environ:
        import played_device

        played = counting.enter_context(played_device.playing(checkout))
    trace(record, times, played)
    sys.argv = [str(checkout / script), *arguments]
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
        counting.close()
        if played is not None:
            record["waits"] = played.per_cycle()
        rank = os.environ.get("RANK", "0")
        Path(out if rank == "0" else f"{out}.{rank}").write_text(json.dumps(record))
        if "TRACE_AVERAGE" in os.environ:
            from sdxl_fixes.kohya.run import SESSION

            torch.save(SESSION.run.ema._model.shadow_params, f"{out}.{os.environ.get('RANK', '0')}.pt")
        if "STEP_TIMES" in os.environ:
            Path(os.environ["STEP_TIMES"]).write_text(json.dumps(times))
