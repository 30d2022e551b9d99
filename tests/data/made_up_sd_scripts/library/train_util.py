"""What moved away is still found here by who asks; the scripts do not."""

from library.args import read_config_from_file, verify_training_args
from library.dataset import collator_class
from library.loss import conditional_loss, get_huber_threshold_if_needed, get_noise_noisy_latents_and_timesteps, get_timesteps
from library.model_io import get_sai_model_spec
from library.sampling import get_my_scheduler, sample_images_common
