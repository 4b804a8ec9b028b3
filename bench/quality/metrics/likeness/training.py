"""Train the likeness judge, and measure how well it agrees with the labels.

It takes minutes to an hour on one core, and goes on where it stopped::

    python -m hcma_fast.bench.quality.metrics.likeness.training --out .runs/likeness

Of the labelled boxes it sees the half "train" alone: most of them train, the others choose the
thresholds. The half "test" measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from hcma_fast.bench.quality.metrics.judge.data import jitter
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.metrics.likeness.data import (
    Pair,
    Pairs,
    cut,
    may_be_mirrored,
    pixel_side,
    reference,
)
from hcma_fast.bench.quality.metrics.likeness.labels import LabelledBox, read_labelled
from hcma_fast.bench.quality.metrics.likeness.model import (
    ASSETS,
    CARD,
    WEIGHTS,
    LikenessCard,
    LikenessJudge,
    LikenessNet,
)
from hcma_fast.config import PRESETS
from hcma_fast.files import make_folder, write_whole
from hcma_fast.layout import Box
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.program import run_program
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.scenes_cache import draw_scenes
from hcma_fast.train.loop.loop import LoopConfig, run
from hcma_fast.train.tiny.vae import to_tensor

_SEED = 0
_SHARES = {"right": 1.0, "half": 0.25, "wrong": 0.0}
_VIEWS = 12
"""of each labelled box, its edges moved a little"""


def trains(item: LabelledBox) -> bool:
    """Four fifths of the pictures of the half "train" train; the others choose the threshold."""
    digest = hashlib.sha256(f"picture {item.picture}".encode()).digest()
    return item.half == "train" and digest[1] < 205


def _pairs_of(
    picture: NDArray[np.uint8], box: Box, phrase: str, *, right: float, edition: int = 1
) -> Iterator[Pair]:
    """A crop with its reference: in the facing that is more like it, or both of what is wrong."""
    crop = cut(picture, box)
    wanted = reference(edition, phrase, pixel_side(box, picture.shape[0]))
    facings = [wanted]
    if may_be_mirrored(edition, phrase):
        facings.append(np.ascontiguousarray(wanted[..., ::-1]))
    if right > 0:
        colours = crop.transpose(2, 0, 1) / 127.5 - 1
        distances = [np.abs((colours - facing[:3]) * facing[3:]).mean() for facing in facings]
        facings = [facings[int(np.argmin(distances))]]
    for facing in facings:
        yield Pair(crop, facing, right, bend=0.01)


def labelled_pairs() -> list[Pair]:
    """The boxes that train, several views of each."""
    found, pictures = read_labelled()
    pairs: list[Pair] = []
    rng = np.random.default_rng(14)
    for item in filter(trains, found.boxes):
        boxes = [item.box] + [jitter(rng, item.box, 0.08) for _ in range(_VIEWS - 1)]
        for box in boxes:
            right = _SHARES[item.label or "wrong"]
            pairs += _pairs_of(pictures[item.picture], box, item.phrase, right=right)
    return pairs


@torch.no_grad()
def decoded_pairs(count: int) -> list[Pair]:
    """Scenes of the first edition through the VAE of `tiny`, half of them with latents so noisy
    that only blots are left."""
    vae = load_part(AutoencoderKL, PRESETS["tiny"] / "vae").float().eval()
    edition, generator = EDITIONS[1], torch.Generator().manual_seed(15)
    pictures = draw_scenes(edition, "judge", range(count), edition.image_size)
    latents = vae.encode(to_tensor(pictures)).latent_dist.mean
    shares = torch.where(torch.arange(count) % 2 == 0, 0.1, 1.1).view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator) * latents.std() * shares
    decoded = ((vae.decode(latents + noise).sample.clamp(-1, 1) + 1) * 127.5).round().byte()
    pairs: list[Pair] = []
    for index, picture in enumerate(decoded.permute(0, 2, 3, 1).numpy()):
        for item in edition.sample("judge", index, edition.image_size).objects:
            pairs += _pairs_of(picture, item.box, item.phrase, right=float(index % 2 == 0))
    return pairs


def train(out: Path, steps: tuple[int, int], batch: int) -> LikenessNet:
    """Train from the newest state in ``out``; the same arguments give the same data.

    Args:
        steps: with what was spoilt by rule, and then with the labelled boxes among it.
    """
    torch.manual_seed(_SEED)
    decoded = decoded_pairs(300)
    model = _train_stage(out / "rules", LikenessNet(), Pairs((), decoded), steps[0], batch, 2e-3)
    data = Pairs(labelled_pairs(), decoded)
    return _train_stage(out / "labelled", model, data, steps[1], batch, 1e-3)


def _train_stage(
    folder: Path, model: LikenessNet, data: Pairs, steps: int, batch: int, rate: float
) -> LikenessNet:
    def loss_of_step(step: int) -> dict[str, Tensor]:
        crops, references, right = data.batch(step, batch)
        logits = model(crops, references)
        loss = F.binary_cross_entropy_with_logits(logits, 0.05 + 0.9 * right)
        return {"loss": loss, "accuracy": ((logits > 0) == (right > 0.5)).float().mean()}

    config = LoopConfig(steps=steps, lr=rate, weight_decay=0.02, ema_decay=0.99)
    return run(model, loss_of_step, config, folder)


def probabilities(
    judge: LikenessJudge, boxes: Iterable[LabelledBox], pictures: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Of each labelled box: that it shows its phrase."""
    return np.array(
        [
            judge.probabilities(pictures[b.picture], [b.box], [[b.phrase]], edition=1)[0][0]
            for b in boxes
        ]
    )


def best_threshold(values: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """That with which most verdicts agree; of several the middle one."""
    candidates = np.linspace(0.05, 0.95, 91)
    agreement = np.array([((values >= c) == right).mean() for c in candidates])
    best = candidates[agreement >= agreement.max() - 1e-9]
    return round(float(best[len(best) // 2]), 2)


def area(values: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Area under the curve: how often what is right has the larger value of two (ties: half)."""
    above, below = values[right][:, None], values[~right]
    return float((above > below).mean() + (above == below).mean() / 2)


def old_verdicts(boxes: Sequence[LabelledBox], pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which boxes the judge of the fourth edition recognises."""
    judge = Judge.load()
    seen = [judge.predict(pictures[b.picture][None], [[b.box]])[0][0].category for b in boxes]
    return np.array([name == b.phrase for name, b in zip(seen, boxes, strict=True)])


def _measured(
    judge: LikenessJudge, parts: dict[str, list[LabelledBox]], pictures: NDArray[np.uint8]
) -> dict[str, float]:
    """The card's thresholds and figures, by name."""
    values = {half: probabilities(judge, boxes, pictures) for half, boxes in parts.items()}
    chooses = np.array([not trains(b) for b in parts["train"]])
    old = old_verdicts(parts["test"], pictures)
    figures: dict[str, float] = {}
    for prefix, labels in (("", ("right",)), ("lenient_", ("right", "half"))):
        shown = {
            half: np.array([b.label in labels for b in boxes]) for half, boxes in parts.items()
        }
        second = np.array([b.second in labels for b in parts["test"]])
        threshold = best_threshold(values["train"][chooses], shown["train"][chooses])
        agreement = {
            half: float(np.mean((values[half] >= threshold) == shown[half])) for half in parts
        }
        figures[f"{prefix}threshold"] = threshold
        figures[f"{prefix}agreement_test"] = agreement["test"]
        figures[f"old_{prefix}agreement_test"] = float(np.mean(old == shown["test"]))
        figures[f"second_{prefix}agreement_test"] = float(np.mean(second == shown["test"]))
        figures["auc_wrong_test" if prefix else "auc_right_test"] = area(
            values["test"], shown["test"]
        )
        if not prefix:
            figures["agreement_train"] = agreement["train"]
    return {name: round(value, 4) for name, value in figures.items()}


def store(net: LikenessNet, folder: Path, steps: tuple[int, int], batch: int) -> LikenessCard:
    """Write the weights as fp16 and then the card, measured on what was stored.

    Raises:
        OutputError: ``folder`` cannot be written.
    """
    content = save({name: value.half().contiguous() for name, value in net.state_dict().items()})
    rounded = LikenessNet()
    rounded.load_state_dict({name: value.float() for name, value in load(content).items()})
    found, pictures = read_labelled()
    parts = {half: [b for b in found.boxes if b.half == half] for half in ("train", "test")}
    draft = LikenessCard(
        sha256=hashlib.sha256(content).hexdigest(),
        seed=_SEED,
        steps=steps,
        batch=batch,
        labelled_train=len(parts["train"]),
        labelled_test=len(parts["test"]),
        threshold=0.5,
        agreement_train=0,
        agreement_test=0,
        lenient_threshold=0.5,
        lenient_agreement_test=0,
        auc_right_test=0,
        auc_wrong_test=0,
        old_agreement_test=0,
        old_lenient_agreement_test=0,
        second_agreement_test=0,
        second_lenient_agreement_test=0,
    )
    judge = LikenessJudge(rounded, draft)
    card = draft.model_copy(update=_measured(judge, parts, pictures))
    make_folder(folder)
    text = (json.dumps(card.model_dump(), indent=2) + "\n").encode()
    write_whole(folder / WEIGHTS, lambda file: file.write(content))
    write_whole(folder / CARD, lambda file: file.write(text))
    return card


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.training",
        description="Train the likeness judge, and measure how well it agrees with the labels.",
    )
    parser.add_argument("--out", type=Path, default=Path(".runs/likeness"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, nargs=2, default=(700, 400))
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(arguments)
    steps = (args.steps[0], args.steps[1])
    card = store(train(args.out, steps, args.batch), args.assets, steps, args.batch)
    print(card.model_dump_json(indent=2))


if __name__ == "__main__":
    sys.exit(run_program(main))
