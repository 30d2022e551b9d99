"""python tests/kohya/real/pairs.py [CASE ...]: --speed with each other fix and flag by itself, in the real
trainers of the checkout that SD_SCRIPTS names.

Each case is trained without --speed and with its parts. With syncs, and with blocks that torch traces and
runs as they are, all must be the same to the bit: losses, timesteps, what the trackers are told and in which
order, the plugin's lines, previews, and the tensors of every file and state; with fused all but rounding. The
progress bar is not looked at, so a wrong average is seen in the network trainer alone, which logs it. Prints
a sentence for everything that is not so, and ends with status 1 if there is any. An argument takes the cases
whose names hold it. Each run is a fork of this process, which has imported the trainer's libraries.
"""

import argparse
import contextlib
import functools
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import checkouts
import runs
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
STEPS, RATE = 4, "1e-3"
FULL, NETWORK = "sdxl_train.py", "sdxl_train_network.py"
V, ZERO = ("--v_parameterization",), ("--zero_terminal_snr", "--v_parameterization")
STATES = ("--save_every_n_steps", "2", "--save_state")
PROMPTS = ("--sample_prompts", "{assets}/prompts.txt")
STABLE = ("--stable_loss_steps", "1", "--stable_loss_images", "2")
UNET = ("--network_train_unet_only",)
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
RELEASED = ("--optimizer_type", "sdxl_fixes.kohya.optimizers.released", "--max_grad_norm", "0")
BOTH = {
    "nothing": (),
    "huber": ("--loss_type", "huber", "--huber_schedule", "exponential"),
    "smooth_l1, snr": ("--loss_type", "smooth_l1", "--huber_schedule", "snr"),
    "huber like l2": ("--loss_type", "huber", "--huber_l2_gradient", "batch"),
    "upstream's huber": ("--loss_type", "huber", "--huber_schedule", "snr", "--fixes", "speed"),
    "terminal sigma": ("--terminal_sigma", "300", *V),
    "min-SNR, floor": (*ZERO, "--min_snr_gamma", "5", "--min_snr_floor"),
    "upstream's min-SNR": ("--min_snr_gamma", "5", "--fixes", "speed"),
    "debiased": ("--debiased_estimation_loss",),
    "scale v": (*V, "--scale_v_pred_loss_like_noise_pred"),
    "v like": ("--v_pred_like_loss", "0.1"),
    "perturbed": ("--ip_noise_gamma", "0.1"),
    "perturbed by sample": ("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
    "noise offset": ("--noise_offset", "0.1", "--noise_offset_random_strength"),
    "multires noise": ("--multires_noise_iterations", "4"),
    "stratified": ("--stratified_timesteps",),
    "density": ("--timestep_density", "logit_normal", "--timestep_density_weighted"),
    "terminal share": (*ZERO, "--terminal_timestep_share", "0.3"),
    "timestep range": ("--min_timestep", "100", "--max_timestep", "900"),
    "chunk buckets": ("--max_token_length", "225", "--chunk_buckets"),
    "average": ("--ema_decay", "0.5", "--ema_evaluated", *STABLE, *PROMPTS, "--sample_every_n_steps", "2"),
    "stable loss": (*STABLE, *UNET),
    "held out": ("--heldout_steps", "1", "--heldout_dir", "{assets}/held", *UNET),
    "base matched": ("--match_base", "--pretrained_model_name_or_path", "{assets}/zero.safetensors"),
    "base kept": (*ZERO, "--keep_base", "0.5", *UNET),
    "flow": ("--prediction_type", "flow_prediction"),
    "accumulation": ("--gradient_accumulation_steps", "4"),  # of 6 batches: the second step is of 2
    "checkpointing": ("--gradient_checkpointing",),
    "cached": (*CACHED, *UNET),
    "weighted captions": ("--weighted_captions",),
    "masked": ("--dataset_config", "{assets}/control.toml", "--masked_loss"),
    "previews": (*PROMPTS, "--sample_every_n_steps", "1", "--sample_at_first", *ZERO),
    "states": (*STATES, "--save_every_n_epochs", "1"),
    "exact resume": ("--exact_resume", *STATES),
    "autocast": ("--mixed_precision", "bf16", "--sdpa"),
    "bfloat16": ("--mixed_precision", "bf16", "--full_bf16"),
    "workers": ("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"),
}
# fmt: off
# what one function does in both scripts: in the one is enough
LOSSES = ("huber", "smooth_l1, snr", "upstream's min-SNR", "debiased", "scale v", "v like", "terminal sigma",
          "perturbed", "noise offset", "multires noise", "density", "terminal share", "timestep range")
# cases that a part is run with, by default; syncs is with all others
PARTS = {
    "syncs": (),
    "syncs,compile": ("nothing", "average", "stable loss", "held out", "base kept", "chunk buckets",
                      "previews", "validation", "checkpointing", "accumulation", "text encoders", "dropout",
                      "loha", "bfloat16", "autocast"),
    # not bfloat16, whose weights a rounding moves by more than a step
    "syncs,fused,compile": ("nothing", "average", "states", "accumulation", "text encoders",
                            "fused groups", "killed"),
    "compile": (), "fused": (),
}
# fmt: on
CASES = {
    FULL: {
        **{name: tuple(word for word in flags if word not in UNET) for name, flags in BOTH.items()},
        "text encoders": ("--train_text_encoder",),
        "released": (*RELEASED, "--mixed_precision", "bf16"),
        "fused groups": ("--fused_optimizer_groups", "4"),
        "fused backward": (
            "--optimizer_type",
            "Adafactor",
            "--fused_backward_pass",
            "--optimizer_args",
            "relative_step=False",
            "scale_parameter=False",
            "warmup_init=False",
        ),
        "split": ("--heldout_steps", "2", "--heldout_split", "0.35"),
    },
    NETWORK: {
        **{name: flags for name, flags in BOTH.items() if name not in LOSSES},
        "validation": (
            "--validation_split",
            "0.35",
            "--validate_every_n_steps",
            "1",
            "--max_validation_steps",
            "1",
        ),
        "dropout": ("--network_dropout", "0.3"),
        "scaled norms": ("--scale_weight_norms", "1"),
        "loha": ("--network_module", "networks.loha"),
        "convolutions": ("--network_args", "conv_dim=2", "conv_alpha=2"),
        "text encoders alone": ("--network_train_text_encoder_only",),
    },
}  # fmt: skip
KILLED = (*STATES, "--exact_resume")


def train(folder, script, flags, steps=STEPS, **environment):
    """What a run in ``folder`` computed, said and saved, and its status."""
    folder.mkdir()
    log = ("--logging_dir", str(folder / "logs"), "--log_with", "tensorboard", "--learning_rate", RATE)
    words = runs.arguments(script, (*log, *flags), folder.parent / "assets", folder, steps)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _train(folder, script, words, environment)
        os._exit(70)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return _found(folder), status


def _train(folder, script, words, environment):
    """In a process of its own, which it leaves."""
    import accelerate.tracking

    from sdxl_fixes.kohya import speed

    with (folder / "said").open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    speed.BACKEND, tell = "eager", accelerate.tracking.TensorBoardTracker.log

    @functools.wraps(tell)
    def told(self, values, step=None, **kwargs):
        numbers = {name: float(value) for name, value in values.items()}
        with (folder / "told").open("a") as file:
            file.write(json.dumps([step, numbers]) + "\n")
        return tell(self, values, step, **kwargs)

    accelerate.tracking.TensorBoardTracker.log = told
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [str(HERE / "launch.py"), "module", str(folder / "trace.json"), script, *words]
    status = 70
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = int(bool(stop.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _found(folder):
    out, found = folder / "out", {}
    if (folder / "trace.json").exists():
        found.update(json.loads((folder / "trace.json").read_text()))
    if (folder / "told").exists():
        found["trackers"] = [json.loads(line) for line in (folder / "told").open()]
    lines = (folder / "said").read_text(errors="replace").replace("\r", "\n").splitlines()
    said = [line for line in lines if line.startswith(("sdxl-fixes: step", "NaN"))]
    found["said"], found["last"] = said, next((line for line in reversed(lines) if line.strip()), "nothing")
    for file in sorted(out.rglob("*.safetensors")):
        found[f"tensors of {file.relative_to(out)}"] = load_file(file)
    for file in sorted(out.rglob("*.bin")) + sorted(out.rglob("*_ema.pt")):
        found[f"tensors of {file.relative_to(out)}"] = torch.load(file, weights_only=False)
    for file in sorted(out.rglob("*.png")):
        found[f"preview {'_'.join(file.stem.split('_')[:3])}"] = file.read_bytes()
    for file in sorted(out.rglob("sdxl_fixes.json")):
        if place := json.loads(file.read_text()).get("place"):
            found[f"place of {file.parent.name}"] = place
    return found


def differences(right, found, exact):
    """What is not as it must be, in words."""
    for what in sorted({*right, *found} - {"last"}):
        if what not in right or what not in found:
            yield f"{what}: {'is there' if what in found else 'is missing'}"
        elif exact or what in ("timesteps", "contexts", "prompts"):
            if not _same(right[what], found[what]):
                yield f"{what}: {_shown(right[what], found[what])}"
        elif what == "losses" or (what.startswith("tensors") and what.endswith(".safetensors")):
            if (off := _distance(right[what], found[what])) > 1e-3:
                yield f"{what}: differ by {off:.2g}"
        elif what == "trackers" and [row[0] for row in right[what]] != [row[0] for row in found[what]]:
            yield f"{what}: told of other steps"


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and _equal(one, other)
    if isinstance(one, dict):
        keys = {*one, *other} - {"fused", "foreach"}
        return all(key in one and key in other and _same(one[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other or (one != one and other != other)


def _equal(one, other):
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _distance(one, other):
    """Of losses the largest relative one; of weights the mean one, in learning rates."""
    if isinstance(one, list):
        pairs = zip(one, other, strict=True)
        return max(abs(a - b) / abs(a) for a, b in pairs) if len(one) == len(other) else float("inf")
    if {*one} != {*other}:
        return float("inf")
    off = torch.cat([(one[name].double() - other[name].double()).abs().flatten() for name in one])
    return float(off.mean() / float(RATE))


def _shown(right, found):
    if isinstance(right, list) and isinstance(found, list):
        for number, pair in enumerate(zip(right, found, strict=False)):
            if not _same(*pair):
                return f"number {number} is {pair[1]}, and was {pair[0]}"[:400]
        return f"{len(found)}, and were {len(right)}"
    return "differ"


def parts_of(name):
    """Those that a case is run with, if nothing else is asked for."""
    named = [part for part, names in PARTS.items() if name in names]
    return named if "syncs,compile" in named else ["syncs", *named]


def pair(folder, script, name, flags, parts):
    """Sentences about a case."""
    right, status = train(folder / "without", script, flags)
    if status:
        yield f"{script}, {name}: ended with status {status} without --speed: {right['last']}"
        return
    for part in parts or parts_of(name):
        found, status = train(folder / part, script, (*flags, "--speed", part))
        if status:
            yield f"{script}, {name}, {part}: ended with status {status}: {found['last']}"
            continue
        for what in differences(right, found, "fused" not in part):
            yield f"{script}, {name}, {part}: {what}"


def killed(folder, script, fast):
    """Sentences about a run that is killed in its fourth step and resumed, with and without ``fast`` before
    and after."""
    whole, status = train(folder / "without", script, KILLED)
    assert status == 0, whole["last"]
    for before, after in (("", fast), (fast, ""), (fast, fast)):
        place = folder / f"{before or 'slow'} then {after or 'slow'}"
        flags = [(*KILLED, "--speed", part) if part else KILLED for part in (before, after)]
        cut, status = train(place.with_name(f"{place.name}, cut"), script, flags[0], KILL_AT="4")
        if status != -signal.SIGKILL:
            yield f"{script}, {place.name}: ended with status {status}: {cut['last']}"
            continue
        state = place.with_name(f"{place.name}, cut") / "out" / "out-step00000002-state"
        found, status = train(place, script, (*flags[1], "--resume", str(state)))
        if status:
            yield f"{script}, {place.name}: ended with status {status}: {found['last']}"
            continue
        right = dict(whole)
        for key in ("losses", "timesteps", "contexts", "prompts"):
            right[key] = whole[key][-2:]
        gone = ("step00000002", "said", "trackers")  # what the trackers are told is compared by step below
        right, now = (
            {key: value for key, value in one.items() if not any(part in key for part in gone)}
            for one in (right, found)
        )
        for what in differences(right, now, "fused" not in fast):
            yield f"{script}, {place.name}: {what}"
        told = [
            {row[0]: row[1] for row in one["trackers"] if "loss" in str(row[1])} for one in (whole, found)
        ]
        if "fused" not in fast and any(told[1].get(step) != told[0][step] for step in (3, 4)):
            yield f"{script}, {place.name}: the trackers are told {told[1]}, and were {told[0]}"


def preload(checkout):
    """What each run would import. No module that tiny.py changes is made use of."""
    sys.path[:0] = [str(checkout), str(HERE), str(HERE.parents[1] / "support")]
    import accelerate.tracking  # noqa: F401
    import library.train_util  # noqa: F401
    import tensorboard  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard
    import transformers  # noqa: F401

    import sdxl_fixes.kohya.install
    import sdxl_fixes.kohya.speed  # noqa: F401

    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="part of a case's name (default: all)")
    parser.add_argument("--only", choices=CASES, help="one script")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    args = parser.parse_args()
    checkout, wrong = checkouts.first(), []
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    preload(checkout)
    with tempfile.TemporaryDirectory() as temporary:
        assets = runs.make_assets(Path(temporary) / "assets", checkout)
        _stamped(assets)
        (assets / "held").mkdir()
        for file in sorted((assets / "images").glob("[03].*")):
            shutil.copy(file, assets / "held")
        for script in [args.only] if args.only else CASES:
            plan = {name: (pair, script, name, flags, args.parts) for name, flags in CASES[script].items()}
            plan |= {f"killed, {part}": (killed, script, part) for part in args.parts or parts_of("killed")}
            for name, (check, *of) in plan.items():
                if args.cases and not any(case in name for case in args.cases):
                    continue
                if name == "loha" and not (Path(checkout) / "networks" / "loha.py").exists():
                    continue  # 0.10.1 has none
                started = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "assets").symlink_to(assets)
                    found = list(check(Path(folder), *of))
                wrong += found
                took = f"{script}, {name}: {time.monotonic() - started:.0f} s"
                print("\n".join(f"- {sentence}" for sentence in found) or took, flush=True)
    print(f"\n{len(wrong)} wrong" if wrong else "\nAll is as it must be.")
    sys.exit(bool(wrong))


def _stamped(assets):
    from sdxl_fixes import NoiseSchedule
    from sdxl_fixes.checkpoint import Sampling
    from sdxl_fixes.model_files.stamp import stamp_file

    said = Sampling(NoiseSchedule.sdxl().zero_terminal_snr(), "v_prediction")
    stamp_file(assets / "model.safetensors", said, force=True, output=assets / "zero.safetensors")


if __name__ == "__main__":
    main()
