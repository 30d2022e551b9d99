"""The frozen base beside a network that is trained: diffusers' own U-Net in full, under peft's LoRA, and
under networks that replace the layers' forward as kohya's do."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FixError
from sdxl_fixes.teacher import Teacher
from sdxl_fixes.trainers.keep import Keep
from sdxl_fixes.trainers.step import StepState

SDXL = NoiseSchedule.sdxl()
ZTSNR = SDXL.zero_terminal_snr()


def keep(share=1.0):
    return Keep(Teacher(SDXL, "epsilon", ZTSNR, "v_prediction", share), Sampling(SDXL, "epsilon"))


def unet(train=True):
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return made.requires_grad_(train).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return x0, noise, torch.tensor([10, 500, 850]), torch.randn(3, 5, 8, generator=generator)


def asked(teaching, network):
    """The state after a step's noising and call, and what the base must have answered by the papers: v of its
    epsilon for the same noise-to-signal ratio, float64."""
    x0, noise, index, text = batch()
    step = StepState(timesteps=index)
    teaching.noised(step, x0, noise, index)
    teaching.called(step, type(network).forward, network, torch.zeros_like(x0), text, return_dict=False)
    return step


def by_the_papers(network):
    """The base's v, from its epsilon told the timestep whose sigma is the new schedule's, float64."""
    x0, noise, index, text = batch()
    sigma = torch.from_numpy(ZTSNR.sigmas.copy())[index]
    log = torch.from_numpy(SDXL.log_sigmas.copy())
    low = torch.searchsorted(log, sigma.log()).clamp(1, 999) - 1
    told = low + (sigma.log() - log[low]) / (log[low + 1] - log[low])
    alpha = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
    s = alpha * sigma.reshape(-1, 1, 1, 1)
    x = alpha * x0 + s * noise
    with torch.no_grad():
        epsilon = network(x.float(), told.float(), text).sample.double()
    return (epsilon - s * x) / alpha


def agrees(answer, expected):
    torch.testing.assert_close(answer.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_full_finetuning_is_taught_by_the_weights_before_its_first_step():
    network, teaching = unet(), keep()
    expected = by_the_papers(network.eval())
    network.train()
    agrees(asked(teaching, network).answer, expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    step = asked(teaching, network)
    agrees(step.answer, expected)
    assert not step.answer.requires_grad and all(p.grad is None for p in network.parameters())
    assert float((by_the_papers(network) - expected).abs().max()) > 1e-2  # the trained one moved


def test_the_copy_is_in_the_precision_of_the_training(monkeypatch):
    from accelerate.state import AcceleratorState

    network, teaching = unet(), keep()
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"x": 1})
    monkeypatch.setattr(AcceleratorState, "__init__", lambda self: None)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "bf16", raising=False)
    monkeypatch.setattr(AcceleratorState, "distributed_type", "NO", raising=False)
    hooked = network.conv_in.weight.register_post_accumulate_grad_hook(lambda p: None)
    expected = by_the_papers(network.eval())
    with torch.autocast("cpu", torch.bfloat16):
        answer = asked(teaching, network.train()).answer
    copied = dict(teaching._network.named_parameters())
    for name, parameter in network.named_parameters():
        assert copied[name].dtype == torch.bfloat16 and not copied[name].requires_grad
        assert torch.equal(copied[name], parameter.bfloat16())
    assert not copied["conv_in.weight"]._post_accumulate_grad_hooks and not teaching._network.training
    assert float((answer - expected).abs().max()) < 0.5 and not torch.equal(answer.double(), expected)
    hooked.remove()
    monkeypatch.setattr(AcceleratorState, "distributed_type", "FSDP", raising=False)
    with pytest.raises(FixError, match="--keep_base needs the whole U-Net in every process"):
        asked(keep(), network)


class Low(torch.nn.Module):
    """What kohya's networks and LyCORIS do to a layer: its forward is a method of a module elsewhere."""

    def __init__(self, layer):
        super().__init__()
        self.down, self.up = (
            torch.nn.Linear(layer.in_features, 2, bias=False),
            torch.nn.Linear(2, layer.out_features),
        )
        self.calls, self.original = 0, layer.forward
        layer.forward = self.forward

    def forward(self, x, *args):
        self.calls += 1
        return self.original(x) + self.up(self.down(torch.nn.functional.dropout(x, 0.1)))


def with_forward(network):
    attention = network.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    return [Low(layer) for layer in (attention.to_q, attention.to_k, attention.to_v)]


def with_peft(network):
    peft = pytest.importorskip("peft")
    network.add_adapter(
        peft.LoraConfig(
            r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, use_dora=True, lora_dropout=0.1
        )
    )
    return [module for module in network.modules() if hasattr(module, "get_base_layer")]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapt", [with_forward, with_peft])
def test_beside_a_lora_the_base_is_the_u_net_without_it(adapt, checkpointing):
    network = unet(train=False)
    expected = by_the_papers(network)
    layers = adapt(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    before = [dict(module.__dict__) for module in network.modules()]
    teaching = keep()
    state = torch.get_rng_state()
    agrees(asked(teaching, network).answer, expected)
    assert torch.equal(state, torch.get_rng_state())  # no dropout of the LoRA's was drawn
    for module, had in zip(network.modules(), before, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[key] is value for key, value in had.items())
    if layers and isinstance(layers[0], Low):
        assert [layer.calls for layer in layers] == [0] * 3
    assert float((by_the_papers(network) - expected).abs().max()) > 1e-3  # and it is there again


def test_recomputed_activations_are_the_lora_s():
    """Gradients with checkpointing are those without, though the base was asked in between."""

    def gradients(checkpointing):
        network = unet(train=False)
        torch.manual_seed(2)
        layers = with_forward(network)
        if checkpointing:
            network.enable_gradient_checkpointing()
        x0, noise, index, text = batch()
        teaching, step = keep(), StepState(timesteps=index)
        teaching.noised(step, x0, noise, index)
        teaching.called(step, type(network).forward, network, x0, text)
        torch.manual_seed(3)
        prediction = network(x0, index, text).sample
        goal = teaching.target(step, prediction, torch.zeros_like(prediction))
        (prediction - goal).square().mean().backward()
        return [layer.up.weight.grad for layer in layers]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)
        assert float(plain.abs().max()) > 0


def test_under_autocast_the_lora_keeps_its_gradients():
    """A LoRA that is run under no_grad within one autocast has its cast weights cached without a history:
    ours is not run."""
    network = unet(train=False)
    layers = with_forward(network)
    x0, noise, index, text = batch()
    teaching, step = keep(), StepState(timesteps=index)
    with torch.autocast("cpu", torch.bfloat16):
        teaching.noised(step, x0, noise, index)
        teaching.called(step, type(network).forward, network, x0, text)
        network(x0, index, text).sample.float().square().mean().backward()
    assert all(layer.down.weight.grad is not None for layer in layers)


def test_each_half_of_a_split_batch_has_its_own_target():
    network, teaching = unet(), keep(0.5)
    x0, noise, index, text = (part.repeat(2, *[1] * (part.ndim - 1)) for part in batch())
    index = torch.tensor([10, 20, 30, 700, 800, 950])
    step = StepState(timesteps=index)
    teaching.noised(step, x0, noise, index)
    teaching.called(step, type(network).forward, network, x0, text)
    prediction, data = network(x0, index, text).sample, torch.randn(6, 4, 8, 8)
    whole = teaching.target(step, prediction, data)
    halves = [
        teaching.target(step, part, half)
        for part, half in zip(prediction.chunk(2), data.chunk(2), strict=True)
    ]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(whole[5], data[5])  # above the base's terminal sigma
    torch.testing.assert_close(whole[:5], 0.5 * (data + step.answer)[:5])


def test_only_the_call_that_is_trained_asks_the_base():
    network, teaching = unet(), keep()
    x0, noise, index, text = batch()
    step = StepState(timesteps=index)
    teaching.noised(step, x0, noise, index)
    with torch.no_grad():
        teaching.called(step, type(network).forward, network, x0, text)
    teaching.called(step, type(network).forward, network, x0, text)  # nothing was noised for it
    assert step.answer is None and torch.equal(teaching.target(step, x0, noise), noise)
    teaching.noised(step, x0, noise, index)
    with pytest.raises(FixError, match=r"noised are \[3, 4, 8, 8\] and the U-Net is given \[3, 9, 8, 8\]"):
        teaching.called(step, type(network).forward, network, torch.zeros(3, 9, 8, 8), text)
    with pytest.raises(FixError, match="neither the U-Net nor a network of its layers is trained"):
        keep().start(unet(train=False))


def test_a_resumed_state_is_not_the_base():
    network = unet()
    expected = by_the_papers(network.eval())

    class Accelerator:
        _models = (torch.nn.Linear(1, 1), network)

        def unwrap_model(self, model):
            return model

    teaching = keep()
    teaching.loading(Accelerator())
    network.load_state_dict({k: v + 0.1 for k, v in copy.deepcopy(network.state_dict()).items()})
    agrees(asked(teaching, network.train()).answer, expected)
