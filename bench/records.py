"""Files of measurements, each in the folder of the GPU that they were taken on. Written again after every row."""

import json
from pathlib import Path
from typing import Any

import torch
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_path(stem: str) -> Path:
    """`bench/results/GPU/STEM.json`."""
    return RESULTS / device_name(DEVICE).removeprefix("NVIDIA ").split()[0].lower() / f"{stem}.json"


def origin(stem: str) -> dict[str, Any]:
    """What measured, on what, and with which versions."""
    return {
        "command": f"python bench/{stem}.py",
        "device": device_name(DEVICE),
        "versions": versions(),
        "commit": commit(),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """The file is there whole or as it was before."""
    with whole_files(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
