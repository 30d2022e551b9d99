"""python assets.py FOLDER: a tiny random SDXL checkpoint, byte-level CLIP tokenizers, and real photographs with captions.

Needs SD_SCRIPTS and scikit-image, whose wheel ships the photographs.
"""

import json
import os
import sys
from pathlib import Path

PHOTOS = {
    "astronaut.png": "portrait of a smiling astronaut in an orange suit in front of a flag",
    "coffee.png": "a cup of coffee on a wooden table",
    "chelsea.png": "a ginger cat",
    "rocket.jpg": "a rocket on its launch pad, lit at night",
    "motorcycle_left.png": "a motorcycle in a workshop, tools on the wall behind it, " + "very " * 40 + "detailed",
    "hubble_deep_field.jpg": "galaxies on a black sky",
}


def tokenizers(folder):
    """CLIP's own byte alphabet without merges (one token a character): enough for a trainer, and nobody's download."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = {c: i for i, c in enumerate(characters + [c + "</w>" for c in characters])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        out = folder / name
        out.mkdir(parents=True)
        (out / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (out / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        (out / "tokenizer_config.json").write_text(json.dumps(config))
        (out / "special_tokens_map.json").write_text(json.dumps(special))


def photographs(folder):
    import skimage
    from PIL import Image

    images = folder / "images"
    images.mkdir(parents=True)
    for n, (name, caption) in enumerate(PHOTOS.items()):
        photo = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        size = [(128, 128), (160, 96), (96, 160)][n % 3]
        photo.resize(size, Image.Resampling.BICUBIC).save(images / f"{n}.png")
        (images / f"{n}.txt").write_text(caption)
    (folder / "dataset.toml").write_text(
        f"""[general]
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
    sdxl_model_util.save_stable_diffusion_checkpoint(str(file), te1, te2, net, 0, 0, None, vae, torch.tensor(4.6), None, torch.float32)

    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    again = UNet2DConditionModel(**sdxl_model_util.DIFFUSERS_SDXL_UNET_CONFIG)
    again.load_state_dict(sdxl_model_util.convert_sdxl_unet_state_dict_to_diffusers(net.state_dict()))
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(path) for path in sorted(file.parent.glob("tokenizers/*"), reverse=True))
    stock = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(vae, te1, te2, tokenizer, tokenizer_2, again, stock).save_pretrained(file.parent / "diffusers")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sys.path.insert(0, os.environ["SD_SCRIPTS"])
    target.mkdir(parents=True, exist_ok=True)
    tokenizers(target / "tokenizers")
    photographs(target)
    model(target / "model.safetensors")
