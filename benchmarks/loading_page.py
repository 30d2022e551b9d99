"""Makes docs/loading.md: python benchmarks/loading_page.py > docs/loading.md. What it says comes from
``sdxl-fixes inspect``."""

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from models import model

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.verdicts import UIS, verdicts

SDXL = NoiseSchedule.sdxl()
CASES = {
    "eps 14.6": (Sampling(SDXL, "epsilon"), "SDXL's own: epsilon, nothing changed"),
    "v": (Sampling(SDXL, "v_prediction"), "v-prediction on SDXL's schedule"),
    "v + ZTSNR": (
        Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
        "v-prediction with zero terminal SNR, as NoobAI's v-pred models",
    ),
    "eps + ZTSNR": (Sampling(SDXL.zero_terminal_snr(), "epsilon"), "epsilon with zero terminal SNR"),
    "eps 300": (Sampling(SDXL.with_terminal_sigma(300), "epsilon"), "epsilon, `--terminal_sigma 300`"),
    "any betas": (
        Sampling(SDXL.with_terminal_sigma(300, "tail"), "v_prediction"),
        "any other table, here v with `--terminal_sigma_method tail`",
    ),
    "flow": (Sampling(NoiseSchedule.flow(), "flow_prediction"), "rectified flow, as bigASP v2.5"),
}
HEAD = """# How to load a model with another noise schedule

Made by `python benchmarks/loading_page.py` from `sdxl-fixes inspect`. For one model, `sdxl-fixes inspect model.safetensors --markdown`
prints such a page for its card.

A model trained with `--zero_terminal_snr`, `--terminal_sigma` or `--v_parameterization` must be sampled the same way. UIs find that
out from the file, and each reads something else; `sdxl-fixes stamp` writes all of it. Checkpoints saved through the kohya adapter
have the first three, folders saved through the diffusers adapter all but the tensors, which nobody reads there:

- `__metadata__["sdxl_fixes.schedule"]`: the whole schedule, as a JSON record. Our node, extension and adapters read it.
- the empty tensors `v_pred` and `ztsnr`: only where they are the truth, because a UI that sees them builds SDXL's own table.
- `modelspec.prediction_type`: `epsilon`, `v`, `v-zsnr`, `sd3` (flow); absent for other tables, from which SwarmUI would build a wrong
  one.
- beside the file `model.scheduler_config.json`, in a diffusers folder `scheduler/scheduler_config.json`: what stock diffusers needs.

## Who loads what right

ComfyUI's rows are tested against ComfyUI 0.3.64 and 0.33.0 (August 2026), and the extension on Forge's (June 2025), Forge Neo's (2.26, August
2026) and reForge's (March 2026) own classes; the rest was read in the UIs' source.

"yes": by itself, nothing to do. "no": see below. "-": does not load such a file. A checkpoint, stamped; then a diffusers folder, stamped.
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

**SD.Next**: a stamped diffusers folder, sampler "Default". **InvokeAI**: a stamped diffusers folder; a single v file works when
v-prediction is chosen in the model manager.

To undo: `sdxl-fixes comfyui remove path`, `sdxl-fixes webui remove path`.
"""


def page() -> str:
    """The Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder, cells = Path(name), {ui: [] for ui in UIS}
        folders = {ui: [] for ui in ("diffusers", "SD.Next", "InvokeAI")}
        for i, (sampling, _) in enumerate(CASES.values()):
            path = model(folder / f"{i}.safetensors")
            stamp_file(path, sampling)
            for row in verdicts(path)[2]:
                cells[row.ui].append({True: "yes", False: "no", None: "-"}[row.right])
            for ui, row in stamped_folder(folder / str(i), sampling).items():
                folders[ui].append({True: "yes", False: "no", None: "-"}[row.right])
    lines = [HEAD, "| | " + " | ".join(CASES) + " |", "|---|" + "---|" * len(CASES)]
    lines += [f"| {ui} | " + " | ".join(row) + " |" for ui, row in cells.items()]
    lines += [f"| {ui}, folder | " + " | ".join(row) + " |" for ui, row in folders.items()]
    lines += ["", *(f"- {case}: {meaning}" for case, (_, meaning) in CASES.items()), ""]
    return "\n".join(lines) + "\n" + STEPS


def stamped_folder(folder: Path, sampling: Sampling):
    """The verdicts of the UIs that load a diffusers folder."""
    from sdxl_fixes.model_files.stamp import write_scheduler_config

    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    stamp_file(model(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet"), sampling)
    (folder / "unet" / "config.json").write_text("{}")
    write_scheduler_config(folder / "scheduler" / "scheduler_config.json", sampling)
    return {row.ui: row for row in verdicts(folder)[2] if row.ui in ("diffusers", "SD.Next", "InvokeAI")}


if __name__ == "__main__":
    print(page(), end="")
