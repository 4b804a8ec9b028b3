"""Networks of transformers that measure images: read from a folder or hub id, by allow-lists."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.configs import (
    OTHER_CONFIGS,
    TRANSFORMERS_KEYS,
    check_keys,
    refused_code,
)
from hcma_fast.models.checkpoint.hub import is_hub_id
from hcma_fast.models.checkpoint.json_files import read_object, shorten

CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
_FILES = {
    *(CONFIG_FILE, PROCESSOR_FILE, "model.safetensors", "model.safetensors.index.json"),
    *("vocab.json", "merges.txt"),
    *OTHER_CONFIGS,
}
_SHARDS = "model-*.safetensors"
#: of CLIP's first checkpoints, which repeat the nested configs
_REPEATED = {"text_config_dict", "vision_config_dict"}
_NESTED = ("_config", "_config_dict")
_PROCESSOR = {
    *("crop_size", "data_format", "default_to_square", "do_center_crop"),
    *("do_convert_annotations", "do_convert_rgb", "do_normalize", "do_pad", "do_rescale"),
    *("do_resize", "feature_extractor_type", "format", "image_mean", "image_processor_type"),
    *("image_seq_length", "image_std", "input_data_format", "max_size", "pad_size"),
    *("processor_class", "resample", "rescale_factor", "return_tensors", "size"),
    *("size_divisor", "_valid_processor_keys"),
}


def load_pretrained(cls: Any, name: str) -> Any:
    """A part of a transformers checkpoint by folder or hub id; no pickles, no remote code.

    The library sees the files that we know alone, after a look at their configs' keys.

    Raises:
        WeightsError: it is missing, damaged or of another kind, or asks for foreign code.
    """
    weights = {"use_safetensors": True} if cls.__name__.endswith(("Model", "Detection")) else {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _known_files(_folder(name)) as folder:
            loaded = cls.from_pretrained(folder, trust_remote_code=False, **weights)
    except WeightsError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        raise WeightsError(
            f"cannot load {cls.__name__}: {(str(error).splitlines() or [''])[0]}",
            value=name,
            remedy="Give a folder, or a hub id that is in the cache, in transformers' format.",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return loaded.eval().requires_grad_(False) if weights else loaded


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or not is_hub_id(name):
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[*_FILES, _SHARDS]))


@contextmanager
def _known_files(source: Path) -> Iterator[Path]:
    """A folder with links to the files of ``source`` that we know, whose configs are checked."""
    with TemporaryDirectory(prefix="hcma-fast-") as place:
        folder = Path(place)
        for path in [*(source / name for name in _FILES), *source.glob(_SHARDS)]:
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
        if (config := source / CONFIG_FILE).is_file():
            _check_config(config, read_object(config))
        if (processor := source / PROCESSOR_FILE).is_file():
            check_keys(processor, read_object(processor), _PROCESSOR)
        for name, allowed in OTHER_CONFIGS.items():
            if (path := source / name).is_file():
                check_keys(path, read_object(path), allowed)
        yield folder


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse keys that the library's own config of this kind of model does not have.

    Raises:
        WeightsError: names the key, or the kind.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise WeightsError(
            "transformers has no such kind of model",
            value=f"{path}: model_type {shorten(kind)}",
            remedy="Use a checkpoint of one of transformers' own classes.",
        )
    _check_level(path, config, CONFIG_MAPPING[kind]().to_dict())


def _check_level(path: Path, config: dict[str, Any], default: dict[str, Any]) -> None:
    allowed: Set[str] = default.keys() | TRANSFORMERS_KEYS | _REPEATED
    check_keys(path, config, allowed)
    for key, value in config.items():
        if not key.endswith(_NESTED) or value is None:
            continue
        if not isinstance(value, dict):
            raise refused_code(path, f"the value of {key}")
        own = default.get(key.removesuffix("_dict"))
        if (kind := value.get("model_type")) in CONFIG_MAPPING:
            own = CONFIG_MAPPING[kind]().to_dict()
        _check_level(path, value, own or {})
