"""The commands on tiny random models of the three shipped families, and on the shipped ones where they are present."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner
from zipvl_adapters.cli import app
from zipvl_adapters.cli.assets import checkout

SYSTEM = "Answer in a word."
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TOKENS = {
    "llava": ("<image>", {"image_token": "<image>"}, "<image>"),
    "internvl": (
        "<ctx>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<ctx>",
            "video_token": "<video>",
        },
        "<ctx>",
    ),
    "qwen2_vl": (
        "<|image_pad|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "plain": ("<unused>", {}, ""),
}
PROCESSORS = {
    "llava": {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "internvl": {"processor_class": "InternVLProcessor", "image_seq_length": 16},
    "qwen2_vl": {"processor_class": "Qwen2VLProcessor"},
}


def make_tokenizer(family):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _, extra, placeholder = TOKENS[family]
    special = ["<end>", "<|vision_start|>", "<|vision_end|>", *dict.fromkeys(extra.values())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SYSTEM, "user: assistant: What is the code?"] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", extra_special_tokens=extra
    )
    fast.chat_template = CHAT.replace("IMAGE", placeholder)
    return fast


def make_model(family, tokenizer):
    import transformers as tf

    image = tokenizer.convert_tokens_to_ids(TOKENS[family][0])
    if family == "plain":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    if family == "llava":
        vision = tf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = tf.LlavaNextConfig(
            vision_config=vision,
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=image,
            image_grid_pinpoints=[[56, 56]],
            vision_feature_layer=-1,
        )
        return tf.LlavaNextForConditionalGeneration(config)
    if family == "internvl":
        vision = tf.InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=7,
        )
        text = tf.Qwen2Config(**TEXT)
        return tf.InternVLForConditionalGeneration(
            tf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=16)
        )
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1, "num_heads": 2, "patch_size": 7}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=image,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def make_image_processor(family):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if family == "llava":
        crop = {"height": 28, "width": 28}
        return LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop, image_grid_pinpoints=[[56, 56]])
    if family == "internvl":
        return GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=False)
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    return Qwen2VLImageProcessorPil(size=size, patch_size=7, merge_size=2)


def save_model(family, folder):
    import torch

    torch.manual_seed(0)
    tokenizer = make_tokenizer(family)
    make_model(family, tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family in PROCESSORS:
        make_image_processor(family).save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(PROCESSORS[family]))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A folder laid out as bench/tiny_vlm: three tiny random models, three pictures of two tasks."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("assets")
    for family in PROCESSORS:
        save_model(family, root / "models" / family)
    save_model("plain", root / "plain")
    (root / "heldout").mkdir()
    items = []
    for i, (task, question) in enumerate(
        [("code", "What is the code?"), ("colour_shape", "What colour is it?"), ("code", "And the other code?")]
    ):
        pixels = np.random.default_rng(i).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "heldout" / f"{i}.png")
        items.append({"image": f"{i}.png", "task": task, "question": question, "answer": "7KQ2"})
    manifest = {"tasks": ["colour_shape", "code"], "items": items}
    (root / "heldout" / "manifest.json").write_text(json.dumps(manifest))
    return root


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_demo_writes_everything_and_prints_the_table(assets, tmp_path):
    out = tmp_path / "deep" / "demo"
    result = call("demo", "--models", assets, "--out", out, "--tau", "0.5", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    names = {"report.html", "results.json", "kept_by_layer.png"} | {f"kept_{family}.png" for family in PROCESSORS}
    assert {path.name for path in out.iterdir()} == names
    record = json.loads((out / "results.json").read_text())
    assert record["settings"]["tau"] == 0.5
    assert set(record["versions"]) >= {"python", "torch", "transformers"}
    scores = {(s["model"], s["task"], s["setting"]): s for s in record["scores"]}
    assert len(scores) == 3 * 2 * 2
    for (model, task, setting), score in scores.items():
        assert score["questions"] == (2 if task == "code" else 1)
        assert score["seconds"] > 0
        if setting == "dense":
            assert score["kept_ratio"] == 1
            continue
        assert len(score["layer_ratios"]) == 3
        assert 0 < min(score["layer_ratios"]) <= score["kept_ratio"] < 1, (model, task)
        assert 0 < score["kv_saved"] < 1
        assert score["kv_saved"] == 1 - score["kv_bytes"] / score["kv_bytes_dense"]
    assert {e["visual_tokens"] for e in record["examples"] if e["model"] != "llava"} == {16}
    for model, task in {(model, task) for model, task, _ in scores}:
        row = next(line for line in result.stdout.splitlines() if f"{task} " in line and line.startswith((model, " ")))
        assert len(row.split()) >= 8
    assert "say nothing about the speed" in " ".join(result.stdout.split())
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "$" not in page.split("</style>")[1].split("data:image")[0]


def test_demo_at_tau_one_agrees_with_the_dense_model(assets, tmp_path):
    result = call(
        "demo", "--models", assets, "--out", tmp_path / "out", "--tau", "1", "--limit", "1", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    for score in json.loads((tmp_path / "out" / "results.json").read_text())["scores"]:
        assert score["agreement"] == 1
        assert score["kept_ratio"] == 1


def test_eval_measures_every_setting(assets, tmp_path):
    options = ["--model", "qwen2_vl", "--model", "llava", "--tau", "0.5", "--tau", "1", "--all-rows", "--device", "cpu"]
    result = call("eval", "--models", assets, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"quality.json", "quality.md", "quality.png"}
    scores = json.loads((tmp_path / "out" / "quality.json").read_text())["scores"]
    settings = ["dense", "tau 1", "tau 0.5", "all rows, tau 1", "all rows, tau 0.5", "fixed as tau 0.5"]
    settings += ["random as tau 0.5"]
    for model in ("qwen2_vl", "llava"):
        for task in ("colour_shape", "code"):
            found = {s["setting"]: s for s in scores if (s["model"], s["task"]) == (model, task)}
            assert list(found) == settings
            kept, fixed = found["tau 0.5"]["kept_ratio"], found["fixed as tau 0.5"]
            assert kept < found["tau 1"]["kept_ratio"] == 1
            # The fixed ratio is rounded up to whole tokens, the same number in every layer.
            assert kept <= fixed["kept_ratio"] < kept + 0.05
            assert max(fixed["layer_ratios"]) - min(fixed["layer_ratios"]) < 1e-9
            assert found["random as tau 0.5"]["layer_ratios"] == pytest.approx(fixed["layer_ratios"])
            assert found["all rows, tau 0.5"]["attention_flops"] > found["tau 0.5"]["attention_flops"]
    table = (tmp_path / "out" / "quality.md").read_text()
    assert all(f"| {setting} |" in table for setting in settings)
    assert "llama" not in result.stdout
    refused = call("eval", "--models", assets, "--model", "gpt")
    assert refused.exit_code == 2
    assert "--model gpt: expected one of llava, internvl, qwen2_vl" in refused.stderr


def test_eval_keeps_what_a_model_gave_when_a_later_one_fails(assets, tmp_path, monkeypatch):
    from zipvl_adapters.cli import evaluate

    opened = evaluate.open_model

    def failing(path, **options):
        if path.endswith("llava"):
            raise MemoryError("no room for it")
        return opened(path, **options)

    monkeypatch.setattr(evaluate, "open_model", failing)
    options = ["--model", "qwen2_vl", "--model", "llava", "--tau", "1", "--limit", "1", "--device", "cpu"]
    result = call("eval", "--models", assets, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "no room for it" in result.stderr
    scores = json.loads((tmp_path / "out" / "quality.json").read_text())["scores"]
    assert {score["model"] for score in scores} == {"qwen2_vl"}


@pytest.mark.parametrize("family", [*PROCESSORS])
def test_run_answers_about_a_picture(assets, family):
    picture = ["--image", assets / "heldout" / "0.png", "--prompt", "What is [bold]this[/bold]?"]
    options = ["--tau", "0.5", "--max-new-tokens", "4", "--compare", "--device", "cpu"]
    result = call("run", "--model", assets / "models" / family, *picture, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("ZipVL, tau = 0.5")
    [kept] = re.findall(r"tokens kept +([\d.]+)%", result.stdout)
    assert 0 < float(kept) < 100
    for line in ("dense", "KV cache, MiB", "attention, GFLOP", "seconds"):
        assert line in result.stdout
    assert "answers." in result.stdout or "the same answer." in result.stdout


def test_run_takes_text_alone(assets):
    options = ["--prompt", "Say something.", "--max-new-tokens", "3", "--device", "cpu", "--dtype", "bfloat16"]
    for folder in (assets / "plain", assets / "models" / "llava"):
        result = call("run", "--model", folder, *options)
        assert result.exit_code == 0, result.stderr
        assert "tokens kept" in result.stdout
    picture = ["--image", assets / "heldout" / "0.png"]
    refused = call("run", "--model", assets / "plain", *options, *picture)
    assert refused.exit_code == 2
    assert "text-only model" in refused.stderr


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_run_refuses_pictures_that_the_processor_cannot_read(assets, tmp_path):
    from PIL import Image

    Image.new("RGB", (4000, 4)).save(tmp_path / "strip.png")
    result = call("run", "--model", assets / "models" / "qwen2_vl", "--image", tmp_path / "strip.png", "--prompt", "hi")
    assert_refused(result, "strip.png", "cannot read it")


def test_models_that_cannot_be_used(assets, tmp_path):
    import torch
    import transformers as tf

    run = ["run", "--prompt", "hi", "--device", "cpu", "--model"]
    assert_refused(call(*run, tmp_path / "missing"), "missing")
    for family in ("llava", "plain"):
        damaged = tmp_path / f"damaged-{family}"
        shutil.copytree(assets / "plain" if family == "plain" else assets / "models" / family, damaged)
        weights = damaged / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
        assert_refused(call(*run, damaged), str(damaged))
    unsupported = tmp_path / "bert"
    config = tf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=320
    )
    tf.BertModel(config).to(torch.bfloat16).save_pretrained(unsupported)
    make_tokenizer("plain").save_pretrained(unsupported)
    assert_refused(call(*run, unsupported), "bert")


def test_demo_leaves_nothing_behind_when_a_model_is_damaged(assets, tmp_path):
    copy = tmp_path / "assets"
    shutil.copytree(assets, copy)
    weights = copy / "models" / "qwen2_vl" / "model.safetensors"  # the last one: the others have run by then
    weights.write_bytes(weights.read_bytes()[:2000])
    result = call("demo", "--models", copy, "--out", tmp_path / "out" / "demo", "--limit", "1", "--device", "cpu")
    assert result.exit_code == 2
    assert "qwen2_vl" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


def test_ctrl_c_ends_quietly_and_leaves_nothing_behind(assets, tmp_path):
    code = "import sys; from zipvl_adapters.cli import main; sys.argv[0] = 'zipvl'; main()"
    arguments = ["demo", "--models", str(assets), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command = [sys.executable, "-c", code, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What runs in a shell's background ignores the signal, and so would its children.
    process = subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    first = process.stderr.readline()  # the first model is being loaded
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert "llava" in first
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


SHIPPED = None if checkout() is None else checkout() / "bench" / "tiny_vlm"


@pytest.mark.skipif(
    SHIPPED is None or not (SHIPPED / "heldout" / "manifest.json").is_file(), reason="the trained models are not here"
)
def test_demo_on_the_shipped_models(tmp_path, monkeypatch):
    monkeypatch.delenv("ZIPVL_MODELS", raising=False)
    result = call("demo", "--out", tmp_path, "--limit", "2", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert {score["model"] for score in scores} == {"llava", "internvl", "qwen2_vl"}
    assert {score["task"] for score in scores} == {"colour_shape", "count", "relation", "code", "chart"}
    dense = [score["accuracy"] for score in scores if score["setting"] == "dense"]
    assert sum(dense) / len(dense) >= 0.85  # 30 answers of models that answer at least 95 % right
    kept = [score["kept_ratio"] for score in scores if score["setting"] == "ZipVL"]
    assert max(kept) < 1
    assert os.path.getsize(tmp_path / "report.html") > 100_000
