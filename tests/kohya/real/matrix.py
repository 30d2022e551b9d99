"""python tests/kohya/real/matrix.py [CHECKOUT ...]: every SDXL trainer of every checkout of sd-scripts,
without and with the fixes.

Prints a table (Markdown), then a sentence for everything that is not as it must be, and ends with status 1 if
there is any:

  off    our launcher and no flag of a fix trains as upstream does, to the bit: losses, inputs, saved weights;
  none   so it does with every flag that upstream has and --fixes none;
  all    with every fix that the script can have, all checkouts train the same, to the bit;
  doctor says beforehand what the run with all does, and knows the checkout;
  and every start is reported, and the saved file has the schedule's record with "all" and only then.

A script that the launcher refuses is run without it, and must be refused in one sentence. Without arguments,
the checkouts are those of the environment's SD_SCRIPTS.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import checkouts
import runs
from safetensors import safe_open

STEPS = 6  # an epoch
RECORD = "sdxl_fixes.schedule"
REPORT = "in kohya-ss/sd-scripts"
V = ("--v_parameterization",)
FIXES = {  # fix -> flags that switch it on
    "schedule": ("--zero_terminal_snr",),
    "loss": ("--loss_type", "huber", "--huber_l2_gradient", "batch"),
    "weighting": ("--min_snr_gamma", "5", "--min_snr_floor"),
    "noise": ("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
    "timesteps": ("--stratified_timesteps", "--terminal_timestep_share", "0.3"),
    "buckets": ("--max_token_length", "225", "--chunk_buckets", "--chunk_layout", "77n"),
    "validation": ("--stable_loss_steps", "2", "--stable_loss_images", "2"),
    "previews": ("--sample_prompts", "{assets}/prompts.txt", "--sample_every_n_steps", "2"),
}
CONTROL = {
    **FIXES,
    "previews": ("--sample_prompts", "{assets}/control_prompts.txt", "--sample_every_n_steps", "2"),
}
SCRIPTS = {  # script -> the fixes that it can have
    "sdxl_train.py": FIXES,
    "sdxl_train_network.py": FIXES,
    "sdxl_train_textual_inversion.py": {
        fix: FIXES[fix] for fix in FIXES if fix not in ("buckets", "validation")
    },
    "sdxl_train_control_net.py": {
        fix: CONTROL[fix] for fix in CONTROL if fix not in ("buckets", "validation")
    },
    "sdxl_train_control_net_lllite.py": {
        fix: FIXES[fix] for fix in FIXES if fix not in ("buckets", "validation", "previews")
    },
    "sdxl_train_leco.py": {},
}
UPSTREAM = (
    *("--loss_type", "huber", "--min_snr_gamma", "5", "--ip_noise_gamma", "0.1"),
    *("--zero_terminal_snr", *V, "--max_token_length", "150"),
)


@dataclass
class Cell:
    """One run: what it was given and computed, and what it saved."""

    script: str
    checkout: str
    run: str
    trace: dict
    weights: str
    record: bool
    stderr: str
    status: int

    @property
    def numbers(self):
        return self.trace, self.weights

    @property
    def said(self):
        """The last thing it said, but for progress bars."""
        lines = [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("steps:")]
        return lines[-1] if lines else "nothing"


def launched():
    """The scripts that our launcher starts."""
    from sdxl_fixes.kohya.__main__ import SCRIPTS

    return set(SCRIPTS)


def name(checkout):
    """Folder and commit."""
    asked = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True
    )
    return f"{checkout.name} ({asked.stdout.strip()})" if asked.returncode == 0 else checkout.name


def cell(script, checkout, run, how, flags, assets, steps):
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        process, trace = runs.run(
            how, script, *flags, assets=assets, folder=Path(folder), steps=steps, checkout=checkout
        )
        weights, record = _saved(Path(folder) / "out" / "out.safetensors")
    return Cell(script, name(checkout), run, trace or {}, weights, record, process.stderr, process.returncode)


def _saved(file):
    """Digest of the tensors, and whether the metadata has the record."""
    if not file.is_file():
        return "", False
    digest = hashlib.sha256()
    with safe_open(file, framework="pt") as tensors:
        for key in sorted(tensors.keys()):
            digest.update(key.encode() + tensors.get_tensor(key).numpy().tobytes())
        return digest.hexdigest()[:16], RECORD in (tensors.metadata() or {})


def check(script, folders, assets, steps=STEPS, jobs=1):
    """(cells, sentences) of a script in all checkouts that have it."""
    folders = [folder for folder in folders if (folder / script).is_file()]
    plan = {"unpatched": ("unpatched", ()), "off": ("module", ())}
    if script in launched():
        everything = (*V, *(flag for flags in SCRIPTS[script].values() for flag in flags))
        plan |= {
            "upstream": ("unpatched", UPSTREAM),
            "none": ("module", (*UPSTREAM, "--fixes", "none")),
            "all": ("module", everything),
        }
    wanted = [(folder, run, how, flags) for folder in folders for run, (how, flags) in plan.items()]
    with ThreadPoolExecutor(jobs) as pool:
        cells = list(pool.map(lambda of: cell(script, *of, assets, steps), wanted))
    # per checkout
    of = [dict(zip(plan, cells[start:], strict=False)) for start in range(0, len(cells), len(plan))]
    sentences = [
        sentence for runs_of_one in of for sentence in _wrong(script, runs_of_one, script in launched())
    ]
    for folder, runs_of_one in zip(folders, of, strict=True):
        if "all" in runs_of_one:
            sentences += _disagrees(script, folder, runs_of_one["all"])
    first, *others = [runs_of_one["all"] for runs_of_one in of if "all" in plan] or [None]
    sentences += [
        f"{other.script}, all fixes: {other.checkout} does not train as {first.checkout} does"
        for other in others
        if other.status == first.status == 0 and other.numbers != first.numbers
    ]
    return cells, sentences


def _wrong(script, of, launches):
    """Sentences about the runs of a script in one checkout."""
    place = f"{script} in {of['unpatched'].checkout}"
    if not launches:
        refusal = of.pop("off")
        if (
            refusal.status == 0
            or not refusal.said.startswith("sdxl-fixes: ")
            or "Traceback" in refusal.stderr
        ):
            yield f"{place}: the launcher must refuse it in one sentence, and said: {refusal.said}"
    for run, one in of.items():
        ours = run in ("off", "none", "all")
        if one.status:
            yield f"{place}, {run}: ended with status {one.status}: {one.said}"
            continue
        if not one.weights or not one.trace["losses"]:
            yield f"{place}, {run}: trained or saved nothing"
        if ours and not any(REPORT in line and "sdxl-fixes" in line for line in one.stderr.splitlines()):
            yield f"{place}, {run}: no start-up report, so the plugin is not at work"
        if run == "all" and one.trace["all_snr_999"] != 0:
            yield f"{place}, {run}: the trainer's SNR table is not that of --zero_terminal_snr"
        if one.record != (run == "all"):
            yield f"{place}, {run}: the saved file {'has' if one.record else 'lacks'} the schedule's record"
    for ours, theirs in (("off", "unpatched"), ("none", "upstream")):
        if (
            ours in of
            and of[ours].status == of[theirs].status == 0
            and of[ours].numbers != of[theirs].numbers
        ):
            yield f"{place}: {ours} is not bit-identical to the unpatched run"


def _disagrees(script, folder, everything):
    """A sentence if doctor does not say of a script what a run with every fix that has a place there then
    did."""
    from sdxl_fixes.kohya.doctor import examine

    report, fits = examine(folder / script)
    if fits != (everything.status == 0):
        yield (
            f"{script} in {everything.checkout}: doctor says that the fixes "
            f"{'fit' if fits else 'do not fit'}, and the run says otherwise"
        )
    if "not tested" in report:
        yield (
            f"{script} in {everything.checkout}: doctor does not know it: integrations/kohya/scripts.py "
            "wants its digest"
        )


def table(cells):
    """Markdown."""
    lines = ["| script | checkout | run | losses | weights | record |", "|---|---|---|---|---|---|"]
    for one in cells:
        failed = f"status {one.status}: {one.said[:90]}" if one.status else ""
        losses = failed or " ".join(f"{loss:.9g}" for loss in one.trace["losses"])
        lines.append(
            f"| {one.script} | {one.checkout} | {one.run} | {losses} | {one.weights} | "
            f"{'yes' if one.record else ''} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkouts", nargs="*", type=Path, help="folders of kohya-ss/sd-scripts; default: those of SD_SCRIPTS"
    )
    parser.add_argument(
        "--only", action="append", choices=SCRIPTS, help="a script; may be repeated (default: all)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}, an epoch")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    folders = [folder.resolve() for folder in args.checkouts] or checkouts.named()
    missing = [str(folder) for folder in folders if not (folder / "library" / "train_util.py").is_file()]
    if missing or not folders:
        parser.error(
            f"no sd-scripts in {', '.join(missing)}"
            if missing
            else "name checkouts of kohya-ss/sd-scripts, or set SD_SCRIPTS"
        )
    cells, sentences = [], []
    with tempfile.TemporaryDirectory() as folder:
        assets = runs.make_assets(Path(folder) / "assets", folders[0])
        for script in args.only or SCRIPTS:
            more, wrong = check(script, folders, assets, args.steps, args.jobs)
            cells, sentences = cells + more, sentences + wrong
    print(table(cells))
    print("\n" + ("\n".join(f"- {sentence}" for sentence in sentences) or "All is as it must be."))
    sys.exit(bool(sentences))


if __name__ == "__main__":
    main()
