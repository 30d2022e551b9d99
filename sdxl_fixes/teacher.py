"""Conversion that keeps what the model knows: the base model, frozen, teaches its own predictions in the new
parameterisation, as far as it knows any; data teach the rest.

The base is asked at the same noise-to-signal ratio, in its own scaling and by its own timestep:

    x_base = alpha_base x0 + sigma_base noise        sigma_base/alpha_base = sigma_new/alpha_new

and what it answers is turned into the new target exactly, for every prediction is a combination of sample and
any other (prediction.py):

    target = a x_base + b network_base(x_base, t_base)

The base's answer is the mean of what the data say under that noise, so it teaches the same with less variance
as far as the base is right, and the base's own function where it is not. Above the base's terminal sigma, and
below its first, the base was never trained: there the target is the data's.

No weights turn an epsilon network into a v network: v = a x + b epsilon with a and b that depend on the
timestep, which the last layer does not see.
"""

from __future__ import annotations

import numpy as np
import torch

from sdxl_fixes import prediction as predictions
from sdxl_fixes.schedule import Array, NoiseSchedule
from sdxl_fixes.tensors import Table, append_dims


class Teacher:
    """What a base model that was trained for (``base``, ``base_type``) says about training for (``schedule``,
    ``prediction_type``).

    share    of the target that is the base's, in (0, 1]; the rest is the data's

    ``known`` (bool, [T]) tells the timesteps of ``schedule`` whose sigma the base knows. Lookups are float32
    and wait for no device.
    """

    def __init__(
        self,
        base: NoiseSchedule,
        base_type: str,
        schedule: NoiseSchedule,
        prediction_type: str,
        share: float = 1.0,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share:g}")
        self.base, self.base_type, self.share = base, predictions.check_prediction_type(base_type), share
        flow, new_flow = (kind == "flow_prediction" for kind in (base_type, prediction_type))
        known = ~np.isnan(base.levels_at(schedule.sigmas)[2])
        if base_type == "epsilon":  # which says nothing about the image at SNR 0
            known &= np.isfinite(schedule.sigmas)
        if not known.any():
            raise ValueError(
                f"the base knows sigma {base.sigmas[0]:.4g} to {base.terminal_sigma:.4g}, the schedule has "
                f"none of them but {schedule.sigmas[0]:.4g} to {schedule.terminal_sigma:.4g}"
            )
        # elsewhere the answer counts for nothing: it is asked at the last that is known
        alpha, sigma, told = base.levels_at(
            np.where(known, schedule.sigmas, schedule.sigmas[known][-1]), flow
        )
        a, b = _combination((base_type, alpha, sigma), (prediction_type, *schedule.levels(new_flow)[:2]))
        self.known = known
        self._alpha, self._sigma, self._told = Table(alpha), Table(sigma), Table(told)
        self._a, self._b, self._share = Table(a), Table(b), Table(share * known)

    def sample(
        self, x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the base's network is given for latents ``x0`` and their ``noise`` (both [B, ...]) at rows
        ``index`` of the new schedule: noisy samples [B, ...], float32 or better, and timesteps [B], float32.

        The noise is without an input perturbation, though the student sees one: the mean of the answer over
        what the student cannot tell apart is then the mean of the data's target, E[E[y|x]|x'] = E[y|x'], for
        the perturbed sample x' tells nothing about y that x does not."""
        alpha, sigma = self._alpha(index, x0.ndim), self._sigma(index, x0.ndim)
        return predictions.add_noise(x0, noise, alpha, sigma), self._told(index)

    def answer(self, sample: torch.Tensor, output: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The new network's target by the base's ``output`` for the ``sample`` of :meth:`sample`, [B, ...],
        float32 or better; of no meaning where the base knows nothing."""
        precise = torch.promote_types(sample.dtype, torch.float32)
        a, b = self._a(index, sample.ndim), self._b(index, sample.ndim)
        return a * sample.to(precise) + b * output.to(precise)

    def mix(self, answer: torch.Tensor, data: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The target to train: the share of the base's ``answer`` where the base knows any, else the
        ``data``'s own (both [B, ...]). For l2 its gradient is that of the two losses in these shares."""
        share = append_dims(self._share(index), data.ndim)
        return torch.lerp(data.to(answer.dtype), answer, share.to(answer.dtype))


def _combination(base: tuple[str, Array, Array], new: tuple[str, Array, Array]) -> tuple[Array, Array]:
    """a and b, [T], of the target in terms of the base's sample and output; each is of a prediction type and
    its levels alpha and sigma. They are what prediction.py makes of the sample 1 and the output 0, and the
    other way round."""
    one = torch.ones(len(base[1]), dtype=torch.float64)
    levels, new_levels = (tuple(map(torch.tensor, side[1:])) for side in (base, new))

    def target(sample: torch.Tensor, output: torch.Tensor) -> Array:
        x0, noise = predictions.x0_and_noise(output, base[0], sample, *levels)
        return np.asarray(predictions.target(new[0], x0, noise, *new_levels))

    return target(one, 0 * one), target(0 * one, one)
