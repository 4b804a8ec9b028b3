"""LoRA files of kohya, peft and diffusers, folded into the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.formats.lora import fold_lora
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.options import Lora, ModelOptions

from original_files import WIDTH, make_parts

RANK, ALPHA = 3, 1.5
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    "unet": (
        f"{ATTENTION}.attn1.to_q",
        f"{ATTENTION}.attn2.to_k",
        f"{ATTENTION}.attn2.to_out.0",
        f"{ATTENTION}.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "up_blocks.3.resnets.2.conv1",
    ),
    "text_encoder": ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"),
}
Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return make_parts(gated=True)


def factors(parts: dict[str, nn.Module]) -> Factors:
    """(down, up) of every layer above, of the shapes that trainers give them."""
    torch.manual_seed(2)
    found = {}
    for part, names in LAYERS.items():
        for name in names:
            weight: Tensor = parts[part].get_submodule(name).weight  # type: ignore[assignment]
            kernel = (1,) * (weight.dim() - 2)
            found[part, name] = (
                torch.randn(RANK, *weight.shape[1:]),
                torch.randn(weight.shape[0], RANK, *kernel),
            )
    return found


def kohya(given: Factors) -> dict[str, Tensor]:
    state = {}
    for (part, name), (down, up) in given.items():
        start = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        key = start + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def peft(given: Factors, start: str = "") -> dict[str, Tensor]:
    state = {}
    for (part, name), (down, up) in given.items():
        key = f"{start}{part}." + ("text_model." * (part == "text_encoder")) + name
        state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return state


def older(given: Factors) -> dict[str, Tensor]:
    """As diffusers wrote before it used peft: attention of the UNet, and the text encoder."""
    state = {}
    for (part, name), (down, up) in given.items():
        if part == "unet" and ".attn" in name:
            layer, _, last = name.removesuffix(".0").rpartition(".")
            key = f"unet.{layer}.processor.{last}_lora"
        elif part == "text_encoder":
            key = f"text_encoder.text_model.{name}.lora_linear_layer"
        else:
            continue
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return state


def test_every_naming_folds_the_same(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    given = factors(parts)
    base = {part: copy.deepcopy(model.state_dict()) for part, model in parts.items()}
    wrapped = {f"base_model.model.{key}": value for key, value in peft(given).items()}
    bare = {k.removeprefix("unet."): v for k, v in older(given).items() if k.startswith("unet.")}
    for name, state, alpha, changed in (
        ("kohya", kohya(given), ALPHA, set(given)),
        ("peft", peft(given), RANK, set(given)),
        ("wrapped", wrapped, RANK, set(given)),
        ("older", older(given), RANK, {k for k in given if "attn" in k[1] or k[0] != "unet"}),
        ("bare", bare, RANK, {k for k in given if ".attn" in k[1] and k[0] == "unet"}),
    ):
        for part, model in parts.items():
            model.load_state_dict(base[part])
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        assert fold_lora(tmp_path / name, 0.5, parts) == len(changed)  # type: ignore[arg-type]
        for part, model in parts.items():
            for key, value in model.state_dict().items():
                layer = (part, key.removesuffix(".weight").removeprefix("text_model."))
                expected = base[part][key]
                if layer in changed and key.endswith(".weight"):
                    down, up = given[layer]
                    # the definition: a down projection, then an up projection
                    product = torch.einsum("or,r...->o...", up.flatten(1), down)
                    expected = expected + 0.5 * alpha / RANK * product
                    assert (value - base[part][key]).abs().max() > 1e-3
                assert (value - expected).abs().max() < 1e-5, (name, key)
    for part, model in parts.items():
        model.load_state_dict(base[part])


def test_a_model_with_loras(formats: Path, parts: dict[str, nn.Module], tmp_path: Path) -> None:
    file, other = tmp_path / "style.safetensors", tmp_path / "other.safetensors"
    given = factors(parts)
    save_file(kohya(given), file)
    save_file(peft({key: value for key, value in given.items() if key[0] == "unet"}), other)
    torch.save(kohya(given), tmp_path / "style.bin")
    base = formats / "gated.safetensors"
    usual = load_components(base)
    hashes = {usual.weights_hash}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    down, up = given["unet", name.removesuffix(".weight")]
    product = up @ down
    start = usual.unet.state_dict()[name]
    for loras, factor in (
        ((Lora(file),), ALPHA / RANK),
        ((Lora(file, 0.5),), 0.5 * ALPHA / RANK),
        ((Lora(file, 0.5), Lora(other, -2)), 0.5 * ALPHA / RANK - 2),
    ):
        found = load_components(base, options=ModelOptions(loras=loras))
        assert (found.unet.state_dict()[name] - start - factor * product).abs().max() < 1e-5
        assert found.weights_hash not in hashes
        hashes.add(found.weights_hash)
        text = "encoder.layers.0.mlp.fc1.weight"
        ours, before = (model.text_encoder.state_dict()[text] for model in (found, usual))
        assert not torch.equal(ours, before)


def test_what_is_no_lora_of_this_model(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    given, file = factors(parts), tmp_path / "x.safetensors"
    whole = kohya(given)
    first = sorted(key for key in whole if key.endswith("lora_up.weight"))[0]
    wide = kohya(factors(make_parts(gated=True, width=2 * WIDTH)))
    for state, problem in (
        ({**whole, "lora_te2_x.lora_up.weight": torch.ones(2)}, "LoRA of Stable Diffusion XL"),
        ({"a.hada_w1_a": torch.ones(2)}, "a LoHa"),
        ({"a.lokr_w1": torch.ones(2)}, "a LoKr"),
        ({**whole, "a.dora_scale": torch.ones(2)}, "a DoRA"),
        ({**whole, "foreign": torch.ones(2)}, "is no LoRA: 1 weights: foreign"),
        ({k: v for k, v in whole.items() if k != first}, "has no down and up for 1 weights"),
        ({k.replace("attentions_0", "attentions_7"): v for k, v in whole.items()}, "no layers for"),
        (wide, r"does not fit.*128.*where the model has"),
        ({**whole, first: torch.full_like(whole[first], torch.nan)}, "not finite"),
    ):
        save_file({k: v.clone() for k, v in state.items()}, file)
        with pytest.raises(WeightsError, match=problem) as caught:
            fold_lora(file, 1.0, parts)  # type: ignore[arg-type]
        assert caught.value.exit_code == 3 and str(file) in str(caught.value)


def test_files_and_scales_as_words(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    odd.write_text("")
    for text, expected in (
        ("x.safetensors", Lora("x.safetensors", 1.0)),
        ("x.safetensors:0.8", Lora("x.safetensors", 0.8)),
        ("x:-1", Lora("x", -1.0)),
        ("C:/x.safetensors", Lora("C:/x.safetensors", 1.0)),
        (str(odd), Lora(str(odd), 1.0)),
        (f"{odd}:2", Lora(str(odd), 2.0)),
        (Lora("x", 3.0), Lora("x", 3.0)),
    ):
        assert Lora.parse(text) == expected
    for wrong in ("x:nan", "x:inf"):
        with pytest.raises(WeightsError, match="finite number"):
            Lora.parse(wrong)
    with pytest.raises(WeightsError, match="no such file"):
        ModelOptions(loras=(Lora(tmp_path / "absent"),)).files()


def test_the_alpha_that_diffusers_stores_is_read(
    parts: dict[str, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = factors(parts)
    # it may have been told by another test of this process
    tell_once.cache_clear()
    for name, metadata in {
        "stored": {"unet.lora_alpha": ALPHA, "text_encoder.lora_alpha": ALPHA, "unet.r": RANK},
        "silent": None,
    }.items():
        file = tmp_path / f"{name}.safetensors"
        text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
        save_file(peft(given), file, metadata=text)
        changed = {part: copy.deepcopy(module) for part, module in parts.items()}
        fold_lora(file, 0.5, changed)  # type: ignore[arg-type]
        factor = 0.5 * (1.0 if metadata is None else ALPHA / RANK)
        for (part, layer), (down, up) in given.items():
            before, after = (
                models[part].get_submodule(layer).weight for models in (parts, changed)
            )
            expected = factor * (up.flatten(1) @ down.flatten(1)).view(before.shape)  # type: ignore[arg-type]
            torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
        assert ("adapter_config.json" in caplog.text) is (metadata is None)
    for key, value in (("unet.alpha_pattern", {"a": 2}), ("unet.lora_alpha", "x")):
        text = {"lora_adapter_metadata": json.dumps({key: value})}
        save_file(peft(given), tmp_path / "odd.safetensors", metadata=text)
        with pytest.raises(WeightsError, match=r"alpha"):
            fold_lora(tmp_path / "odd.safetensors", 1.0, parts)  # type: ignore[arg-type]
