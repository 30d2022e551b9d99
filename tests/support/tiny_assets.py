"""What every test against a real trainer needs: real photographs with captions (scikit-image's), and small
text encoders."""

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
