"""What a future sd-scripts may do to its functions: the fixes work, or the training stops in its first step and says so.

And ``doctor``, which only reads, tells beforehand which of the two it will be.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
from made_up_trainer import build, edit, forget, run, steps

from sdxl_fixes.kohya.doctor import problems

ALL = (
    *(
        "--zero_terminal_snr",
        "--v_parameterization",
        "--loss_type",
        "huber",
        "--min_snr_gamma",
        "5",
        "--min_snr_floor",
    ),
    *(
        "--ip_noise_gamma",
        "0.1",
        "--ip_noise_gamma_random_strength",
        "--stratified_timesteps",
        "--terminal_timestep_share",
        "0.3",
    ),
    *(
        "--masked_loss",
        "--sample_every_n_steps",
        "2",
        "--stable_loss_steps",
        "2",
        "--stable_loss_images",
        "2",
    ),
)
FT, NETWORK, LOSS = "sdxl_train.py", "sdxl_train_network.py", "library/loss.py"


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sdxl_fixes.kohya.doctor.LOOPS", {}
    )  # it has no epochs, which test_kohya_resume's has
    yield build(tmp_path)
    forget()


def losses(root):
    return [float(step["loss"]) for step in steps(root)]


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The losses of the trainer as we know it."""
    root = build(tmp_path_factory.mktemp("right"))
    found = {}
    for script in (FT, NETWORK):
        run(root, script, *ALL)
        found[script] = losses(root)
    forget()
    return found


IMPORT = "import library.loss as loss_util\n"


def moved(root, *files):
    """Functions of library/loss.py live in a module that we have never heard of; the old one re-exports them, as v0.11 does."""
    text = (root / LOSS).read_text()
    (root / "library" / "objectives.py").write_text(text)
    names = re.findall(r"^def (\w+)", text, re.MULTILINE)
    (root / LOSS).write_text(f"from library.objectives import {', '.join(names)}\n")
    for file in files or (FT, "train_network.py"):
        edit(root, file, ("library.loss as", "library.objectives as"))


def split(root):
    """Each function in a module of its own."""
    text = (root / LOSS).read_text()
    parts = re.split(r"(?=^def )", text, flags=re.MULTILINE)
    imports, names = "import torch\n", []
    for part in parts[1:]:
        name = re.match(r"def (\w+)", part).group(1)
        (root / "library" / f"the_{name}.py").write_text(
            imports + "".join(f"from library.the_{n} import {n}\n" for n in names) + part
        )
        names.append(name)
    (root / LOSS).write_text("".join(f"from library.the_{name} import {name}\n" for name in names))


def from_imported(root):
    """The scripts import functions by name, under another one."""
    edit(
        root, FT,
        ("import library.loss as loss_util\n", f"from library.loss import conditional_loss as criterion\n{IMPORT}"),
        ("loss_util.conditional_loss", "criterion"),
    )  # fmt: skip


def loop_moved(root):
    """The training loop itself is in the library, and the script only starts it."""
    text = (root / FT).read_text()
    (root / "library" / "loop.py").write_text(text.split('if __name__ == "__main__"')[0])
    (root / FT).write_text(
        'import training\nfrom library.loop import train\n\nif __name__ == "__main__":\n    train(training.parse())\n'
    )


def without_accelerates_backward(root):
    edit(root, FT, ("accelerator.backward(loss)", "loss.backward()"))


@pytest.mark.parametrize(
    "mutilate",
    [moved, split, from_imported, loop_moved, without_accelerates_backward],
    ids=lambda f: f.__name__,
)
def test_what_only_moves_is_found_and_trains_the_same(trainer, right, mutilate):
    mutilate(trainer)
    assert problems(trainer, FT) == {}
    run(trainer, FT, *ALL)
    assert losses(trainer) == right[FT]


@pytest.mark.parametrize("layout", ["0.10", "0.11"])
@pytest.mark.parametrize("script", [FT, NETWORK])
@pytest.mark.parametrize("how", ["module", "install"])
def test_every_layout_and_way_to_start_trains_the_same(tmp_path, right, layout, script, how):
    root = build(tmp_path, layout)
    run(root, script, *ALL, how=how)
    assert losses(root) == right[script]
    forget()


@pytest.mark.parametrize("layout", ["0.10", "0.11"])
@pytest.mark.parametrize("script", [FT, NETWORK])
@pytest.mark.parametrize("flags", [(), (*ALL, "--fixes", "none")], ids=["nothing", "none"])
def test_nothing_on_is_bit_identical_to_upstream(tmp_path, layout, script, flags):
    root = build(tmp_path, layout)
    ours = [flag for flag in flags if flag not in OWN]
    theirs = [
        flag for k, flag in enumerate(ours) if flag not in VALUED and (k == 0 or ours[k - 1] not in VALUED)
    ]
    run(root, script, *theirs, how="unpatched")
    upstream = steps(root)
    run(root, script, *flags)
    for mine, own in zip(steps(root), upstream, strict=True):
        assert all(mine[name] is own[name] or mine[name].equal(own[name]) for name in own)
    forget()


FLAT = "((prediction - target) ** 2).mean()"
OWN = ("--min_snr_floor", "--stratified_timesteps")
VALUED = ("--terminal_timestep_share", "--stable_loss_steps", "--stable_loss_images", "--fixes")


def renamed(name, *files):
    return lambda root: [edit(root, file, (name, f"{name}_of_2027")) for file in (*files, FT)]


def inlined(before, after, file=FT):
    return lambda root: edit(root, file, (before, after))


def loss_inlined(root):
    call = "loss_util.conditional_loss(prediction.float(), target.float(), args.loss_type, "
    edit(
        root, FT, (f'{call}"none", huber_c)', f"{FLAT} * batch['latents']"), (f'{call}"mean", huber_c)', FLAT)
    )


def signature(root):
    edit(root, LOSS, ("reduction, huber_c=None):", "reduction, weighting=None, huber_c=None):"))


def never_verified(root):
    edit(root, FT, ("    args_util.verify_training_args(args)\n", ""))


def never_verified_nor_backward(root):
    never_verified(root)
    without_accelerates_backward(root)


def verified_late(root):
    verify, loop = "    args_util.verify_training_args(args)\n", "    for number, item in enumerate(group):\n"
    edit(root, FT, (verify, ""), (loop, f"{verify}{loop}"))


def held_in_a_table(root):
    """A table in a module that is imported before us keeps the functions themselves."""
    (root / "library" / "registry.py").write_text(
        "from library.loss import conditional_loss\n\nLOSSES = {'all': conditional_loss}\n"
    )
    edit(
        root,
        "library/config_util.py",
        ("import library.dataset", "import library.registry\nimport library.dataset"),
    )
    edit(root, FT, ("loss_util.conditional_loss", "config_util.library.registry.LOSSES['all']"))


SAMPLING = "library/sampling.py"


def sampled_elsewhere(root):
    """What is called after every step is another function, and the one that we know stays behind."""
    text = (root / SAMPLING).read_text()
    (root / SAMPLING).write_text(text + text[text.index("def sample_im") :].replace("_common", "_of_2027"))
    edit(root, FT, ("sampling.sample_images_common", "sampling.sample_images_of_2027"))


SNR = "loss * noise_scheduler.all_snr[timesteps].clamp(max=5) / (noise_scheduler.all_snr[timesteps] + 1)"
STOPPED = {
    "renamed": (renamed("conditional_loss", LOSS), r"the fix '(loss|timesteps|weighting)'.*conditional_loss: expected a function"),
    "changed signature": (signature, r"the fix '(loss|timesteps|weighting)'.*found \(model_pred, target, loss_type, reduction, weighting"),
    "loss inlined": (
        loss_inlined,
        r"loss, timesteps, weighting asked for but not reached in this training step.*conditional_loss.*"
        "--fixes all,-loss,-timesteps,-weighting",
    ),
    "weight inlined": (
        inlined("apply_snr_weight(loss, timesteps, noise_scheduler, args.min_snr_gamma, args.v_parameterization)", SNR),
        r"weighting asked for but not reached in this training step.*apply_snr_weight",
    ),
    "mask inlined": (
        inlined("apply_masked_loss(loss, batch)", "loss * batch['alpha_masks'][:, None, ::2, ::2]"),
        r"loss asked for but not reached.*apply_masked_loss",
    ),
    "noising inlined": (
        inlined(
            "noise, noisy, timesteps = loss_util.get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)",
            "noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (4,)); "
            "noisy = noise_scheduler.add_noise(latents, noise, timesteps)",
        ),
        r"a loss was computed before any latents were noised|asked for but not reached",
    ),
    "noising gives more": (
        inlined("latents, seen, timesteps), timesteps", "latents, seen, timesteps), timesteps, None", LOSS),
        "get_noise_noisy_latents_and_timesteps: expected noise, noisy latents and timesteps from it, found 4",
    ),
    "noise added inline": (
        inlined("noise_scheduler.add_noise(latents, seen, timesteps)",
                "(lambda a: a**0.5 * latents + (1 - a) ** 0.5 * seen)(noise_scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1))", LOSS),
        r"noise, schedule asked for but not reached",
    ),
    "loss changed before its mask": (
        inlined("            if args.masked_loss:\n", "            loss = loss * 7\n            if args.masked_loss:\n"),
        r"the trainer changes the loss before its mask",
    ),
    "timesteps inlined": (
        inlined("get_timesteps(args.min_timestep or 0, args.max_timestep or 1000, len(latents), latents.device)",
                "torch.randint(0, 1000, (len(latents),))", LOSS),
        r"timesteps asked for but not reached",
    ),
    "schedule inlined": (
        lambda root: [
            edit(root, FT, ("    prepare_scheduler_for_custom_training(noise_scheduler, accelerator.device)\n",
                            "    noise_scheduler.all_snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)\n"),
                 ("        custom_train_functions.fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler)\n", "        pass\n"))
        ],
        r"schedule asked for but not reached",
    ),
    "sampled elsewhere": (sampled_elsewhere, r"validation asked for but not reached in this training step.*sample_images_common"),
    "another scheduler for previews": (
        inlined('[get_my_scheduler(sample_sampler="ddim", v_parameterization=args.v_parameterization)]', "[DDIMScheduler()]", SAMPLING),
        "does not make the scheduler of its previews where we look for it",
    ),
    "arguments never shown": (never_verified, r"has not shown its arguments where we look for them.*nothing was trained"),
    "nor accelerate's backward": (never_verified_nor_backward, r"has not shown its arguments where we look for them"),
    "arguments shown late": (verified_late, r"prepare_scheduler_for_custom_training.* was called before .* showed its arguments"),
    "no flags": (
        renamed("add_custom_train_arguments", "library/custom_train_functions.py", "training.py"),
        r"add_custom_train_arguments: expected",
    ),
}  # fmt: skip


RUNTIME = (
    "arguments shown late",
    "nor accelerate's backward",
    "noise added inline",
    "noising gives more",
    "loss changed before its mask",
)  # not in the names


@pytest.mark.parametrize("name", STOPPED)
def test_what_is_out_of_reach_stops_in_the_first_step_with_one_sentence(trainer, name, capsys):
    mutilate, sentence = STOPPED[name]
    if name == "no flags":
        edit(trainer, FT, ("import training", "import training  # add_custom_train_arguments"))
    mutilate(trainer)
    with pytest.raises(SystemExit) as stopped:
        run(trainer, FT, *ALL)
    said = capsys.readouterr().err.splitlines()[-1] if stopped.value.code == 2 else stopped.value.code
    assert re.search(sentence, said) and said.startswith("sdxl-fixes: ") and "\n" not in said
    assert (
        not (trainer / "out" / "steps.pt").exists() and not (trainer / "out" / "model.safetensors").exists()
    )


@pytest.mark.parametrize("name", [name for name in STOPPED if name not in RUNTIME])
def test_doctor_says_beforehand_what_will_stop(trainer, name):
    mutilate, _ = STOPPED[name]
    if name == "no flags":
        edit(trainer, FT, ("import training", "import training  # add_custom_train_arguments"))
    mutilate(trainer)
    assert problems(trainer, FT)


def test_doctor_finds_nothing_wrong_where_all_trains(trainer):
    assert problems(trainer, FT) == {}
    assert set(problems(trainer, NETWORK)) == {
        "buckets",
        "heldout",
    }  # the made-up network trainer has no data set


def test_a_table_of_functions_made_before_install_is_noticed(trainer):
    import sys

    held_in_a_table(trainer)
    sys.path.insert(0, str(trainer))
    try:
        import library.registry  # noqa: F401
    finally:
        sys.path.remove(str(trainer))
    with pytest.raises(SystemExit, match="loss, timesteps, weighting asked for but not reached"):
        run(trainer, FT, *ALL)


def test_a_module_that_imported_by_name_before_install_is_patched_too(trainer, right):
    import sys

    (trainer / "library" / "criteria.py").write_text(
        "from library.loss import conditional_loss as criterion\n"
    )
    edit(
        trainer,
        FT,
        ("loss_util.conditional_loss(", "criteria.criterion("),
        ("import training\n", "import training\nfrom library import criteria\n"),
    )
    sys.path.insert(0, str(trainer))
    try:
        import library.criteria  # noqa: F401
    finally:
        sys.path.remove(str(trainer))
    run(trainer, FT, *ALL)
    assert losses(trainer) == right[FT]


def test_a_file_that_was_saved_past_us_ends_the_run_with_the_command_that_mends_it(trainer):
    spec = '{"modelspec.prediction_type": "v"}'
    save = 'sdxl_model_util.save_stable_diffusion_checkpoint(f"{args.output_dir}/model.safetensors", accelerator.unwrap_model(unet), spec)'
    past = 'safetensors.torch.save_file(unet.state_dict(), f"{args.output_dir}/model.safetensors", spec)'
    imported = ("import training\n", "import training\nimport safetensors.torch\n")
    edit(trainer, FT, ("model_io.get_sai_model_spec(None, args)", spec), imported, (save, past))
    with pytest.raises(
        SystemExit,
        match=r"no model file .* carries its schedule: sdxl-fixes stamp FILE --prediction_type v_prediction --zero",
    ):
        run(trainer, FT, *ALL)
    assert (trainer / "out" / "model.safetensors").exists()


def test_a_flag_that_the_trainer_has_itself_is_refused_where_it_is_given(trainer, right, capsys):
    """Its own average and ours would both be kept."""
    add = "    custom_train_functions.add_custom_train_arguments(parser)\n"
    edit(trainer, "training.py", (add, f'    parser.add_argument("--ema_decay", type=float)\n{add}'))
    with pytest.raises(SystemExit):
        run(trainer, FT, *ALL, "--ema_decay", "0.9")
    assert "--ema_decay is a flag of this sd-scripts, too, and both would act" in capsys.readouterr().err
    forget()
    run(trainer, FT, "--ema_decay", "0.9", "--fixes", "none")
    assert not list((trainer / "out").glob("*-ema*"))
    forget()
    run(trainer, FT, *ALL)
    assert losses(trainer) == right[FT]


def test_a_full_model_that_was_written_past_us_has_its_record_alone_which_is_said(trainer):
    """Another writer takes the metadata, and neither markers nor the config beside the file."""
    file = "library/sdxl_model_util.py"
    edit(trainer, file, ("    save_file(", "    __import__('safetensors.torch').torch.save_file("))
    with pytest.raises(SystemExit, match="no model file that was saved carries its schedule"):
        run(trainer, FT, *ALL)
    assert not list((trainer / "out").glob("*.json"))


def test_fixes_that_are_not_asked_for_may_be_out_of_reach(trainer):
    STOPPED["renamed"][0](trainer)
    run(trainer, FT, "--zero_terminal_snr", "--v_parameterization")
    assert len(losses(trainer)) == 3


def test_a_diffusers_folder_that_was_saved_ends_well(trainer):
    run(trainer, FT, *ALL, "--diffusers")
    assert (trainer / "out" / "scheduler" / "scheduler_config.json").exists()


def test_a_config_goes_with_every_file_that_is_saved_uploaded_and_removed(trainer):
    from diffusers import DDIMScheduler

    (trainer / "out").mkdir(exist_ok=True)
    foreign = trainer / "out" / "step00000000.scheduler_config.json"
    foreign.write_text("{}")
    run(trainer, FT, *ALL, "--save_every_n_steps", "1")
    names = {"step00000002", "step00000003", "model"}  # the first was removed, as upstream removes it
    found = {file.name for file in (trainer / "out").glob("*.*") if "pt" not in file.suffix}
    configs = {f"{name}.scheduler_config.json" for name in names}
    assert found == {f"{name}.safetensors" for name in names} | configs | {foreign.name}
    for name in configs:
        assert DDIMScheduler.from_pretrained(trainer / "out" / name).alphas_cumprod[-1] == 0
    uploaded = sys.modules["library.huggingface_util"].UPLOADED
    assert [suffix for _, suffix, _ in uploaded] == [
        f"/step0000000{n}.{end}" for n in (1, 2, 3) for end in ("safetensors", "scheduler_config.json")
    ]
    assert all(src == f"{trainer / 'out'}{suffix}" for src, suffix, _ in uploaded)


def test_an_average_and_its_config_go_with_the_model_that_is_removed(trainer):
    every = ("--save_every_n_steps", "1", "--ema_decay", "0.9")
    run(trainer, FT, *ALL, *every, "--save_last_n_steps", "2")
    names = {f"{name}{end}" for name in ("step00000002", "step00000003", "model") for end in ("", "-ema")}
    found = {file.name.partition(".")[0] for file in (trainer / "out").glob("*.*") if "pt" not in file.suffix}
    assert found == names
    shutil.rmtree(trainer / "out")
    forget()
    run(trainer, FT, *ALL, *every)  # sd-scripts removes none: what is gone was moved by somebody else
    assert (trainer / "out" / "step00000001-ema.safetensors").exists()


def test_weights_that_no_step_averaged_are_not_saved_as_an_average(trainer):
    edit(trainer, FT, ("sampling.sample_images_common(None, accelerator, args, None, number + 1)", "pass"))
    with pytest.raises(
        SystemExit, match=r"model\.safetensors is saved, and no optimizer step was seen before"
    ):
        run(trainer, FT, "--ema_decay", "0.9")
    assert {file.name for file in (trainer / "out").glob("*.safetensors")} == {"model.safetensors"}


def test_without_saving_nothing_is_beside_a_file(trainer):
    run(trainer, FT, "--save_every_n_steps", "1", "--zero_terminal_snr", "--fixes", "all,-saving")
    assert not list((trainer / "out").glob("*.json")) and (trainer / "out" / "model.safetensors").exists()


def test_a_step_that_only_allocates_an_optimizers_state_is_not_training(trainer, right):
    edit(
        trainer, FT,
        ("    steps, times", "    for parameter in unet.parameters():\n        parameter.grad = torch.zeros_like(parameter)\n"
         "    optimizer.optimizer.step()\n    optimizer.zero_grad()\n    steps, times"),
    )  # fmt: skip
    run(trainer, FT, *ALL)
    assert losses(trainer) == right[FT]


def test_weights_that_are_left_to_upstream_do_not_go_with_a_gradient_that_must_know_them(trainer, capsys):
    flags = (
        "--loss_type",
        "huber",
        "--huber_l2_gradient",
        "batch",
        "--min_snr_gamma",
        "5",
        "--v_parameterization",
    )
    with pytest.raises(SystemExit):
        run(trainer, FT, *flags, "--fixes", "all,-weighting")
    assert "--huber_l2_gradient batch must know the weights of the loss" in capsys.readouterr().err


def test_it_may_be_started_from_the_trainers_own_folder_as_people_do(trainer, right, monkeypatch):
    monkeypatch.chdir(trainer)
    run(Path("."), FT, *ALL)
    assert losses(trainer) == right[FT]


def test_an_uninstall_that_fails_leaves_the_guard_in_place(trainer, monkeypatch):
    """Somebody replaced ours meanwhile: fixes may still act, so they must still be watched."""
    import sdxl_fixes.kohya
    from sdxl_fixes.kohya.run import SESSION

    monkeypatch.syspath_prepend(str(trainer))
    sdxl_fixes.kohya.install()
    import library.loss

    ours, library.loss.get_timesteps = library.loss.get_timesteps, lambda *args: None
    with pytest.raises(RuntimeError, match="replaced again by somebody else"):
        sdxl_fixes.kohya.uninstall()
    assert SESSION._hook is not None
    library.loss.get_timesteps = ours
    sdxl_fixes.kohya.uninstall()
    assert SESSION._hook is None
