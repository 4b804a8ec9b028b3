"""Files that hold code, are damaged, or are of another model: all are refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.formats.foreign import refuse_foreign
from hcma_fast.models.checkpoint.formats.pickles import as_safetensors
from hcma_fast.models.checkpoint.formats.single_file import read_single_file
from hcma_fast.models.checkpoint.formats.tensor_file import TensorFile, file_kind

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path, module: str = "builtins") -> None:
        self.path, self.module = path, module

    def __reduce__(self) -> tuple[object, ...]:
        if self.module == "os":
            return os.system, (f"touch {self.path}",)
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"state_dict": {"weight": torch.zeros(2)}}
    for module, seen in (("builtins", "exec"), ("os", "system")):
        payload = Payload(trace, module)
        torch.save({**content, "x": payload}, tmp_path / "zip.ckpt")
        torch.save(
            {**content, "x": payload}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
        )
        (tmp_path / "raw.bin").write_bytes(pickle.dumps({**content, "x": payload}, protocol=2))
        # inside of what is read as nothing
        torch.save({"callbacks": [payload]}, tmp_path / "inside.ckpt")
        for name in ("zip.ckpt", "old.pth", "raw.bin", "inside.ckpt"):
            with pytest.raises(WeightsError) as caught:
                as_safetensors(tmp_path / name)
            assert not trace.exists(), name
            error = caught.value
            assert error.exit_code == 3 and str(tmp_path / name) in str(error)
            if name in ("zip.ckpt", "inside.ckpt"):
                assert seen in error.what and "holds code" in error.what
    assert not list((tmp_path / "cache/converted").glob("*.safetensors"))
    # that the payload would have done it
    pickle.loads((tmp_path / "raw.bin").read_bytes())
    assert trace.exists()


def test_damaged_pickles(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"weight": torch.rand(500)}}, whole)
    content = whole.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "start.ckpt").write_bytes(b"\x80\x02garbage")
    torch.save({"text": "no tensors"}, tmp_path / "none.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("readme.txt", "an archive of something else")
    for name in ("half", "start", "none", "other"):
        with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
            as_safetensors(tmp_path / f"{name}.ckpt")
        assert caught.value.exit_code == 3
    assert load_file(as_safetensors(whole))["weight"].shape == (500,)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    torch.save({"a": value, "b": value.T, "c": value[1], "n": {"d": value}}, tmp_path / "x.pth")
    found = load_file(as_safetensors(tmp_path / "x.pth"))
    assert sorted(found) == ["a", "b", "c", "n.d"]
    assert torch.equal(found["b"], value.T) and torch.equal(found["c"], value[1])


def test_what_is_no_checkpoint_is_named(formats: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = (formats / "adapter.safetensors").read_bytes()
    for data, problem in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>Log in", "a web page"),
        (b'{"error": "gated"}', "JSON"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x89PNG\r\n\x1a\n", "begins with 89 50 4e 47"),
        (content[: len(content) // 2], "damaged or incomplete"),
        (content[:1000], "damaged or incomplete"),
    ):
        file.write_bytes(data)
        with pytest.raises(WeightsError, match=problem) as caught:
            load_components(file, aligner=formats / "aligner")
        assert str(file) in str(caught.value) and caught.value.exit_code == 3
    assert file_kind(formats / "gligen.pth") == "pickle"
    assert file_kind(formats / "adapter.safetensors") == "safetensors"


def test_other_models_are_named(tmp_path: Path) -> None:
    attention = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    one = (2,)
    for keys, name in (
        ({f"{UNET}label_emb.0.0.weight": one}, "Stable Diffusion XL"),
        ({"conditioner.embedders.0.transformer.x": one}, "Stable Diffusion XL"),
        ({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 2048)}, "XL"),
        ({UNET + attention: (320, 1024)}, "Stable Diffusion 2.x"),
        ({"cond_stage_model.model.transformer.x": one}, "Stable Diffusion 2.x"),
        ({f"{UNET}joint_blocks.0.x.weight": one}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": one}, "FLUX"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.x": one}, "a video model"),
        ({f"{UNET}input_blocks.1.0.time_stack.x": one}, "a video model"),
        ({"some.conv.weight": (2, 2, 3, 3, 3)}, "a video model"),
        ({"control_model.input_blocks.0.0.weight": one}, "a ControlNet"),
        ({"image_proj.proj.weight": one}, "an IP-Adapter"),
        ({"position_net.linears_text.0.weight": one}, "GLIGEN for text and images"),
        ({"lora_unet_down_blocks_0.lora_up.weight": one}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": one}, "a LoRA"),
        ({"emb_params": one}, "a textual inversion"),
        ({f"{UNET}input_blocks.0.0.weight": one, "v_pred": one}, "predicts v"),
        ({f"{UNET}input_blocks.0.0.weight": one, "ztsnr": one}, "zero terminal"),
    ):
        with pytest.raises(WeightsError, match=name) as caught:
            refuse_foreign(TensorFile(tmp_path / "x", keys))
        assert caught.value.exit_code == 3


def test_inpainting_and_other_unets_are_named(formats: Path, tmp_path: Path) -> None:
    state = load_file(formats / "plain.safetensors")
    first = f"{UNET}input_blocks.0.0.weight"
    for channels, name in ((9, "an inpainting model"), (8, "InstructPix2Pix")):
        save_file({**state, first: torch.zeros(32, channels, 3, 3)}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match=f"{name}.*takes {channels} channels"):
            read_single_file(tmp_path / "x.safetensors")
    lost = {k: v for k, v in state.items() if not k.startswith(f"{UNET}input_blocks.4.")}
    save_file(lost, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"of Stable Diffusion 1\.x: no weight input"):
        read_single_file(tmp_path / "x.safetensors")


def test_folders_of_other_models_are_named(formats: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(formats / "plain", tmp_path / "model"))
    config = folder / "unet/config.json"
    own = json.loads(config.read_text())
    for change, name in (
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ({"cross_attention_dim": 2048}, "Stable Diffusion XL"),
        ({"cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ({"_class_name": "UNetMotionModel"}, "a video model"),
        ({"_class_name": "UNetSpatioTemporalConditionModel"}, "a video model"),
    ):
        config.write_text(json.dumps(own | change))
        with pytest.raises(WeightsError, match=f"this is {name}"):
            load_components(folder)
    shutil.move(folder / "unet", folder / "transformer")
    with pytest.raises(WeightsError, match="SD 3 and FLUX"):
        load_components(folder)
