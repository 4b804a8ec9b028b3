"""scheduler_config.json: is the model trained on the noise schedule that we sample with?

Which sampler the file names does not matter: any of them may sample a model. What counts is what
the model was trained with, and that is fixed here (``hcma_fast.schedule``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.json_files import read_object, shorten
from hcma_fast.schedule import BETA_END, BETA_START, STEPS_OFFSET, TRAIN_STEPS, alphas_cumprod

SCHEDULER_FILE = "scheduler/scheduler_config.json"
#: classes of diffusers that sample models of discrete noise prediction
_CLASSES = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep"),
        *("DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete"),
        *("EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
        *("LMSDiscrete", "PNDM", "SASolver", "UniPCMultistep"),
    )
}
#: what each key means where the file does not have it, and what our schedule does
_VALUES: dict[str, tuple[object, object]] = {
    "prediction_type": ("epsilon", "epsilon"),
    "num_train_timesteps": (1000, TRAIN_STEPS),
    "beta_start": (0.0001, BETA_START),
    "beta_end": (0.02, BETA_END),
    "beta_schedule": ("linear", "scaled_linear"),
    "rescale_betas_zero_snr": (False, False),
    "thresholding": (False, False),
    # old files lack it, and diffusers' pipelines of SD 1.x use 1 in its place
    "steps_offset": (STEPS_OFFSET, STEPS_OFFSET),
}
_BETAS = ("beta_start", "beta_end", "beta_schedule")
_TOLERANCE = 1e-6


def check_scheduler(folder: Path) -> None:
    """Compare the scheduler's config of a model folder, if it has one, with our schedule.

    Raises:
        WeightsError: names the first value that our schedule does not do, or the file is damaged.
    """
    path = folder / SCHEDULER_FILE
    if not path.exists() and not path.is_symlink():
        return
    config = read_object(path)
    name = config.get("_class_name")
    if name is not None and (not isinstance(name, str) or name not in _CLASSES):
        raise _refused(path, "_class_name", name, "a scheduler of Stable Diffusion 1.x")
    trained = config.get("trained_betas")
    if trained is not None and not _our_betas(trained):
        raise _refused(path, "trained_betas", trained, "null")
    for key, (default, ours) in _VALUES.items():
        if trained is not None and key in _BETAS:
            continue
        value = config.get(key)
        value = default if value is None else value
        if not _same(value, ours):
            raise _refused(path, key, value, repr(ours), absent=key not in config)


def _same(value: Any, ours: object) -> bool:
    if isinstance(ours, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isclose(value, ours, rel_tol=_TOLERANCE)
    return type(value) is type(ours) and value == ours


def _our_betas(trained: object) -> bool:
    if not isinstance(trained, list) or len(trained) != TRAIN_STEPS:
        return False
    abar, expected = 1.0, alphas_cumprod().tolist()
    for beta, cumulated in zip(trained, expected, strict=True):
        if not isinstance(beta, int | float) or not 0 < beta < 1:
            return False
        abar *= 1 - beta
        if not math.isclose(abar, cumulated, rel_tol=1e-4):
            return False
    return True


def _refused(
    path: Path, key: str, value: object, ours: str, *, absent: bool = False
) -> WeightsError:
    meant = ", the default of a file without it" if absent else ""
    return WeightsError(
        f"the model's {key} is {shorten(value)}{meant}, and hcma-fast samples with {ours} only",
        value=str(path),
        remedy="Use a model that was trained like Stable Diffusion 1.x. If this one was, and the "
        "file is wrong, correct or delete it.",
    )
