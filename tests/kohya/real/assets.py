"""python assets.py FOLDER: a tiny random SDXL checkpoint, byte-level CLIP tokenizers, real photographs with
captions, data sets of them, preview prompts, and what control nets and LECO read.

Needs SD_SCRIPTS and scikit-image, whose wheel ships the photographs.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import alphabet
import checkouts
import tiny_assets


def tokenizers(folder):
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        alphabet.write(folder / name)
        file = folder / name / "vocab.json"  # in full size: textual inversion appends to it
        vocabulary = json.loads(file.read_text(encoding="utf-8"))
        unused = sorted({*range(49408)} - {*vocabulary.values()})
        file.write_text(json.dumps(vocabulary | {f"<unused{n}>": n for n in unused}), encoding="utf-8")


def photographs(folder):
    images = folder / "images"
    for n, caption in enumerate(tiny_assets.photographs(images)):
        (images / f"{n}.txt").write_text(caption)
    dataset = f"""[general]
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
resolution = 128
batch_size = 2
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = {json.dumps(str(images))}
num_repeats = 2
"""
    (folder / "dataset.toml").write_text(dataset)
    edges = folder / "edges"
    edges.mkdir()
    for photo in images.glob("*.png"):
        Image.open(photo).convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB").save(edges / photo.name)
    (folder / "control.toml").write_text(f"{dataset}conditioning_data_dir = {json.dumps(str(edges))}\n")


def prompts(folder):
    line = "a ginger cat --w 128 --h 128 --s 3 --l 5 --d 1"
    (folder / "prompts.txt").write_text(f"{line}\n")
    (folder / "control_prompts.txt").write_text(f"{line} --cn {folder / 'edges' / '2.png'}\n")
    (folder / "leco.toml").write_text(
        '[[prompts]]\ntarget = "a ginger cat"\npositive = "cat"\nunconditional = ""\n'
        'neutral = ""\naction = "erase"\nresolution = 128\n'
    )


def model(file):
    import tiny
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tiny.apply()
    import library.model_util as model_util
    import library.sdxl_model_util as sdxl_model_util
    import library.sdxl_original_unet as unet

    torch.manual_seed(0)
    te1, te2 = CLIPTextModel(tiny.text_config("te1")), CLIPTextModelWithProjection(tiny.text_config("te2"))
    vae, net = AutoencoderKL(**model_util.create_vae_diffusers_config()), unet.SdxlUNet2DConditionModel()
    sdxl_model_util.save_stable_diffusion_checkpoint(
        str(file), te1, te2, net, 0, 0, None, vae, torch.tensor(4.6), None, torch.float32
    )

    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    again = UNet2DConditionModel(**sdxl_model_util.DIFFUSERS_SDXL_UNET_CONFIG)
    again.load_state_dict(sdxl_model_util.convert_sdxl_unet_state_dict_to_diffusers(net.state_dict()))
    tokenizer, tokenizer_2 = (
        CLIPTokenizer.from_pretrained(path) for path in sorted(file.parent.glob("tokenizers/*"), reverse=True)
    )
    stock = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    StableDiffusionXLPipeline(vae, te1, te2, tokenizer, tokenizer_2, again, stock).save_pretrained(
        file.parent / "diffusers"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkouts.first()))
    target.mkdir(parents=True, exist_ok=True)
    tokenizers(target / "tokenizers")
    photographs(target)
    prompts(target)
    model(target / "model.safetensors")
