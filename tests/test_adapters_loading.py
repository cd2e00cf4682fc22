"""Saved models and processors are loaded, and whatever is wrong with them is said in one line."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_models import IMAGE, TEXT_FAMILIES, VISION_FAMILIES, tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zipvl_adapters import LoadError, ZipVLPolicy, attach, load, visual_boxes

SPECIAL = ["<pad>", "<s>", "<|vision_start|>", "<|vision_end|>", "<image>", "<video>", "<unk>", "</s>"]
LETTERS = [chr(c) for c in range(32, 123)]
TEMPLATE = (
    "<s>{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
SQUARE = {"height": 16, "width": 16}


def tokenizer():
    vocabulary = {token: i for i, token in enumerate(SPECIAL + LETTERS)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[^<]"), "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=letters, additional_special_tokens=SPECIAL[2:6], padding_side="left", **names
    )
    made.chat_template = TEMPLATE
    return made


def image_processor(family):
    if family == "llava":
        return transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    if family == "llava_next":
        return transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=[[32, 32]]
        )
    if family == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[32, 32]])
    if family == "internvl":
        return transformers.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def save(family, folder):
    kind = tiny(family, vocab_size=len(SPECIAL + LETTERS))
    kind.model.save_pretrained(folder)
    if family in TEXT_FAMILIES:
        tokenizer().save_pretrained(folder)
    elif family in ("llava", "llava_next"):
        processor = transformers.LlavaProcessor if family == "llava" else transformers.LlavaNextProcessor
        processor(
            image_processor(family),
            tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        ).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
        image_processor(family).save_pretrained(folder)
    return kind


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ask(question):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_saved_vision_model_answers_and_its_boxes_tile_the_picture(family, tmp_path):
    kind = save(family, tmp_path)
    model, processor = load(tmp_path, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    sizes = [(20, 32), (30, 30)]
    prompts = [
        processor.apply_chat_template(ask(q), add_generation_prompt=True, tokenize=False) for q in ("what?", "where?")
    ]
    inputs = processor(
        images=[picture(*size) for size in sizes],
        text=prompts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    inputs["pixel_values"] = torch.as_tensor(inputs["pixel_values"])
    with attach(model, ZipVLPolicy(tau=0.7)) as session:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :])) == 2
    assert session.stats.kept_ratio < 1
    expected = kind.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)

    found = visual_boxes(model.config, inputs, sizes)
    assert len(found) == 2
    for row, (positions, boxes) in zip(inputs["input_ids"], found, strict=True):
        assert torch.equal(positions, (row == IMAGE).nonzero()[:, 0])
        assert boxes.shape == (len(positions), 4)
        assert boxes.dtype == torch.float32
        placed = boxes[~boxes.isnan().any(1)]
        assert (placed[:, 2:] > placed[:, :2]).all()
        area = (placed[:, 2:] - placed[:, :2]).prod(1).sum()
        views = round(float(area))  # the picture once, or once more in tiles
        assert views in (1, 2)
        assert float(area) == pytest.approx(views, abs=1e-4)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_saved_text_model_comes_with_its_tokenizer(family, tmp_path):
    save(family, tmp_path)
    model, processor = load(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert processor("a", add_special_tokens=False)["input_ids"] == [len(SPECIAL) + ord("a") - 32]


def test_boxes_of_anyres_tiles_leave_the_padding_out():
    config = tiny("llava_next").model.config
    inputs = {"input_ids": torch.full((1, 70), IMAGE), "image_sizes": torch.tensor([[20, 32]])}
    ((_, boxes),) = visual_boxes(config, inputs)
    base, tiles = boxes[:16], boxes[16:].view(6, 9, 4)
    torch.testing.assert_close(base[5], torch.tensor([0.25, 0.25, 0.5, 0.5]))
    assert tiles[:, 8].isnan().all()  # newlines
    # 20 x 32 px fill the canvas in width: 8 columns of 4 px; 20 px are 5 rows, shown in 6 with half a row to spare.
    torch.testing.assert_close(tiles[0, 0], torch.tensor([0.0, 0.0, 0.125, 0.1]))
    torch.testing.assert_close(tiles[1, 1], torch.tensor([0.125, 0.1, 0.25, 0.3]))
    torch.testing.assert_close(tiles[5, 7], torch.tensor([0.875, 0.9, 1.0, 1.0]))


def test_boxes_of_internvl_tiles_need_the_pictures_shape():
    config = tiny("internvl").model.config
    ids = torch.tensor([[1, *[IMAGE] * (16 * 5), 9]])
    ((positions, unknown),) = visual_boxes(config, {"input_ids": ids})
    assert len(positions) == 80
    assert unknown[:64].isnan().all()
    assert not unknown[64:].isnan().any()
    ((_, known),) = visual_boxes(config, {"input_ids": ids}, [(40, 40)])
    torch.testing.assert_close(known[16], torch.tensor([0.5, 0.0, 0.625, 0.125]))  # the second tile of 2 x 2
    torch.testing.assert_close(known[64], torch.tensor([0.0, 0.0, 0.25, 0.25]))


def test_boxes_of_qwen_patches_and_of_wrong_prompts():
    config = tiny("qwen2_vl").model.config
    ids = torch.tensor([[0, 0, *[IMAGE] * 12, 9], [1, *[IMAGE] * 12, 9, 9]])
    inputs = {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 8, 6], [1, 4, 12]])}
    (first, boxes), (second, wide) = visual_boxes(config, inputs)
    assert first[0] == 2
    assert second[0] == 1
    torch.testing.assert_close(boxes[4], torch.tensor([1 / 3, 0.25, 2 / 3, 0.5]))
    torch.testing.assert_close(wide[7], torch.tensor([1 / 6, 0.5, 2 / 6, 1.0]))
    with pytest.raises(ValueError, match="12 visual tokens and the prompts hold 24"):
        visual_boxes(config, inputs | {"image_grid_thw": torch.tensor([[1, 8, 6]])})
    with pytest.raises(ValueError, match="model_config"):
        visual_boxes(tiny("llama").model.config, inputs)


def test_prompts_and_pictures_have_to_fit(tmp_path):
    save("qwen2_vl", tmp_path)
    _, processor = load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="1 <image> for 0 pictures"):
        processor(text="<image>what?")
    with pytest.raises(ValueError, match="text: expected"):
        processor(images=picture(16, 16))
    one = processor(images=picture(16, 16), text="<image>what?")
    assert set(one) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    plain = processor(text="what?")
    assert plain["mm_token_type_ids"].sum() == 0


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"not a safetensors file at all")
    elif how == "no weights":
        weights.unlink()
    elif how == "a weight missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop(min(tensors))
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "other model":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif how == "unknown model":
        (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "weights could not be loaded"),
        ("garbage", "weights could not be loaded"),
        ("no weights", "weights could not be loaded"),
        ("a weight missing", "1 weights are missing"),
        ("broken config", "config.json cannot be used"),
        ("no config", "no config.json"),
        ("other model", "'bert' is not supported"),
        ("unknown model", "config.json cannot be used"),
        ("no tokenizer", "processor could not be loaded"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(how, words, tmp_path):
    save("qwen2_vl", tmp_path)
    damage(tmp_path, how)
    with pytest.raises(LoadError, match=words) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_a_file_and_a_wrong_device(tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        load(tmp_path / "nowhere")
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(LoadError, match="got a file"):
        load(file)
    save("llama", tmp_path)
    with pytest.raises(LoadError, match=r"device: expected"):
        load(tmp_path, device="toaster")


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(LoadError, match=r"the hub does not give it either \(Name or service not known\)") as caught:
        load("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_torchvision_that_does_not_import_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError, match=r"torchvision is installed and does not import .*nms"):
        load("org/model")


def test_tiny_pictures_are_whole():
    """The fixtures of this file: 16 px towers with patches of 4 px make 4 x 4 tokens."""
    assert math.isqrt(tiny("llava").picture_tokens) == 4
