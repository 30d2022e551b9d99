"""Made up for tests: the names and parameters of sd-scripts' functions, with bodies of our own."""

from torch.nn.functional import interpolate


def add_custom_train_arguments(parser, support_weighted_captions=True):
    parser.add_argument("--min_snr_gamma", type=float)
    parser.add_argument("--debiased_estimation_loss", action="store_true")
    parser.add_argument("--scale_v_pred_loss_like_noise_pred", action="store_true")
    parser.add_argument("--v_pred_like_loss", type=float)
    if support_weighted_captions:
        parser.add_argument("--weighted_captions", action="store_true")


def prepare_scheduler_for_custom_training(noise_scheduler, device):
    if not hasattr(noise_scheduler, "all_snr"):
        abar = noise_scheduler.alphas_cumprod
        noise_scheduler.all_snr = (abar / (1 - abar)).to(device)


def fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler):
    root = noise_scheduler.alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    noise_scheduler.alphas_cumprod = root**2


def apply_snr_weight(loss, timesteps, noise_scheduler, gamma, v_prediction=False):
    snr = noise_scheduler.all_snr[timesteps]
    return loss * snr.clamp(max=gamma) / (snr + 1 if v_prediction else snr)


def scale_v_prediction_loss_like_noise_prediction(loss, timesteps, noise_scheduler):
    snr = noise_scheduler.all_snr[timesteps].clamp(max=1000)
    return loss * snr / (snr + 1)


def add_v_prediction_like_loss(loss, timesteps, noise_scheduler, v_pred_like_loss):
    snr = noise_scheduler.all_snr[timesteps].clamp(max=1000)
    return loss + loss * (snr + 1) / snr * v_pred_like_loss


def apply_debiased_estimation(loss, timesteps, noise_scheduler, v_prediction=False):
    snr = noise_scheduler.all_snr[timesteps].clamp(max=1000)
    return loss / (snr + 1 if v_prediction else snr.sqrt())


def apply_masked_loss(loss, batch):
    if batch.get("alpha_masks") is None:
        return loss
    return loss * interpolate(batch["alpha_masks"].unsqueeze(1), size=loss.shape[2:], mode="area")
