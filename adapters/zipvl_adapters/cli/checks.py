"""What is checked before any model is loaded, each with one line that says what was wrong and what to do."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DTYPES = ("float32", "bfloat16", "float16")


class UserError(Exception):
    """Bad input: the message names what was wrong, what was expected and what to do. Exit code 2."""


def check_tau(tau: float) -> float:
    """Return `tau` if it lies in (0, 1]."""
    if not 0.0 < tau <= 1.0:  # also refuses NaN
        raise UserError(f"--tau {tau:g}: expected a number in (0, 1], for example 0.975; 1.0 keeps every token.")
    return tau


def check_positive(option: str, value: int) -> int:
    """Return `value` if it is at least 1."""
    if value < 1:
        raise UserError(f"{option} {value}: expected a whole number of at least 1.")
    return value


def check_prompt(prompt: str) -> str:
    """Return `prompt` if it holds more than blanks."""
    if not prompt.strip():
        raise UserError(
            "--prompt is empty: expected a question or an instruction, for example --prompt 'What is this?'."
        )
    return prompt


def check_image(path: Path) -> "Image":
    """Read the picture at `path` completely, upright and as RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.exists():
        raise UserError(f"--image {path}: no such file; expected a picture (PNG, JPEG, WebP, ...).")
    if not path.is_file():
        raise UserError(f"--image {path}: is a folder; expected one picture file (PNG, JPEG, WebP, ...).")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        reason = "not a picture in a format that Pillow knows"
    except Image.DecompressionBombError as error:
        reason = str(error)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise on damaged files
        reason = f"damaged or unreadable ({error})"
    raise UserError(f"--image {path}: {reason}; expected a whole PNG, JPEG or WebP file: convert or re-export it.")


def check_device(device: str | None) -> "torch.device":
    """Return the device asked for if this machine has it; without a name the GPU if there is one, else the CPU."""
    import torch

    available = ["cpu"]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if device is None:
        return torch.device("cuda" if len(available) > 1 and available[1].startswith("cuda") else "cpu")
    if device in available or (device == "cuda" and "cuda:0" in available):
        return torch.device(device)
    raise UserError(
        f"--device {device}: not available; expected one of {', '.join(available)}, or leave it out"
        " ('zipvl env' shows what torch sees)."
    )


def check_dtype(dtype: str | None) -> "torch.dtype | None":
    """Return the torch dtype of that name, None for the default of the device."""
    import torch

    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def check_output(folder: Path) -> Path:
    """Return `folder` if files can be written there, whether or not it exists yet. Creates nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; expected a folder, new or existing.")
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: {existing} cannot be written to; expected a folder that can: choose another.")
    return folder
