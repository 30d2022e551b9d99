"""A CLIP tokenizer that needs no download: CLIP's own byte alphabet without merges, one token a character."""

import json


def write(folder, pad_token="<|endoftext|>"):
    """Put its files into ``folder``, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
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
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder
