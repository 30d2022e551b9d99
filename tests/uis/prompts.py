"""How ComfyUI and Forge cut prompts: their own code, run on token ids or text. Needs COMFYUI and FORGE,
checkouts of each.

python tests/uis/prompts.py FILE      records cases as data for the tests that have no checkout
"""

import ast
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

WORDS = (
    "1girl solo long_hair cat very-detailed masterpiece caf\u00e9 \u732b don't 2023 "
    "supercalifragilistic red_eyes blue BLUE"
).split()


def comfyui():
    """text -> (CLIP-L rows, CLIP-G rows) of 77 ids, and the folder of the tokenizer that both use."""
    root = Path(os.environ["COMFYUI"])
    sys.path.insert(0, str(root))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.sdxl_clip import SDXLTokenizer

    tokenizer = SDXLTokenizer()

    def cut(text):
        rows = tokenizer.tokenize_with_weights(text, disable_weights=True)
        return tuple([[token for token, _ in row] for row in rows[name]] for name in ("l", "g"))

    return cut, root / "comfy" / "sd1_tokenizer"


def forge(tokenizer):
    """text -> rows of 77 ids (CLIP-L), by tokenize_line of Forge's text engine; its file imports the whole
    web UI, so only it is taken."""
    source = (Path(os.environ["FORGE"]) / "backend" / "text_processing" / "classic_engine.py").read_text(
        encoding="utf-8"
    )
    engine = next(
        x
        for x in ast.parse(source).body
        if isinstance(x, ast.ClassDef) and x.name == "ClassicTextProcessingEngine"
    )
    methods = [
        x for x in engine.body if isinstance(x, ast.FunctionDef) and x.name in ("tokenize_line", "tokenize")
    ]
    chunk = next(x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == "PromptChunk")
    scope = {"parsing": types.SimpleNamespace(parse_prompt_attention=lambda line, name: [[line, 1.0]])}
    exec(compile(ast.Module([chunk, *methods], []), "classic_engine.py", "exec"), scope)
    self = types.SimpleNamespace(
        emphasis=types.SimpleNamespace(name="None"),
        embeddings=types.SimpleNamespace(find_embedding_at_position=lambda tokens, position: (None, None)),
        tokenizer=tokenizer,
        chunk_length=75,
        id_start=49406,
        id_end=49407,
        comma_token=tokenizer.get_vocab()[",</w>"],
    )
    self.tokenize = types.MethodType(scope["tokenize"], self)
    return lambda text: [chunk.tokens for chunk in scope["tokenize_line"](self, text)[0]]


def texts(count, seed=0, commas=0.3):
    rng = random.Random(seed)
    lengths = (0, 1, 5, 40, 60, 75, 100, 300)
    return [
        " ".join(rng.choice(WORDS) + "," * (rng.random() < commas) for _ in range(rng.choice(lengths)))
        for _ in range(count)
    ]


def version(name):
    process = subprocess.run(
        ["git", "-C", os.environ[name], "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return process.stdout.strip() or "unknown"


if __name__ == "__main__":
    from transformers import CLIPTokenizer

    target = Path(sys.argv[1])
    comfy_cut, folder = comfyui()
    clip = CLIPTokenizer.from_pretrained(folder)
    forge_cut = forge(clip)
    cases = []
    for text in [t for k, share in enumerate((0.02, 0.1, 0.3, 0.5)) for t in texts(4, k, share)]:
        ids = clip(text, add_special_tokens=False, truncation=False)["input_ids"]
        rows, rows_g = comfy_cut(text)
        cases.append({"ids": ids, "comfyui": [len(rows), rows[-1], rows_g[-1]], "forge": forge_cut(text)})
    out = {
        "ComfyUI": version("COMFYUI"),
        "Forge": version("FORGE"),
        "comma": clip.get_vocab()[",</w>"],
        "cases": cases,
    }
    target.write_text(json.dumps(out) + "\n")
