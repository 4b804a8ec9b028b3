"""CLIP, vision and detection networks from small random folders in transformers' format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from hcma_fast.bench.quality.metrics.detection import (
    Detection,
    Detector,
    best_ious,
    counts_match,
    iou,
    layout_ap,
)
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.metrics.networks import ClipScorer, JudgeFeatures, VisionFeatures, cut
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.layout import Layout


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        id2label={0: "Dog", 1: "pizza", 2: "cat"},
        label2id={"Dog": 0, "pizza": 1, "cat": 2},
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(count)]


def test_clip_score_is_the_raw_cosine(clip_folder: Path) -> None:
    scorer = ClipScorer(str(clip_folder))
    images, texts = pictures(3), ["a dog", "a cat on a bed", "a dog"]
    found = scorer.cosines(images, texts)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    with torch.no_grad():
        for image, text, value in zip(images, texts, found, strict=True):
            output = model(
                **tokenizer(text, return_tensors="pt"),
                **processor(images=image, return_tensors="pt"),
            )
            # CLIP's own logit is its learned scale times the cosine
            cosine = float(output.logits_per_image) / float(model.logit_scale.exp())
            assert value == pytest.approx(cosine, abs=1e-5)
    assert scorer.cosines([], []).shape == (0,)
    with pytest.raises(InputError, match="tokens"):
        scorer.cosines(images[:1], ["x" * 100])


def test_vision_features_have_a_row_per_image_or_box(clip_folder: Path) -> None:
    network = VisionFeatures(str(clip_folder))
    images = pictures(3)
    found = network.images(images)
    assert found.shape == (3, network.width) == (3, 16)
    assert np.abs(found[0] - found[1]).max() > 1e-4
    box = (0.0, 0.0, 0.5, 0.5)
    crops = network.crops(images[0], [box, (0.0, 0.0, 1.0, 1.0)])
    np.testing.assert_allclose(crops[1], found[0], atol=1e-5)
    np.testing.assert_allclose(crops[0], network.images([cut(images[0], box)])[0], atol=1e-5)
    assert network.crops(images[0], []).shape == (0, 16)


def test_judge_features_are_what_its_read_out_sees() -> None:
    judge = Judge.load()
    network = JudgeFeatures(judge)
    image = pictures(1)[0]
    boxes = [(0.1, 0.1, 0.8, 0.9), (0.0, 0.0, 1.0, 1.0)]
    features = network.crops(image, boxes)
    logits = judge.net.head(torch.from_numpy(features))
    (verdicts,) = judge.predict(np.asarray(image)[None], [boxes])
    assert [judge.card.classes[i] for i in logits.argmax(-1).tolist()] == [
        verdict.category for verdict in verdicts
    ]
    assert network.images([image, image]).shape == (2, network.width)


@pytest.mark.parametrize("kind", [ClipScorer, VisionFeatures, Detector])
def test_what_does_not_load_is_refused(kind: type, tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(WeightsError, match="cannot load"):
        kind(str(tmp_path))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in clip_folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WeightsError):
        kind(str(damaged))


def test_configs_that_ask_for_code_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    config = json.loads((clip_folder / "config.json").read_text())
    vision = config["vision_config"]
    bad: dict[str, tuple[str, dict[str, Any]]] = {
        "auto_map": ("config.json", {**config, "auto_map": {"AutoModel": "x--y.Z"}}),
        "quantization_config": ("config.json", {**config, "quantization_config": {}}),
        "attn_implementation": (
            "config.json",
            {**config, "vision_config": {**vision, "attn_implementation": "a/kernel"}},
        ),
        "no such kind": ("config.json", {**config, "model_type": "own"}),
        "custom_code": ("preprocessor_config.json", {"custom_code": "x"}),
    }
    for word, (name, content) in bad.items():
        folder = tmp_path / word
        shutil.copytree(clip_folder, folder)
        (folder / name).write_text(json.dumps(content))
        for kind in (ClipScorer, VisionFeatures):
            with pytest.raises(WeightsError, match=word):
                kind(str(folder))


def test_files_that_are_not_read_change_nothing(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with an adapter"
    shutil.copytree(clip_folder, folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "no/such"}')
    images = pictures(2)
    ours, theirs = (VisionFeatures(str(path)).images(images) for path in (folder, clip_folder))
    assert np.array_equal(ours, theirs)


def test_detector_by_folder(detector_folder: Path) -> None:
    detector = Detector(str(detector_folder))
    found = detector.detect(pictures(1)[0])
    assert found and {item.label for item in found} <= {"dog", "pizza", "cat"}
    for item in found:
        assert 0 <= item.box[0] <= item.box[2] <= 1 and 0 <= item.score <= 1
    box = (0.1, 0.1, 0.5, 0.5)
    detector.check([Layout(["dog", "Cat"], [box, box])])
    with pytest.raises(InputError, match="no category"):
        detector.check([Layout(["giraffe"], [box])])


A, B = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
LAYOUTS = [Layout(["dog", "cat"], [A, B]), Layout(["dog"], [A]), Layout.empty()]


def test_overlap_and_counts_by_hand() -> None:
    assert iou(A, A) == 1 and iou(A, B) == 0
    assert iou(A, (0.0, 0.0, 0.5, 1.0)) == pytest.approx(0.5)
    found = [Detection("dog", 0.9, (0.0, 0.0, 0.5, 1.0)), Detection("cat", 0.1, B)]
    assert best_ious(LAYOUTS[0], found) == [pytest.approx(0.5), 0.0]
    assert not counts_match(LAYOUTS[0], found)
    found = [Detection("dog", 0.9, A), Detection("cat", 0.8, A), Detection("cow", 0.9, A)]
    assert counts_match(LAYOUTS[0], found) and not counts_match(LAYOUTS[1], found * 2)


def test_layout_ap_of_perfect_shifted_and_missing_detections() -> None:
    perfect = [
        [Detection(name, 0.9, box) for name, box in zip(x.phrases, x.boxes, strict=True)]
        for x in LAYOUTS
    ]
    assert layout_ap(LAYOUTS, perfect) == (pytest.approx(1), pytest.approx(1))
    # IoU 0.6: right at the thresholds 0.50, 0.55 and 0.60 of ten
    wide = [
        [item._replace(box=(*item.box[:3], item.box[1] + 0.3)) for item in some] for some in perfect
    ]
    ap, ap50 = layout_ap(LAYOUTS, wide)
    assert ap50 == pytest.approx(1) and 0.2 <= ap <= 0.31
    assert layout_ap(LAYOUTS, [[], [], []]) == (0, 0)
    swapped = [[item._replace(label="cow") for item in some] for some in perfect]
    assert layout_ap(LAYOUTS, swapped) == (0, 0)
    assert np.isnan(layout_ap([Layout.empty()], [[]])[0])
