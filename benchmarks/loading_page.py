"""Makes docs/loading.md: python benchmarks/loading_page.py > docs/loading.md. What it says comes from
``sdxl-fixes inspect``."""

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from loading import SAMPLINGS, stamped_checkpoint, stamped_folder

from sdxl_fixes.uis.verdicts import CASES, UIS, verdicts

MEANINGS = (
    "SDXL's own: epsilon, nothing changed",
    "v-prediction on SDXL's schedule",
    "v-prediction with zero terminal SNR, as NoobAI's v-pred models",
    "epsilon with zero terminal SNR",
    "epsilon, `--terminal_sigma 300`",
    "any other table, here v with `--terminal_sigma_method tail`",
    "rectified flow, as bigASP v2.5",
)
FOLDERS = ("diffusers", "SD.Next", "InvokeAI")
HEAD = """# How to load a model with another noise schedule

Made by `python benchmarks/loading_page.py` from `sdxl-fixes inspect`. For one model, `sdxl-fixes inspect model.safetensors --markdown`
prints such a page for its card.

A model trained with `--zero_terminal_snr`, `--terminal_sigma` or `--v_parameterization` must be sampled the same way. UIs find that
out from the file, and each reads something else; `sdxl-fixes stamp` writes all of it. Checkpoints saved through the kohya adapter
have all four, folders saved through the diffusers adapter all but the tensors, which nobody reads there:

- `__metadata__["sdxl_fixes.schedule"]`: the whole schedule, as a JSON record. Our node, extension and adapters read it.
- the empty tensors `v_pred` and `ztsnr`: only where they are the truth, because a UI that sees them builds SDXL's own table.
- `modelspec.prediction_type`: `epsilon`, `v`, `v-zsnr`, `x0`, `sd3` (flow); absent for other tables, from which SwarmUI would build a
  wrong one.
- beside the file `model.scheduler_config.json`, in a diffusers folder `scheduler/scheduler_config.json`: what stock diffusers needs.

## Who loads what right

"yes": by itself, nothing to do. "no": see below. "-": does not load such a file. A checkpoint, stamped; then a diffusers folder, stamped.
**Bold**: run on the UI's own code, of the version in the last column (`tests/uis` runs it again where that code is given); plain: read
in it. What was run of each: ComfyUI's loaders and nodes; the extension on Forge's, Forge Neo's and reForge's classes; InvokeAI's model manager and
the scheduler that it makes for 18 of its samplers; SD.Next's `set_overrides` and its sampler "Default"; diffusers' scheduler classes.
SwarmUI is C# and was read: `T2IModelHandler.cs` takes `modelspec.prediction_type`, and `WorkflowGeneratorModelSupport.cs` makes of it a
ModelSamplingDiscrete node (ModelSamplingSD3 for `sd3`) behind the loader; without the word there is no such node, and ComfyUI's row holds.
"""
STEPS = """## What to do where it says no

**ComfyUI** (all cases): `sdxl-fixes comfyui install path/to/ComfyUI`, restart. From then on Load Checkpoint and Load Diffusion
Model follow the file; workflows need no node. A ModelSamplingDiscrete or ModelSamplingSD3 node in the workflow still wins. Save
Checkpoint keeps the record. For a LoRA that changed the schedule: the node "Schedule from file (sdxl-fixes)". Without the node: v
and v + ZTSNR work in Load Checkpoint; flow works with ModelSamplingSD3. ComfyUI keeps loaded models: restart it after a file was
stamped.

**Forge, Forge Neo, reForge, A1111**: `sdxl-fixes webui install path/to/webui`, restart. Forge and Forge Neo: all cases; flow has the
shift of the file, whatever Neo's slider says. reForge and A1111: every epsilon and v table; flow in reForge by its own Advanced Model
Sampling (SD3). Leave "Noise schedule for sampling" at Default. Where a record cannot be followed the console says so in one sentence, and
the UI does as without the extension. Without it: the `v_pred` and `ztsnr` tensors work in Forge, Neo, reForge and the dev branch of A1111;
A1111 up to 1.10 needs `sdxl-fixes stamp --yaml` for v and its setting "Noise schedule for sampling: Zero Terminal SNR" for ZTSNR.

**Which folder**: the one with the UI's code, or that of its portable package (`ComfyUI_windows_portable`; one that holds `webui`). Where
additions are kept apart from the code it is the folder that holds `custom_nodes` (ComfyUI Desktop's, or the one given to
`--base-directory`) or `extensions` (the one given to `--data-dir`). `sdxl-fixes comfyui status path` says what is there.

**SwarmUI**: it runs ComfyUI; install the node there.

**diffusers**: use a stamped folder, or for a single file

```python
pipe = StableDiffusionXLPipeline.from_single_file("model.safetensors")
pipe.scheduler = EulerDiscreteScheduler.from_pretrained("model.scheduler_config.json")
```

(for flow, `UniPCMultistepScheduler`; its file names the class). Zero terminal SNR ends at sigma 4096 there.

**SD.Next**: a stamped diffusers folder, sampler "Default". A single file is read by its name before its tensors: `vpred`, `v-pred` or
`v_pred` there means zero terminal SNR too, `flow` rectified flow. Every other sampler of its menu drops `trained_betas`, and goes by
its own setting for zero terminal SNR (off by default).

**InvokeAI**: a stamped diffusers folder; a single v file works when v-prediction is chosen in the model manager, and nothing in a file
can say it. Zero terminal SNR: Heun, LMS, KDPM 2, DEIS, PNDM, DPM++ 2S, DPM++ SDE and ER-SDE end at 14.6 all the same; the others (Euler,
DPM++ 2M and 3M, UniPC, DDIM, DDPM, LCM, TCD) are right. It refuses a flow folder.

A **LoRA** says nothing to any UI: the checkpoint it is used with decides. Whether a model is distilled for few steps (Turbo, Lightning,
Hyper, LCM, DMD) no file says: steps and guidance are for its page.

To undo: `sdxl-fixes comfyui remove path`, `sdxl-fixes webui remove path`.
"""


def page() -> str:
    """The Markdown."""
    with tempfile.TemporaryDirectory() as name:
        cells, folders = {ui: [] for ui in UIS}, {ui: [] for ui in FOLDERS}
        for i, (case, sampling) in enumerate(SAMPLINGS.items()):
            path = stamped_checkpoint(Path(name) / f"{i}.safetensors", sampling)
            for row in verdicts(path)[2]:
                cells[row.ui].append(cell(row, case in UIS[row.ui].ran))
            for row in verdicts(stamped_folder(Path(name) / str(i), sampling))[2]:
                if row.ui in FOLDERS:
                    folders[row.ui].append(cell(row, case in UIS[row.ui].ran_folder))
    lines = [HEAD, "| | " + " | ".join(SAMPLINGS) + " | code |", "|---|" + "---|" * (len(SAMPLINGS) + 1)]
    lines += [f"| {ui} | " + " | ".join(row) + f" | {UIS[ui].code} |" for ui, row in cells.items()]
    lines += [f"| {ui}, folder | " + " | ".join(row) + f" | {UIS[ui].code} |" for ui, row in folders.items()]
    lines += ["", *(f"- {case}: {meaning}" for case, meaning in zip(CASES, MEANINGS, strict=True)), ""]
    return "\n".join(lines) + "\n" + STEPS


def cell(row, ran: bool) -> str:
    """yes, no or -, bold if run."""
    word = {True: "yes", False: "no", None: "-"}[row.right]
    return f"**{word}**" if ran else word


if __name__ == "__main__":
    print(page(), end="")
