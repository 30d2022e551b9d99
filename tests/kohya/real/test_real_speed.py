"""--speed in the real trainers: what is waited for is counted, and the numbers stay. Set SD_SCRIPTS to run
these."""

import json
import shutil
import sys

import checkouts
import pytest
import torch
from safetensors.torch import load_file
from stable_loss_output import logged
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)
from two_processes import TWO

CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
CASES = {
    "full, cached": ("sdxl_train.py", CACHED, 16),
    "network, nothing cached": ("sdxl_train_network.py", (), 16),
    "full, weights by sample": ("sdxl_train.py", ("--min_snr_gamma", "5"), 18),  # batch 2
}
FIXES = (
    *("--loss_type", "huber", "--zero_terminal_snr", "--v_parameterization", "--exact_resume"),
    *("--ema_decay", "0.9", "--stable_loss_steps", "2", "--chunk_buckets", "--max_token_length", "150"),
)


@pytest.mark.parametrize(("script", "flags", "waits"), CASES.values(), ids=CASES)
def test_no_step_waits_and_the_losses_are_upstream_s(train, monkeypatch, script, flags, waits):  # noqa: F811
    monkeypatch.setenv("COUNT_WAITS", "1")
    upstream = train("unpatched", script, *flags, steps=4)[1]
    fast = train("module", script, *flags, "--speed", "syncs", steps=4)[1]
    assert sum(number for *_, number in upstream["waits"]) == waits
    assert fast["waits"] == []
    if "--min_snr_gamma" not in flags:  # else our weights, in float32 of float64
        assert fast["losses"] == upstream["losses"]


@pytest.mark.parametrize("script", ["sdxl_train.py", "sdxl_train_network.py"])
def test_with_other_fixes_the_losses_are_theirs(train, script):  # noqa: F811
    split = "--validation_split" if "network" in script else "--heldout_split"
    flags = (*FIXES, "--heldout_steps", "2", split, "0.35")
    flags += ("--network_train_unet_only", "--validation_seed", "1") if "network" in script else ()
    plain, fast = (train("module", script, *flags, *more)[1] for more in ((), ("--speed", "syncs")))
    assert fast["losses"] == plain["losses"]


@pytest.mark.slow
def test_two_processes_train_and_log_as_without(train, tmp_path, monkeypatch):  # noqa: F811
    """Each rank its own losses, the main one upstream's log; with fused but rounding. sdxl_train.py alone:
    upstream's network trainer does not start with two processes on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    logs, found = tmp_path / "logs", {}
    flags = ("--logging_dir", str(logs), "--log_with", "tensorboard", "--ddp_timeout", "5")
    for speed in ((), ("--speed", "syncs"), ("--speed", "syncs,fused")):
        main = train([sys.executable, *TWO, "module"], "sdxl_train.py", *flags, *speed, steps=4)[1]
        other = json.loads((tmp_path / "trace.json.1").read_text())
        weights = load_file(tmp_path / "out" / "out.safetensors")
        found[speed] = [trace["losses"] for trace in (main, other)], logged(logs), weights
        shutil.rmtree(logs)
    (losses, log, weights), fast, fused = found.values()
    assert len(losses[0]) == 4 and losses[0] != losses[1]
    assert list(log["loss"].values()) == pytest.approx(losses[0], rel=1e-6)
    assert fast[:2] == (losses, log)
    for name, tensor in weights.items():
        assert torch.equal(fast[2][name], tensor) and torch.allclose(fused[2][name], tensor, atol=2e-5)
    for mine, theirs in zip(fused[0], losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert fused[1]["loss"] == pytest.approx(log["loss"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_block_is_made_once_for_each_width(lora):
    """By torch's tracing alone, without a compiler: the same operations, so the same bits."""
    sys.path.insert(0, str(checkouts.first()))
    import library.sdxl_original_unet as unet
    import library.train_util  # noqa: F401
    from networks.lora import LoRAModule
    from torch._dynamo.testing import CompileCounterWithBackend

    from sdxl_fixes.kohya import speed

    torch.manual_seed(0)
    parts = torch.nn.ModuleList(
        unet.Transformer2DModel(
            2, width // 2, width, 48, use_linear_projection=True, num_transformer_layers=3
        )
        for width in (64, 64, 128)
    )
    linears = [part for part in parts.modules() if type(part) is torch.nn.Linear]
    for number, linear in enumerate(linears if lora else ()):
        made = LoRAModule(f"l{number}", linear, 1.0, 4, 4)
        made.apply_to()
        torch.nn.init.normal_(made.lora_up.weight)
    for block in parts.modules():
        block.gradient_checkpointing = True
    context, seen = torch.randn(2, 77, 48), []
    samples = [torch.randn(2, part.in_channels, 4, 4) for part in parts]
    plain, counter = unet.BasicTransformerBlock.forward_body, CompileCounterWithBackend("eager")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "BACKEND", counter)
        for body in (plain, speed._compile(plain)):
            patched.setattr(unet.BasicTransformerBlock, "forward_body", lambda *x, body=body: body(*x))
            inputs = [sample.clone().requires_grad_() for sample in samples]
            for part, sample in zip(parts.train(), inputs, strict=True):
                part(sample, context).square().sum().backward()
            seen.append([sample.grad for sample in inputs])
    assert counter.frame_count == 4  # two widths, without and with gradients
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
