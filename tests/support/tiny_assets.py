"""What every test against a real trainer needs: a byte-level CLIP tokenizer, and real photographs with
captions (scikit-image's)."""

import json
from pathlib import Path

PHOTOS = {
    "astronaut.png": "portrait of a smiling astronaut in an orange suit in front of a flag",
    "coffee.png": "a cup of coffee on a wooden table",
    "chelsea.png": "a ginger cat",
    "rocket.jpg": "a rocket on its launch pad, lit at night",
    "motorcycle_left.png": "a motorcycle in a workshop, tools on the wall behind it, "
    + "very " * 40
    + "detailed",
    "hubble_deep_field.jpg": "galaxies on a black sky",
}
SIZES = [(128, 128), (160, 96), (96, 160)]


def tokenizer(folder, pad_token="<|endoftext|>"):
    """CLIP's own byte alphabet without merges (one token a character): enough for a trainer, and nobody's
    download."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = {c: i for i, c in enumerate(characters + [c + "</w>" for c in characters])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def photographs(folder):
    """The photographs as 0.png, 1.png, ... of three shapes; returns the captions in that order."""
    import skimage
    from PIL import Image

    folder.mkdir(parents=True)
    for n, name in enumerate(PHOTOS):
        photo = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        photo.resize(SIZES[n % 3], Image.Resampling.BICUBIC).save(folder / f"{n}.png")
    return list(PHOTOS.values())


def text_config(width, layers, scale=1):
    """A small CLIP text encoder with the (legacy) token ids of SDXL's."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=64 * scale,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
