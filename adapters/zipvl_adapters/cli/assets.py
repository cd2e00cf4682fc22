"""The trained models and held-out questions, which live in the repository and not in the wheel."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from zipvl_adapters.cli.checks import UserError

# Order of the tables; further folders follow by name.
_ORDER = ("llava", "internvl", "qwen2_vl")
# The two ends of the difficulty scale, compared in plots and pictures.
EASY_TASK, HARD_TASK = "colour_shape", "code"


@dataclass(frozen=True)
class Question:
    """One held-out question about one picture; an answer is right when it equals `answer` exactly."""

    picture: Path
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Assets:
    """Where the models are (name to folder) and the questions of every task, in the order of the manifest."""

    folder: Path
    models: dict[str, Path]
    tasks: dict[str, list[Question]]

    def take(self, limit: int | None) -> dict[str, list[Question]]:
        """Return the first `limit` questions of every task, all of them with None."""
        return {task: questions[:limit] for task, questions in self.tasks.items()}


def checkout() -> Path | None:
    """Return the repository checkout that this package or the working directory belongs to, None outside of one."""
    for start in (Path(__file__).resolve(), Path.cwd() / "here"):
        for folder in start.parents:
            if (folder / "bench" / "tiny_vlm").is_dir() and (folder / "pyproject.toml").is_file():
                return folder
    return None


def find_assets(models: Path | None = None) -> Assets:
    """Read the folder given, else the one in ZIPVL_MODELS, else `bench/tiny_vlm` of the checkout."""
    if models is not None:
        return _read(models, f"--models {models}")
    named = os.environ.get("ZIPVL_MODELS")
    if named:
        return _read(Path(named), f"ZIPVL_MODELS={named}")
    root = checkout()
    if root is None:
        raise UserError(
            "no trained models found: they are part of the project's repository, not of the installed package;"
            " run this inside a checkout, or set ZIPVL_MODELS (or --models) to its folder bench/tiny_vlm."
        )
    return _read(root / "bench" / "tiny_vlm", str(root / "bench" / "tiny_vlm"))


def _read(folder: Path, source: str) -> Assets:
    advice = "point ZIPVL_MODELS or --models to bench/tiny_vlm of a complete checkout of the repository"
    found = [path.parent for path in sorted(folder.glob("models/*/config.json"))]
    if not found:
        raise UserError(f"{source}: no models/NAME/config.json there; {advice}.")
    found.sort(key=lambda path: (_ORDER.index(path.name) if path.name in _ORDER else len(_ORDER), path.name))
    manifest = folder / "heldout" / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{source}: no heldout/manifest.json there; {advice}.")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        tasks: dict[str, list[Question]] = {str(task): [] for task in content["tasks"]}
        for item in content["items"]:
            picture = manifest.parent / item["image"]
            tasks[item["task"]].append(Question(picture, item["task"], item["question"], str(item["answer"])))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{manifest}: damaged ({type(error).__name__}: {error}); {advice}.") from error
    for questions in tasks.values():
        for question in questions:
            if not question.picture.is_file():
                raise UserError(f"{manifest}: names the picture {question.picture.name}, which is missing; {advice}.")
    if not any(tasks.values()):
        raise UserError(f"{manifest}: holds no questions; {advice}.")
    return Assets(folder, {path.name: path for path in found}, {task: asked for task, asked in tasks.items() if asked})
