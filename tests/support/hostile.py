"""Records, scheduler configs and JSON that are damaged or hostile, made by hypothesis."""

import copy
import math

from hypothesis import strategies as st

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.schedule import EXACT_KEY

SHORT = NoiseSchedule.scaled_linear(0.05, 0.3, 6)
# one of every kind of recipe, short, so that a mutation meets the recipe as often as the betas
RECORDS = [
    schedule.to_record()
    for schedule in (
        SHORT,
        NoiseSchedule.linear(0.1, 0.4, 5),
        NoiseSchedule.cosine(num_timesteps=5),
        NoiseSchedule.flow(3, 5),
        SHORT.zero_terminal_snr(),
        SHORT.with_terminal_sigma(9, "tail").with_terminal_sigma(math.inf, "last"),
        NoiseSchedule.cosine(num_timesteps=5).with_terminal_sigma(300),
        NoiseSchedule.from_betas([0.1, 0.2, 1.0]),
        NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1]).zero_terminal_snr(),
    )
]
CONFIGS = [
    {**SHORT.to_config("v_prediction"), "_class_name": "DDIMScheduler"},
    {**SHORT.to_config("v_prediction"), "rescale_betas_zero_snr": True},
    NoiseSchedule.from_betas([0.1, 0.2, 0.3]).to_config("epsilon") | {EXACT_KEY: {"zero_terminal_snr": True}},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 5},
    {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 2.5,
        "num_train_timesteps": 9,
    },
]
ODD = st.sampled_from(
    [
        math.nan,
        math.inf,
        -1,
        0,
        1,
        1.0,
        True,
        10**400,
        -(10**400),
        "inf",
        "nan",
        "1",
        "",
        None,
        [],
        {},
        [[0.1]],
        1e308,
        5e-324,
    ]
)
JSON = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
JSON = JSON.map(copy.deepcopy)  # what is drawn is changed later


def places(content):
    """Every container in ``content`` with every key or index of it."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield content, key
        yield from places(value)


@st.composite
def mutations(draw, originals):
    """One of ``originals`` with one to three values replaced, taken away, put in anew, or exchanged with
    another's."""
    content = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        where, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["replace", "replace", "drop", "add", "mix"]))
        if action == "drop":
            del where[key]
        elif action == "add" and isinstance(where, dict):
            where[
                draw(st.sampled_from(["make", "change", "start", "method", "shift"]) | st.text(max_size=3))
            ] = draw(JSON)
        elif action == "mix":
            others = [other[name] for original in originals for other, name in places(original)]
            where[key] = copy.deepcopy(draw(st.sampled_from(others)))
        else:
            where[key] = draw(JSON)
    return content
