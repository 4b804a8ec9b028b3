"""Train tokenizer and text encoder of `tiny`: ``hcma-fast train text``.

There is no image-text corpus to contrast on, so the pooled embedding learns to carry what a caption
says: linear read-outs must find the count of each category, the background and the relation in it.
Labels are also pushed apart in cosine, because the alignment losses (Eq. 6, 7) measure cosines to
them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.files import write_folder
from hcma_fast.models.checkpoint.parts import quiet_transformers
from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.loop.loop import LoopConfig, Record, run

WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"
RELATIONS = ("none", "to the left of", "to the right of", "above", "below")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with its own small byte-level vocabulary: any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += [word for pair in merges if (word := "".join(pair)) not in words]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKEN_LENGTH)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The architecture of `tiny`'s text encoder: 3 layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKEN_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class _ReadOut(nn.Module):
    """Text encoder with linear read-outs on the pooled embedding; only the encoder is kept."""

    def __init__(self, encoder: CLIPTextModel, edition: Edition) -> None:
        super().__init__()
        self.encoder = encoder
        self.phrases = len(edition.phrases)
        self.counts = nn.Linear(WIDTH, self.phrases * 6)
        self.background = nn.Linear(WIDTH, len(edition.backgrounds) + 1)
        self.relation = nn.Linear(WIDTH, len(RELATIONS))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pooled = self.encoder(input_ids=input_ids).pooler_output
        counts = self.counts(pooled).unflatten(-1, (self.phrases, 6))
        return pooled, counts, self.background(pooled), self.relation(pooled)


def _example(
    rng: np.random.Generator, index: int, edition: Edition
) -> tuple[str, list[int], int, int]:
    """A caption (or, in a third of the draws, a label) with its counts, background and relation."""
    counts = [0] * len(edition.phrases)
    if rng.random() < 0.34:
        which = int(rng.integers(len(edition.phrases)))
        phrase = edition.phrases[which]
        counts[which] = 1
        article = "an" if phrase[0] in "aeiou" else "a"
        text = str(rng.choice([phrase, phrase, f"{article} {phrase}"]))
        return text, counts, len(edition.backgrounds), 0
    scene = edition.sample("train", index, edition.image_size)
    for phrase, count in Counter(o.phrase for o in scene.objects).items():
        counts[edition.phrases.index(phrase)] = count
    text = str(rng.choice(scene.captions))
    relation = next((i for i, r in enumerate(RELATIONS) if i and f" {r} " in text), 0)
    return text, counts, edition.backgrounds.index(scene.background), relation


def train_text(
    out: Path,
    *,
    steps: int,
    batch: int,
    on_log: Callable[[Record], None],
    edition: Edition = FIRST,
) -> Path:
    """Write ``out/tokenizer`` and ``out/text_encoder``, whose folder is returned.

    Goes on from the newest state in ``out/text-state``, where log.jsonl is too.

    Args:
        batch: captions and labels in a step.
        on_log: called with the step to begin at, then with each record of log.jsonl.

    Raises:
        DivergenceError: a loss is not finite; its batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
        WeightsError: the state is another model's, was begun with other settings, or is damaged.
    """
    torch.manual_seed(0)
    scenes = (edition.sample("train", i, edition.image_size) for i in range(3000))
    captions = [text for scene in scenes for text in scene.captions]
    tokenizer = make_tokenizer([*captions, *edition.phrases])
    write_folder(out / "tokenizer", tokenizer.save_pretrained)
    model = _ReadOut(make_text_encoder(tokenizer), edition)

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([2, step])
        examples = [_example(rng, int(rng.integers(20000)), edition) for _ in range(batch)]
        texts, counts, backgrounds, relations = zip(*examples, strict=True)
        # attention is causal and pads come last, so the short batch gives the same pooled embedding
        ids = tokenizer(list(texts), padding=True, return_tensors="pt").input_ids
        return {
            "ids": ids,
            "counts": torch.tensor(counts),
            "backgrounds": torch.tensor(backgrounds),
            "relations": torch.tensor(relations),
        }

    def loss_of_step(step: int) -> dict[str, Tensor]:
        drawn = batch_of_step(step)
        pooled, count_logits, background_logits, relation_logits = model(drawn["ids"])
        count_target = drawn["counts"]
        weight = torch.where(count_target > 0, 8.0, 1.0)
        count_loss = F.cross_entropy(
            count_logits.flatten(0, 1), count_target.flatten(), reduction="none"
        )
        count_loss = (count_loss * weight.flatten()).mean()
        background_loss = F.cross_entropy(background_logits, drawn["backgrounds"])
        relation_loss = F.cross_entropy(relation_logits, drawn["relations"])
        cosine = F.cosine_similarity(pooled[:, None], pooled[None], dim=-1)
        shared = (count_target[:, None] * count_target[None]).sum(-1) > 0
        apart = (F.relu(cosine - 0.1) ** 2 * ~shared).mean()
        right = (count_logits.argmax(-1) == count_target).all(-1).float().mean()
        loss = count_loss + 0.3 * background_loss + 0.2 * relation_loss + 2 * apart
        return {"loss": loss, "counts": count_loss, "apart": apart, "all_counts_right": right}

    config = LoopConfig(
        steps=steps,
        lr=1e-3,
        weight_decay=0.01,
        ema_decay=0.99,
        draws={"batch": batch} if edition is FIRST else {"batch": batch, "edition": edition.number},
    )
    averaged = run(
        model,
        loss_of_step,
        config,
        out / "text-state",
        batch_of_step=batch_of_step,
        on_log=on_log,
    )
    with quiet_transformers():
        write_folder(out / "text_encoder", averaged.encoder.eval().save_pretrained)
    return out / "text_encoder"
