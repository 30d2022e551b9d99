"""The picture of the README: what three of the models of leak.py draw.

python benchmarks/leak_pictures.py     two minutes, after leak.py; writes docs/evidence/leak-pictures.png
"""

from __future__ import annotations

from pathlib import Path

import lab

from sdxl_fixes import Objective

SEED, SHOWN = 0, 3  # the first seed, the first pictures of each caption
FINETUNED = 150


def main() -> None:
    args = lab.arguments(__doc__ or "")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    zero = lab.STOCK.zero_terminal_snr()
    finetuned, _, _ = lab.adapt(lab.Job("", SEED), args.work, "v_prediction", Objective(zero, "v_prediction"), FINETUNED, ())
    rows = (
        ("epsilon,\nstock schedule", lab.base(SEED, args.work), "epsilon", lab.STOCK),
        ("v-prediction,\nstock schedule", lab.base(SEED, args.work, "v_prediction"), "v_prediction", lab.STOCK),
        (f"that one, finetuned for\n{FINETUNED} steps with\nzero terminal SNR", finetuned, "v_prediction", zero),
    )
    figure, axes = plt.subplots(len(rows), SHOWN * len(lab.ASKED), figsize=(11, 4.2))
    for (label, unet, prediction_type, schedule), line in zip(rows, axes, strict=True):
        pictures = lab.generate(unet.eval(), schedule.scheduler("dpmpp_2m", prediction_type), SEED)
        got = lab.brightness(pictures)["got"]
        for column, axis in enumerate(line):
            caption, number = divmod(column, SHOWN)
            axis.imshow(pictures[caption, number].clamp(-2, 2).numpy(), cmap="gray", vmin=-2, vmax=2)
            axis.set_xticks([]), axis.set_yticks([])
            if number == 0:
                axis.set_title(f"{lab.ASKED[caption]:+.0f} asked, {got[caption]:+.2f} got", fontsize=9, loc="left")
        line[0].set_ylabel(label, fontsize=8)
    figure.tight_layout()
    output: Path = lab.DOCS / "leak-pictures.png"
    figure.savefig(output, dpi=90)
    Image.open(output).convert("L").quantize(48).save(output, optimize=True)


if __name__ == "__main__":
    main()
