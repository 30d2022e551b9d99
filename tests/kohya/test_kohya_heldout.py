"""Held-out pictures of the made-up sd-scripts: what cannot be is refused before anything is trained."""

import pytest
from made_up_trainer import build, forget, run


@pytest.fixture
def trainer(tmp_path):
    yield build(tmp_path)
    forget()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--heldout_split", "1.5"), "--heldout_split 1.5: expected a share in (0, 1)"),
        (("--heldout_split", "0.5", "--heldout_dir", "somewhere"), "--heldout_split needs --heldout_steps"),
    ],
)
def test_a_split_that_cannot_be_is_one_sentence(trainer, capfd, flags, said):
    with pytest.raises(SystemExit):
        run(trainer, "sdxl_train.py", "--heldout_steps", "1", *flags)
    assert said in "".join(capfd.readouterr()) and not (trainer / "out" / "steps.pt").exists()
