"""The average of the trained weights: against its closed form in float64, and everything around it."""

import copy
import shutil

import pytest
import torch
from closed_form import average as closed_form
from test_stable_loss import Process

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.ema import FILE, Average


class Trainer(Process):
    """A small training with two groups of parameters."""

    def __init__(self, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
        super().__init__(self.model)
        groups = [{"params": list(layer.parameters())} for layer in self.model]
        self._optimizers = [torch.optim.SGD(group["params"], lr=0.02) for group in groups]

    def train(self, average, steps):
        recorded = []
        for _ in range(steps):
            loss = self.model(torch.ones(1, 3, dtype=self.model[0].weight.dtype)).square().sum()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update(self)
            recorded.append(weights(self.model))
        return recorded


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def averaged(average, model):
    with average.applied():
        return weights(model)


@pytest.mark.parametrize("decay", [0.25, 0.99])
def test_the_average_is_the_closed_form_of_the_recorded_weights(decay):
    trainer, average = Trainer(), Average(decay)
    recorded = trainer.train(average, 12)
    assert torch.allclose(averaged(average, trainer.model).double(), closed_form(recorded, decay), rtol=1e-5)
    assert not torch.allclose(averaged(average, trainer.model), recorded[-1], rtol=1e-2)


def test_half_precision_is_averaged_in_float32():
    trainer, average = Trainer(torch.bfloat16), Average(0.999)
    recorded = trainer.train(average, 30)
    found = torch.cat([average.of(p.detach()).flatten() for p in trainer.model.parameters()])
    exact = closed_form(recorded, 0.999)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.float().bfloat16())
    assert average._model.shadow_params[0].dtype == torch.float32


def test_the_training_is_the_same_to_the_last_bit():
    average = Average(0.9)
    trainer, alone = Trainer(), Trainer()
    trainer.train(average, 3)
    with pytest.raises(RuntimeError, match="something"), average.applied():
        raise RuntimeError("something")
    with average.applied():
        pass
    trainer.train(average, 3)
    alone.train(Average(0.9), 6)
    assert torch.equal(weights(trainer.model), weights(alone.model))


def test_a_resumed_average_goes_on_exactly(tmp_path):
    whole, first, again = (Trainer() for _ in range(3))
    average, early, late = (Average(0.9) for _ in range(3))
    whole.train(average, 9)
    first.train(early, 4)
    early.save(tmp_path)
    again.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    late.load(tmp_path)
    again.train(late, 5)
    assert torch.equal(averaged(late, again.model), averaged(average, whole.model))


def test_a_state_without_an_average_is_said(tmp_path, caplog):
    Average(0.9).load(tmp_path)
    assert "has no average, so it begins anew" in caplog.text


def test_what_cannot_be_averaged_is_one_sentence(tmp_path):
    trainer, average = Trainer(), Average(0.9)
    trainer.train(average, 1)
    with pytest.raises(FixError, match=r"a tensor of shape \[2\] is saved that is no trained weight"):
        average.of(torch.zeros(2))
    (tmp_path / FILE).write_bytes(b"no state")
    with pytest.raises(FixError, match=f"cannot resume from .*{FILE} .*: resume from another state"):
        Average(0.9).load(tmp_path)
    average.save(tmp_path)
    other, resumed = Trainer(), Average(0.9)
    other._optimizers.pop()
    resumed.load(tmp_path)
    with pytest.raises(FixError, match=r"of other weights \(4 tensors, here are 2 trained\)"):
        resumed.update(other)
    for kind in ("FSDP", "DEEPSPEED"):
        other.distributed_type = kind
        with pytest.raises(FixError, match=f"--ema_decay needs the whole weights .* {kind} deals them out"):
            Average(0.9).update(other)


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_an_average_goes_with_the_model_that_the_trainer_removes(tmp_path, suffix):
    average = Average(0.9)
    models = [tmp_path / f"m-{n}{suffix}" for n in range(3)]

    def save(path):
        if suffix:
            path.touch()
        else:  # diffusers' folders
            (path / "unet").mkdir(parents=True)

    for model in models:
        save(model)
        average.tidy()
        save(average.beside(model))
        for old in models[: models.index(model) - 1 if model != models[0] else 0]:
            old.unlink(missing_ok=True) if suffix else shutil.rmtree(old, ignore_errors=True)
    average.tidy()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(f"m-{n}{end}{suffix}" for n in (1, 2) for end in ("-ema", ""))
