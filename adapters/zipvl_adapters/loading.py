"""Models and processors from a folder or the hub; whatever goes wrong is said in one line."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from zipvl_adapters.families import IMAGE_BOXES, TEXT_MODELS, text_config_of
from zipvl_adapters.processing import PIL_IMAGE_PROCESSORS, PictureProcessor


class LoadError(RuntimeError):
    """One line: what could not be loaded, why, and what to do."""


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode and its processor (for text models, its tokenizer).

    path_or_id: folder of a saved model, or its id on the hub, of `revision`.
    dtype: bf16 on a GPU and fp32 on the CPU where not given. device: a GPU where there is one.
    Raises LoadError.
    """
    source = os.fspath(path_or_id)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise LoadError(f"device: expected one such as cpu or cuda:0, got {device!r}") from error
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    where = {} if revision is None else {"revision": revision}
    has_torchvision = _check_torchvision()
    _check_source(source, revision)
    config = _load_config(source, where)
    model = _load_model(source, config, dtype, device, where)
    return model, _load_processor(source, config, has_torchvision, where)


def _check_torchvision() -> bool:
    """Whether there is a torchvision; one that does not import breaks transformers in places far away."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise LoadError(
            f"torchvision is installed and does not import ({_line(error)}); "
            "install the version that fits this torch, or uninstall it: pictures work without"
        ) from error
    return True


def _check_source(source: str, revision: str | None) -> None:
    """That there is something to load; transformers itself would try an unreachable hub for half a minute."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"{source}: the folder has no config.json; expected a model saved with save_pretrained()")
    elif path.exists():
        raise LoadError(f"{source}: expected a folder with a saved model, or an id on the hub; got a file")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise LoadError(f"{source}: no such folder; expected a folder with a saved model, or an id like org/name")
    elif not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        try:
            HfApi().model_info(source, revision=revision, timeout=10)
        except Exception as error:
            raise LoadError(
                f"{source}: no such folder, and the hub does not give it either ({_line(error)}); "
                "check the id, the network, and `hf auth login` for gated models"
            ) from error


def _load_config(source: str, where: dict[str, str]) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **where)
    except Exception as error:
        raise LoadError(f"{source}: its config.json cannot be used ({_line(error)}); check the file") from error
    if config.model_type not in (*IMAGE_BOXES, *TEXT_MODELS):
        raise LoadError(
            f"{source}: model type {config.model_type!r} is not supported; "
            f"expected one of {', '.join((*IMAGE_BOXES, *TEXT_MODELS))}"
        )
    try:
        text_config_of(config)
    except ValueError as error:
        raise LoadError(f"{source}: {error}") from error
    return config


def _load_model(
    source: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, where: dict[str, str]
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM if config.model_type in TEXT_MODELS else AutoModelForImageTextToText
    try:
        model, report = auto.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **where)
    except Exception as error:
        raise LoadError(
            f"{source}: its weights could not be loaded ({_line(error)}); expected whole safetensors files that fit "
            "config.json, so copy or download them again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoadError(
            f"{source}: {len(missing)} weights are missing, such as {missing[0]}; expected whole safetensors files "
            "that fit config.json"
        )
    try:
        return model.to(device).eval()  # type: ignore[no-any-return]
    except Exception as error:
        raise LoadError(f"{source}: cannot be put on {device} ({_line(error)}); choose another device") from error


def _load_processor(source: str, config: PreTrainedConfig, has_torchvision: bool, where: dict[str, str]) -> Any:
    auto: Any = AutoTokenizer if config.model_type in TEXT_MODELS else AutoProcessor
    try:
        if config.model_type in PIL_IMAGE_PROCESSORS and not has_torchvision:
            processor: Any = PictureProcessor.from_pretrained(source, config, **where)
        else:
            processor = auto.from_pretrained(source, **where)
        if len(getattr(processor, "tokenizer", processor)) < 2:  # what transformers makes of missing files
            raise ValueError("there is no vocabulary")
    except Exception as error:  # transformers raises whatever its parts raise
        raise LoadError(
            f"{source}: its processor could not be loaded ({_line(error)}); "
            "expected the tokenizer and preprocessor files beside the weights"
        ) from error
    return processor


def _line(error: BaseException, limit: int = 200) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
