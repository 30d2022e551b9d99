"""Small stand-ins for model files: the names and shapes by which kinds are told apart, sparse, so that they
take no space."""

import json

UNET = {"input_blocks.0.0.weight": [320, 4, 3, 3], "label_emb.0.0.weight": [1280, 2816], "out.2.bias": [4]}
PREFIXED = {f"model.diffusion_model.{name}": shape for name, shape in UNET.items()}
KINDS = {
    "checkpoint": {
        **PREFIXED,
        "conditioner.embedders.0.transformer.x": [2],
        "first_stage_model.decoder.x": [3],
    },
    "unet": PREFIXED,
    "bare_unet": UNET,
    "diffusers_unet": {
        "conv_in.weight": [320, 4, 3, 3],
        "time_embedding.linear_1.weight": [1280, 320],
        "add_embedding.linear_1.weight": [1280, 2816],
    },
    "lora": {
        "lora_unet_down_blocks_1.lora_down.weight": [4, 320],
        "lora_unet_down_blocks_1.lora_up.weight": [320, 4],
    },
}


def header(shapes, metadata=None, dtype="F16", size=2):
    """The JSON of a header, as bytes, and the size of the data."""
    content, end = ({} if metadata is None else {"__metadata__": metadata}), 0
    for name, shape in shapes.items():
        count = size
        for length in shape:
            count *= length
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    return json.dumps(content).encode(), end


def write(path, shapes, metadata=None, data=b"", **dtype):
    """A safetensors file with ``data`` at the start of its (else zero) tensors."""
    text, end = header(shapes, metadata, **dtype)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:end])
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


def model(path, kind="checkpoint", **options):
    """A stand-in of one kind."""
    return write(path, KINDS[kind], **options)
