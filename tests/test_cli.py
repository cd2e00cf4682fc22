"""The command line without models: help, bad input, the bug-report block."""

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner
from zipvl_adapters.cli import app
from zipvl_adapters.cli.outputs import whole_files
from zipvl_adapters.cli.tables import print_table


def zipvl(*arguments, **options):
    """Run the command in a process of its own."""
    code = "import sys; from zipvl_adapters.cli import main; sys.argv[0] = 'zipvl'; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


def refused(*arguments):
    """Run in this process, expect bad input, and return the one line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("zipvl: ")
    return line


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "run", "eval", "bench", "tune", "env"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", ["demo", "run", "eval", "bench", "tune", "env"])
def test_every_command_has_help(command):
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_help_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys; import zipvl_adapters.cli;"
        "print(*(m for m in ('torch', 'transformers', 'matplotlib', 'numpy', 'PIL') if m in sys.modules))"
    )
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
    assert time.perf_counter() - begin < 3  # 0.3 s on an idle machine


@pytest.mark.parametrize("tau", ["0", "-0.1", "1.01", "nan", "inf"])
@pytest.mark.parametrize("command", [["demo"], ["eval"], ["run", "--model", "x", "--prompt", "hi"]])
def test_tau_outside_its_range(command, tau):
    assert "expected a number in (0, 1]" in refused(*command, "--tau", tau)


def test_words_instead_of_numbers_and_unknown_names():
    assert "--tau" in refused("demo", "--tau", "much")
    assert "--bogus" in refused("demo", "--bogus")
    assert "'dmo'" in refused("dmo")
    assert "'--model'" in refused("run", "--prompt", "hi")


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_limit_below_one(command):
    assert "--limit 0: expected a whole number of at least 1" in refused(command, "--limit", "0")


def test_run_refuses_bad_text_before_it_looks_for_the_model():
    assert "--prompt is empty" in refused("run", "--model", "x", "--prompt", " \n ")
    assert "--model is empty" in refused("run", "--model", "", "--prompt", "hi")
    assert "--max-new-tokens 0" in refused("run", "--model", "x", "--prompt", "hi", "--max-new-tokens", "0")
    assert "--dtype int8: expected one of float32" in refused(
        "run", "--model", "x", "--prompt", "hi", "--dtype", "int8"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu", ""])
def test_unknown_device(device):
    line = refused("run", "--model", "x", "--prompt", "hi", "--device", device)
    assert f"--device {device}: not available; expected one of cpu" in line


def test_pictures_that_cannot_be_read(tmp_path):
    from PIL import Image

    def run(path):
        return refused("run", "--model", "x", "--prompt", "hi", "--image", path)

    assert "no such file" in run(tmp_path / "missing.png")
    assert "is a folder" in run(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    assert "not a picture" in run(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    assert "not a picture" in run(tmp_path / "empty.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    assert "damaged or unreadable" in run(tmp_path / "cut.png")


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_models_that_are_not_there(command, tmp_path):
    assert "no models/NAME/config.json" in refused(command, "--models", tmp_path)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "models" / "llava" / "config.json").write_text("{}")
    assert "no heldout/manifest.json" in refused(command, "--models", tmp_path)
    (tmp_path / "heldout").mkdir()
    manifest = tmp_path / "heldout" / "manifest.json"
    for content in ("{", "[]", "{}", '{"tasks": ["code"], "items": [{"task": "code"}]}'):
        manifest.write_text(content)
        assert "manifest.json: damaged" in refused(command, "--models", tmp_path)
    manifest.write_text('{"tasks": ["code"], "items": []}')
    assert "holds no questions" in refused(command, "--models", tmp_path)
    item = {"image": "0.png", "task": "code", "question": "Which?", "answer": "7"}
    manifest.write_text(json.dumps({"tasks": ["code"], "items": [item]}))
    assert "0.png, which is missing" in refused(command, "--models", tmp_path)


def test_models_are_looked_for_in_the_environment_and_then_in_the_checkout(tmp_path, monkeypatch):
    from zipvl_adapters.cli import assets

    monkeypatch.setenv("ZIPVL_MODELS", str(tmp_path))
    assert f"ZIPVL_MODELS={tmp_path}" in refused("demo")
    monkeypatch.delenv("ZIPVL_MODELS")
    monkeypatch.setattr(assets, "checkout", lambda: None)
    line = refused("demo")
    assert "repository" in line
    assert "ZIPVL_MODELS" in line


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_output_folder_that_cannot_be(command, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "is a file" in refused(command, "--out", tmp_path / "file")
    assert "cannot be written to" in refused(command, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_process_prints_one_line_and_no_traceback(tmp_path):
    result = zipvl("demo", "--models", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unexpected_errors_are_one_line_and_a_traceback_on_demand(monkeypatch):
    from zipvl_adapters.cli import env

    def broken():
        raise RuntimeError("something\nodd")

    monkeypatch.setattr(env, "environment", broken)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "unexpected RuntimeError: something odd" in line
    assert "--debug" in line
    assert "zipvl env" in line
    for arguments in (["--debug", "env"], ["env", "--debug"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr


def test_interrupt_is_quiet(monkeypatch):
    from zipvl_adapters.cli import env

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "environment", interrupted)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 130
    assert result.output == ""


def test_env_as_text_and_as_json():
    import torch

    facts = json.loads(zipvl("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["imports"]["torch"].startswith("ok")
    assert facts["gpu"]["available"] == torch.cuda.is_available()
    assert facts["backends"]["reference"]
    text = CliRunner().invoke(app, ["env"]).stdout
    for section in facts:
        assert f"{section}:" in text


def test_env_survives_broken_installations(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "triton.py").write_text("import sys; sys.exit(3)")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = zipvl("env", "--json", env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["imports"]["torchvision"] == "failed: RuntimeError: operator torchvision::nms does not exist"
    assert facts["imports"]["triton"].startswith("failed: SystemExit")


def test_files_appear_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "out"

    def write(text, error=None):
        with whole_files(folder) as workspace:
            (workspace / "a.txt").write_text(text)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("first", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write("first")
    (folder / "other.txt").write_text("of the user")
    with pytest.raises(ValueError, match="half"):
        write("second", ValueError("half"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.txt": "first", "other.txt": "of the user"}
    write("second")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.txt": "second", "other.txt": "of the user"}


@pytest.mark.parametrize(("width", "terminal"), [(20, True), (40, True), (200, True), (20, False), (80, False)])
def test_tables_never_cut_numbers_off(width, terminal):
    import io

    from rich.console import Console

    rows = [[f"model{i}", "a_rather_long_task_name", *(f"{100 * i + j}.125" for j in range(8))] for i in range(3)]
    headings = ["model", "task", *(f"heading\n{j}" for j in range(8))]
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(console, headings, rows, title="title", caption="caption", labels=2)
    printed = console.file.getvalue()
    assert "…" not in printed
    for row in rows:
        for cell in row:
            assert cell in printed
