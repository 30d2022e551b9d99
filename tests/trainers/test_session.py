"""The guard that no fix is ever silently off: what stops a training in its first step, and what does not."""

import argparse
import runpy
import sys
import types

import pytest
import torch

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.trainers.fixes import Fix
from sdxl_fixes.trainers.patching import Patch, PatchSet
from sdxl_fixes.trainers.run import Trainer, prepare
from sdxl_fixes.trainers.session import Session, run_script

FIXES = {
    "loss": Fix({"loss_type": ("huber",)}, parts={"masked_loss": "apply_masked_loss"}),
    "weighting": Fix({"min_snr_gamma": None}),
    "buckets": Fix({"chunk_buckets": None}, due="start"),
    "saving": Fix(due="later"),
}
TRAINER = Trainer("somebody/some-trainer", "--v", FIXES)


def run(*on, **args):
    """A run with the fixes ``on``."""
    parts = argparse.Namespace(**args), frozenset(on), {}, TrainingFlags()
    return prepare(TRAINER, *parts, Sampling(NoiseSchedule.sdxl(), "epsilon"))


@pytest.fixture
def session():
    made = Session("some trainer")
    yield made
    made.unwatch()
    made.patches.undo()


def backward(session):
    """A step's backward pass."""
    return session.backward(lambda accelerator, loss: "upstream", None, None)


# ---------------------------------------------------------------- no run


def test_a_training_that_begins_without_a_run_stops(session):
    said = r"^training begins, and this some trainer has not shown its arguments .*, so no fix is on: "
    with pytest.raises(FixError, match=said):
        backward(session)
    session.begin(run())
    assert backward(session) == "upstream"


def test_without_a_run_other_trainings_of_a_process_go_on(session, tmp_path):
    """The patches of a trainer's folder are in place, and what trains is none of its scripts."""
    root = (tmp_path / "trainer").resolve()
    root.mkdir()
    session.patches = PatchSet((), root)
    assert backward(session) == "upstream" and session.script_name() is None
    session.launched = True  # by the launcher: this process is a training for certain
    with pytest.raises(FixError, match="training begins"):
        backward(session)


@pytest.mark.parametrize("where", ["script", "function", "library"])
def test_a_script_of_the_trainer_that_trains_without_a_run_stops(session, tmp_path, where, monkeypatch):
    root = (tmp_path / "trainer").resolve()
    (root / "library").mkdir(parents=True)
    call = "session.backward(None, None)\n"
    (root / "library" / "loop_of_a_test.py").write_text(f"def train(session):\n    {call}")
    (root / "sdxl_train.py").write_text(
        {
            "script": call,
            "function": f"def main():\n    {call}main()\n",
            "library": "from library.loop_of_a_test import train\ntrain(session)\n",
        }[where]
    )
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "library", raising=False)
    session.patches = PatchSet((), root)
    with pytest.raises(FixError) as error:
        runpy.run_path(str(root / "sdxl_train.py"), init_globals={"session": session}, run_name="__main__")
    assert f"(sdxl-fixes doctor {root / 'sdxl_train.py'} tells more)" in str(error.value)
    for name in [name for name in sys.modules if name.split(".")[0] == "library"]:
        del sys.modules[name]


# ---------------------------------------------------------------- a fix that is not reached


def test_what_is_due_in_every_step_must_be_reached_in_every_step(session):
    session.begin(run("loss", "weighting"))
    session.reached("loss")
    session.reached("weighting")
    backward(session)
    session.reached("loss")
    with pytest.raises(FixError, match=r"^weighting asked for but not reached .*--fixes all,-weighting "):
        backward(session)


def test_what_is_due_at_the_start_must_be_reached_once(session):
    session.begin(run("buckets"))
    with pytest.raises(FixError, match=r"^buckets asked for but not reached"):
        backward(session)
    session.reached("buckets")
    assert [backward(session) for _ in range(3)] == ["upstream"] * 3


def test_what_is_due_later_stops_no_step(session):
    session.begin(run("saving"))
    assert backward(session) == "upstream" and not session.has_reached("saving")
    session.reached("saving")
    assert session.has_reached("saving")


def test_parts_are_due_with_their_fix_and_named(session):
    session.begin(run("loss", masked_loss=True))
    session.reached("loss")
    with pytest.raises(FixError, match=r"^loss asked for but not .*\(apply_masked_loss\).*all,-loss "):
        backward(session)
    session.begin(run("loss", masked_loss=False))
    session.reached("loss")
    assert backward(session) == "upstream"


def test_several_are_named_together(session):
    session.begin(run("weighting", "loss", "buckets"))
    with pytest.raises(FixError, match=r"^buckets, loss, weighting asked .* all,-buckets,-loss,-weighting "):
        backward(session)


def test_asking_whether_a_fix_is_on_counts_nothing(session):
    session.begin(run("loss"))
    assert session.on("loss") is session.run and session.on("weighting") is None
    with pytest.raises(FixError, match="loss asked for"):
        backward(session)


def test_a_new_run_begins_with_nothing_seen(session):
    session.begin(run("buckets"))
    session.reached("buckets")
    session.begin(run("buckets"))
    with pytest.raises(FixError, match="buckets asked for"):
        backward(session)


def test_a_steps_state_ends_with_its_backward_pass(session):
    session.begin(run())
    session.step.timesteps = torch.arange(2)
    backward(session)
    assert session.step.timesteps is None and session.step.reached == set()


def test_a_step_that_stops_does_not_reach_accelerates_backward(session):
    called = []
    session.begin(run("loss"))
    with pytest.raises(FixError):
        session.backward(lambda *args: called.append(args), None, None)
    assert called == []


# ---------------------------------------------------------------- a call before the run


@pytest.fixture
def early(session):
    """The session's patches of a module with two functions."""
    module = types.ModuleType("early_trainer")
    module.weigh, module.arguments = (lambda loss: loss), (lambda loss: loss)
    sys.modules["early_trainer"] = module

    def same(original, *args):
        return original(*args)

    rows = ((("loss", "weighting"), "weigh"), (("run",), "arguments"))
    patches = tuple(Patch(fixes, f"early_trainer:{name}", ("loss",), same, "") for fixes, name in rows)
    session.patches = PatchSet(patches, calls=session.called)
    session.patches.apply()
    yield module
    session.patches.undo()
    del sys.modules["early_trainer"]


def test_a_patched_function_that_was_called_before_the_run_stops_the_training(session, early):
    early.weigh(1)
    session.begin(run("weighting"))
    session.reached("weighting")
    said = r"^weigh was called before this some trainer showed .*: leave out the flags of weighting \("
    with pytest.raises(FixError, match=said):
        backward(session)


def test_early_calls_of_fixes_that_are_off_and_of_the_arguments_do_not(session, early):
    early.weigh(1), early.arguments(1)
    session.begin(run("buckets"))
    session.reached("buckets")
    assert backward(session) == "upstream"


def test_calls_after_the_run_began_are_not_early(session, early):
    session.begin(run("weighting"))
    early.weigh(1)
    session.reached("weighting")
    assert backward(session) == "upstream"


# ---------------------------------------------------------------- optimizers


def optimizer(kind=torch.optim.SGD):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return weight, kind([weight], lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_first_optimizer_step_is_guarded_without_accelerates_backward(session, kind):
    weight, made = optimizer(kind)
    session.watch_optimizers()
    with pytest.raises(FixError, match="training begins"):
        made.step()
    session.begin(run("loss"))
    with pytest.raises(FixError, match="loss asked for but not reached"):
        made.step()
    assert torch.equal(weight, torch.ones(2))  # nothing was trained
    session.reached("loss")
    made.step()
    assert not torch.equal(weight, torch.ones(2))


def test_a_step_that_accelerates_backward_guarded_is_not_guarded_again(session):
    """By then the step's marks are gone."""
    _, made = optimizer()
    session.watch_optimizers()
    session.begin(run("loss"))
    for _ in range(2):
        session.reached("loss")
        backward(session)
        made.step()


def test_optimizers_are_let_go(session):
    weight, made = optimizer()
    session.watch_optimizers()
    session.unwatch()
    session.unwatch()
    made.step()
    assert not torch.equal(weight, torch.ones(2))


# ---------------------------------------------------------------- the launcher


@pytest.fixture
def launch(tmp_path, monkeypatch, session):
    """launch(source): run a script of that source, which finds the session as ``session``."""
    script = tmp_path / "script_of_a_test.py"
    monkeypatch.setattr(sys, "path", list(sys.path))

    def go(source, install=lambda: None):
        script.write_text("import sys\nsession = sys.modules['session_of_a_test']\n" + source)
        monkeypatch.setitem(sys.modules, "session_of_a_test", session)
        monkeypatch.setattr(sys, "argv", ["launcher", str(script), "--flag"])
        run_script(script, install, session)

    return go


def test_the_launcher_runs_a_script_as_python_would(launch, session, tmp_path, capsys):
    launch("print(sys.argv[1:], sys.path[0], __name__, session.launched)\n")
    assert capsys.readouterr().out == f"['--flag'] {tmp_path.resolve()} __main__ True\n"
    assert not session.launched


def test_flags_of_ours_may_have_hyphens(tmp_path, session, monkeypatch, capsys):
    script = tmp_path / "script_of_a_test.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        sys, "argv", ["launcher", str(script), "--terminal-sigma", "300", "--their-own", "a-b"]
    )
    run_script(script, lambda: None, session, {"terminal_sigma"})
    assert capsys.readouterr().out == "['--terminal_sigma', '300', '--their-own', 'a-b']\n"


@pytest.mark.parametrize("during", ["install", "script"])
@pytest.mark.parametrize(("error", "status"), [(FlagError("--x: wrong"), 2), (FixError("--x: wrong"), 1)])
def test_what_the_user_can_put_right_ends_in_one_sentence(launch, session, during, error, status, capsys):
    session.error = error

    def stop():
        raise error

    with pytest.raises(SystemExit) as stopped:
        launch("raise session.error\n", **({"install": stop} if during == "install" else {}))
    said = capsys.readouterr().err.strip() if status == 2 else stopped.value.code
    assert said == "sdxl-fixes: --x: wrong" and (status == 1 or stopped.value.code == 2)
    assert not session.launched


def test_other_errors_are_the_scripts_own(launch):
    with pytest.raises(ZeroDivisionError):
        launch("1 / 0\n")


ENDS = [(True, "0", False), (False, "0", True), (False, "1", False)]


@pytest.mark.parametrize(("saved", "rank", "stops"), ENDS)
def test_files_that_say_nothing_end_it_with_what_mends_them(launch, session, saved, rank, stops, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    session.begin(run("saving"))
    step = "session.backward(lambda *_: None, None)\n"
    source = step + ("session.reached('saving')\n" if saved else "")
    if not stops:
        return launch(source)
    with pytest.raises(SystemExit, match=r"no model file .*: sdxl-fixes stamp FILE --prediction_type eps"):
        launch(source)


def test_a_script_that_trained_nothing_is_not_said_to_have_saved_nothing(launch, session):
    session.begin(run("saving"))
    launch("print('No data found')\n")


def test_the_timestep_sampler_hears_of_every_optimizer_step_and_of_no_other_backward(session):
    """Accelerate steps at the end of an epoch whatever is left, so an optimizer step may have fewer draws
    than the accumulation."""
    from dataclasses import replace

    from sdxl_fixes import TimestepSampler

    sampler = TimestepSampler(NoiseSchedule.sdxl(), stratified=True, accumulation=4)
    session.begin(replace(run(), timesteps=sampler))
    for sync, drawn in ((False, 1), (True, 4), (False, 5)):
        sampler.draw(2)
        session.backward(lambda accelerator, loss: None, types.SimpleNamespace(sync_gradients=sync), None)
        assert sampler.state_dict()["drawn"] == drawn


# ---------------------------------------------------------------- what a run works with


def test_a_weighting_that_is_switched_off_is_known_and_not_applied():
    """The trainer applies it itself then."""
    from sdxl_fixes.weighting import MinSNR

    trained, t = Sampling(NoiseSchedule.sdxl(), "epsilon"), torch.tensor([0, 500, 999])
    known = (TRAINER, argparse.Namespace()), ({}, TrainingFlags(), trained, (MinSNR(5),))
    off, on = (prepare(*known[0], frozenset(names), *known[1]) for names in (("loss",), ("weighting",)))
    assert off.weighting == on.weighting == MinSNR(5) and off.step_loss.weights(t) is None
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    assert on.step_loss.weights(t).tolist() == pytest.approx(
        (5 / (abar / (1 - abar))).clamp(max=1).tolist(), rel=1e-5
    )


def test_stratified_timesteps_share_an_optimizer_step_over_ranks_and_accumulation(monkeypatch):
    """Two ranks of two micro-batches of two draws: one draw in each eighth of the schedule."""
    trainer = Trainer("somebody/some-trainer", "--v", {"timesteps": Fix({"stratified_timesteps": None})})
    drawn = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        args = argparse.Namespace(gradient_accumulation_steps=2, seed=3)
        settings, on = TrainingFlags(stratified_timesteps=True), frozenset(["timesteps"])
        made = prepare(trainer, args, on, {}, settings, settings.sampling())
        drawn += [t for _ in range(2) for t in made.timesteps.draw(2).tolist()]
    assert sorted(t // 125 for t in drawn) == list(range(8))
