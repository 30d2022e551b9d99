#!/usr/bin/env bash
# Sets up everything and passes the tests: tests/run.sh [newest|kohya|lowest], a set of tested versions in constraints/.
set -euo pipefail
cd "$(dirname "$0")/.."
versions=${1:-newest}
[ -f "constraints/$versions.txt" ] || { echo "tests/run.sh: no constraints/$versions.txt: expected newest, kohya or lowest" >&2; exit 2; }
python=.venv-$versions/bin/python
[ -x "$python" ] || python3 -m venv ".venv-$versions"
"$python" -m pip install -q --disable-pip-version-check -c "constraints/$versions.txt" -e ".[test]"
chosen=()
if [ "$versions" = lowest ]; then
  # the core, what trainers share, and the diffusers adapter: sd-scripts pins newer releases
  chosen=(tests/test_[!adekpr]*.py tests/test_{aspects,pipelines,prediction,prompts,public_face}.py
    tests/trainers tests/diffusers tests/model_files tests/commands)
  # stock classes of these releases have no flow_prediction, rescale_betas_zero_snr, sigma lists, flow schedulers,
  # final_sigmas_type (UniPC's last sigma is not 0), and there is no Flux
  lacking="test_a_named_schedule_in_trailing_steps_is_diffusers test_custom_timesteps_and_their_errors
    test_wrong_arguments_are_one_sentence test_fix_scheduler_keeps_class_and_settings
    test_a_scheduler_that_obeys_the_rescale_flag test_a_scheduler_without_betas_is_refused
    test_the_config_beside_is_what_stock_diffusers_samples
    test_options_of_unipc_give_numbers_or_are_refused_at_once test_rectified_flow_from_text_and_from_an_image
    test_the_saved_folder_and_lora_say_flow_to_stock_diffusers test_what_has_no_schedule_is_named
    test_flow_matching_configs_that_diffusers_saved_are_read"
  takes=test_every_sampler_takes_a_model_that_predicts_the_image
  chosen+=(-k "not ((dpmpp or unipc) and flow_prediction or unipc and $takes$(printf ' or %s' $lacking))")
fi
exec "$python" -m pytest "${chosen[@]}" "${@:2}"
