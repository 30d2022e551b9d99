"""heldout_loss.py ASSETS PICTURE TRACE.json: the loss of the model that a training begins with on a picture,
at the timesteps and with the noise that the training gave the U-Net without gradients; float64, by
sd-scripts' own functions. Prints {timestep: loss}. Needs SD_SCRIPTS."""

import json
import sys
from pathlib import Path

import checkouts

HERE = Path(__file__).resolve().parent


def losses(assets, picture, evaluated):
    import library.sdxl_model_util as sdxl_model_util
    import library.sdxl_train_util as sdxl_train_util
    import library.strategy_sdxl as strategy_sdxl
    import torch
    from closed_form import alphas_cumprod
    from PIL import Image
    from torchvision import transforms

    torch.set_grad_enabled(False)
    te1, te2, vae, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint(
        "sdxl", str(assets / "model.safetensors"), "cpu"
    )
    unet, abar, image = unet.double().eval(), alphas_cumprod(), Image.open(picture).convert("RGB")
    # as IMAGE_TRANSFORMS of sd-scripts
    made = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)[None]
    x0 = sdxl_model_util.VAE_SCALE_FACTOR * vae.double().encode(made.double()).latent_dist.mean
    tokens = strategy_sdxl.SdxlTokenizeStrategy(75, str(assets / "tokenizers"))
    text = strategy_sdxl.SdxlTextEncodingStrategy().encode_tokens(
        tokens, [te1.eval(), te2.eval(), te2], tokens.tokenize(picture.with_suffix(".txt").read_text())
    )
    height, width = image.size[::-1]
    size, corner = torch.tensor([[height, width]]), torch.tensor([[0, 0]])
    sizes = sdxl_train_util.get_size_embeddings(size, corner, size, "cpu")
    context, vector = torch.cat(text[:2], 2).double(), torch.cat([text[2], sizes], 1).double()
    found = {}
    for noisy, timesteps in evaluated:
        for x, t in zip(torch.tensor(noisy, dtype=torch.float64), timesteps, strict=True):
            noise = (x - abar[t] ** 0.5 * x0[0]) / (1 - abar[t]) ** 0.5
            assert 0.8 < noise.std() < 1.2  # the latents are right, else it would be another number
            prediction = unet(x[None], torch.tensor([t]), context, vector)
            found[t] = float((prediction - noise).square().mean())
    return found


if __name__ == "__main__":
    sys.path[:0] = [str(checkouts.first()), str(HERE), str(HERE.parents[1] / "support")]
    import tiny

    tiny.apply()
    folder, picture, trace = map(Path, sys.argv[1:])
    print(json.dumps(losses(folder, picture, json.loads(trace.read_text())["evaluated"])))
