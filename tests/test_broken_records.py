"""Records and scheduler configs that are damaged, hostile or untrue: always one ValueError, in one
sentence."""

import json
import math

import pytest
from hostile import CONFIGS, JSON, RECORDS, mutations
from hypothesis import given
from hypothesis import strategies as st

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.schedule import EXACT_KEY

SDXL = NoiseSchedule.sdxl()


def refused(make, content):
    """The sentence that ``content`` is refused with; None if it is accepted."""
    try:
        made = make(content)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return str(error)
    assert isinstance(made, NoiseSchedule)
    return None


@given(mutations(RECORDS) | JSON)
def test_a_mutated_record_is_refused_in_a_sentence_or_true(record):
    if refused(NoiseSchedule.from_record, record) is None:
        schedule = NoiseSchedule.from_record(record)
        assert (
            NoiseSchedule.from_json(schedule.to_json()) == schedule
            and schedule.betas.tolist() == record["betas"]
        )
        repr(schedule)


@given(mutations(CONFIGS) | JSON)
def test_a_mutated_scheduler_config_is_refused_in_a_sentence_or_read(config):
    refused(NoiseSchedule.from_config, config)


@given(st.text() | JSON.map(json.dumps))
def test_any_text_is_refused_or_a_record(text):
    refused(NoiseSchedule.from_json, text)


def test_deeply_nested_json_is_refused_in_a_sentence():
    assert "not a schedule record" in refused(NoiseSchedule.from_json, "[" * 100_000)


def record(schedule=SDXL, **changes):
    return schedule.to_record() | changes


LINEAR = {"make": "linear", "beta_start": 0.0001, "beta_end": 0.02}
CASES = {
    "linear that lacks its ends": (
        record(recipe=[{"make": "linear"}]),
        "step 1 of the recipe, linear, lacks beta_start",
    ),
    "flow that lacks its shift": (
        record(recipe=[{"make": "flow"}]),
        "step 1 of the recipe, flow, lacks shift",
    ),
    "a list for a name": (
        record(recipe=[{"make": ["x"]}]),
        'must be an object whose "make" is one of linear',
    ),
    "an unknown maker": (
        record(recipe=[{"make": "sigmoid"}]),
        "is one of linear, scaled_linear, cosine, flow",
    ),
    "no list": (record(recipe={"make": "betas"}), "its recipe must be a list of steps"),
    "no steps": (record(recipe=[]), "its recipe must be a list of steps, at least one"),
    "a step that is no object": (
        record(recipe=[SDXL.to_record()["recipe"][0], 3]),
        "step 2 of the recipe must be an object",
    ),
    "a make too many": (
        record(recipe=[{"make": "betas"}, {"make": "betas"}]),
        'step 2 .* whose "change" is one of zero_terminal_snr',
    ),
    "a string for a number": (
        record(recipe=[LINEAR | {"beta_end": "0.02"}]),
        "beta_end '0.02': expected a number",
    ),
    "timesteps, which the betas tell": (
        record(recipe=[LINEAR | {"num_timesteps": 77}]),
        "linear, has 'num_timesteps': expected only make, beta_start, beta_end",
    ),
    "a start outside the table": (
        record(
            NoiseSchedule.from_betas([0.1, 0.2, 0.3]).with_terminal_sigma(9, "tail"),
            recipe=[
                {"make": "betas"},
                {"change": "terminal_sigma", "sigma": 9, "method": "tail", "start": 2},
            ],
        ),
        r"start=2\): expected a start in 0..1",
    ),
    "a key too many": (
        record(recipe=[{"make": "betas", "s": 3}]),
        "step 1 of the recipe, betas, has 's': expected only make",
    ),
    "betas of NaN": (
        record(betas=[0.1, math.nan]),
        r"betas must be a list of numbers, but betas\[1\] is nan",
    ),
    "betas of truth": (record(betas=[0.1, True]), r"but betas\[1\] is True"),
    "betas too large for a float": (record(betas=[0.1, 10**400]), r"but betas\[1\] is 1000"),
    "another end": (record(terminal_sigma=300), "its terminal_sigma is 300, its betas end at 14.6146"),
    "no version": (record(version=None), "its version is None, expected 1"),
    "another law": (record(NoiseSchedule.cosine(), recipe=[LINEAR]), "betas are others"),
    "cosine over SDXL's betas": (
        record(recipe=NoiseSchedule.cosine().to_record()["recipe"]),
        "says cosine.*betas are others",
    ),
    "flow over SDXL's betas": (
        record(recipe=NoiseSchedule.flow().to_record()["recipe"]),
        "says flow.*betas are others",
    ),
    "flow of another shift": (
        record(NoiseSchedule.flow(3), recipe=NoiseSchedule.flow(2.9).to_record()["recipe"]),
        "betas are others",
    ),
    "zero terminal SNR over SDXL's betas": (
        record(recipe=[*SDXL.to_record()["recipe"], {"change": "zero_terminal_snr"}]),
        r"says scaled_linear.* zero_terminal_snr\(\), but its betas are others",
    ),
    "zero terminal SNR over any betas": (
        record(recipe=[{"make": "betas"}, {"change": "zero_terminal_snr"}]),
        r"says betas\(\) zero_terminal_snr\(\), but its betas are others",
    ),
    "a tail that starts elsewhere": (
        record(
            SDXL.with_terminal_sigma(300, "tail"),
            recipe=SDXL.with_terminal_sigma(300, "tail", start=900).to_record()["recipe"],
        ),
        "betas are others",
    ),
    "a sigma out of reach": (
        record(
            recipe=[*SDXL.to_record()["recipe"], {"change": "terminal_sigma", "sigma": -3, "method": "last"}]
        ),
        "terminal sigma must be above",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_record_is_told_with_what_to_do(case):
    content, sentence = CASES[case]
    with pytest.raises(ValueError, match=sentence) as caught:
        NoiseSchedule.from_record(json.loads(json.dumps(content)))
    assert str(caught.value).startswith("the schedule record is broken: ") and "make the record anew" in str(
        caught.value
    )


def test_a_recipe_reads_the_same_in_whatever_order_its_keys_come():
    text = json.dumps(SDXL.with_terminal_sigma(300, "tail").to_record(), sort_keys=True)
    assert repr(NoiseSchedule.from_json(text)) == repr(SDXL.with_terminal_sigma(300, "tail"))


def test_a_recipe_that_differs_in_the_last_bits_is_true():
    """Another machine's cosine."""
    content = NoiseSchedule.cosine().zero_terminal_snr().to_record()
    content["betas"][500] = math.nextafter(content["betas"][500], 1)
    assert NoiseSchedule.from_record(content).betas[500] == content["betas"][500]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "a scheduler config is an object of settings"),
        ({"beta_schedule": ["linear"]}, r"unknown beta_schedule \['linear'\]"),
        ({"beta_schedule": "linear", "beta_start": "0.1"}, "beta_start is '0.1': expected a number"),
        ({"beta_schedule": "linear", "beta_end": [0.1]}, r"beta_end is \[0.1\]: expected a number"),
        ({"beta_schedule": "linear", "beta_end": None}, "beta_end is None: expected a number"),
        (
            {"beta_schedule": "linear", "num_train_timesteps": "1000"},
            "num_train_timesteps is '1000': expected a whole number",
        ),
        (
            {"beta_schedule": "linear", "num_train_timesteps": 10**12},
            "num_train_timesteps is 10+: expected a whole number in 2..1000000",
        ),
        (
            {"beta_schedule": "linear", "rescale_betas_zero_snr": "false"},
            "rescale_betas_zero_snr is 'false': expected true or false",
        ),
        (
            {"trained_betas": [[0.1], [0.2, 0.3]], "num_train_timesteps": 2},
            "trained_betas must be one row of numbers",
        ),
        (
            {"trained_betas": ["0.1", "0.2"], "num_train_timesteps": 2},
            "trained_betas must be one row of numbers",
        ),
        ({"trained_betas": 3}, "trained_betas must be one row"),
        (
            {"trained_betas": [0.1, None], "num_train_timesteps": 2},
            "trained_betas must be one row of numbers",
        ),
        (
            {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2, EXACT_KEY: [1]},
            "_sdxl_fixes is .1.: expected an object",
        ),
        (
            {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2, EXACT_KEY: {"zero_terminal_snr": 1}},
            "zero_terminal_snr is 1: expected true or false",
        ),
    ],
)
def test_what_is_wrong_with_a_scheduler_config_is_told(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        NoiseSchedule.from_config(config)
