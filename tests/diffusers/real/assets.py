"""python assets.py FOLDER: tiny random SDXL folders, and photographs with captions as the example scripts
want them.

Needs scikit-image, whose wheel ships the photographs. ``base`` predicts epsilon on SDXL's own schedule; the
others differ in the scheduler's config alone.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import alphabet
import tiny_assets

SCHEDULER = {  # as SDXL base ships it
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
ZTSNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
VARIANTS = {
    "base-v": {"prediction_type": "v_prediction"},
    "base-ztsnr": ZTSNR,
    "base-v-ztsnr": {**ZTSNR, "prediction_type": "v_prediction"},
    # every other draw is at SNR 0
    "base-v-ztsnr-2": {**ZTSNR, "prediction_type": "v_prediction", "num_train_timesteps": 2},
    "base-ztsnr-2": {**ZTSNR, "num_train_timesteps": 2},
    "base-edm": None,  # playground-v2.5's kind
}


def pipeline(folder):
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        T2IAdapter,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    te1 = CLIPTextModel(tiny_assets.text_config(32, 3))
    te2 = CLIPTextModelWithProjection(tiny_assets.text_config(48, 3))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 48,
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        layers_per_block=1,
    )
    adapter = T2IAdapter(
        channels=(16, 32, 32, 32), num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    adapter.save_pretrained(folder.parent / "adapter")
    pads = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    for name, pad in pads.items():
        alphabet.write(folder.parent / "tokenizers" / name, pad)
    loaded = [CLIPTokenizer.from_pretrained(folder.parent / "tokenizers" / name) for name in pads]
    StableDiffusionXLPipeline(
        vae, te1, te2, *loaded, unet, EulerDiscreteScheduler.from_config(SCHEDULER)
    ).save_pretrained(folder)
    for name in pads:  # as written above, not as transformers writes them
        shutil.rmtree(folder / name)
        shutil.copytree(folder.parent / "tokenizers" / name, folder / name)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    for name, changes in VARIANTS.items():
        other = folder.parent / name
        shutil.copytree(folder, other)
        config = (
            {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
            if changes is None
            else {**SCHEDULER, **changes}
        )
        (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
        index = json.loads((other / "model_index.json").read_text())
        index["scheduler"][1] = config["_class_name"]
        (other / "model_index.json").write_text(json.dumps(index))
    # with every id of the vocabulary, for who adds tokens
    shutil.copytree(folder, folder.parent / "base-whole")
    for file in (folder.parent / "base-whole").glob("tokenizer*/vocab.json"):
        vocabulary = json.loads(file.read_text())
        unused = sorted(set(range(49408)) - set(vocabulary.values()))
        file.write_text(json.dumps({**vocabulary, **{f"<unused {n}>": n for n in unused}}))


def images(folder):
    """``images`` has columns image and text, ``captions`` image and caption, ``control`` also
    conditioning_image and ``edits`` original_image; ``plain`` is files."""
    captions = tiny_assets.photographs(folder / "plain")
    for name, column in (("images", "text"), ("captions", "caption"), ("control", "text"), ("edits", "text")):
        shutil.copytree(folder / "plain", folder / name)
        rows = [{"file_name": f"{n}.png", column: caption} for n, caption in enumerate(captions)]
        if other := {"control": "conditioning_image", "edits": "original_image"}.get(name):
            rows = [
                {"file_name": r["file_name"], f"{other}_file_name": r["file_name"], "text": r["text"]}
                for r in rows
            ]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    pipeline(target / "base")
    images(target)
