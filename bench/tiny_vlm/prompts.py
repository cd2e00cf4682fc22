"""One byte-level BPE tokenizer per family, with the family's own special tokens and chat template."""

from __future__ import annotations

from dataclasses import dataclass

from pictures import COLOURS, FIELDS, SHAPES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYSTEM = "You are a careful assistant. Look at the picture and answer the question in as few words as you can."
VOCABULARY = 512

_CHATML = (
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA = (
    "<s>" + SYSTEM + "\n{% for m in messages %}{{ m.role | upper }}:{{ '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{{ '\n' }}{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{{ '\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Prompts:
    """What a family's prompts are made of: special tokens, chat template, and which token stands for a picture."""

    special: tuple[str, ...]
    template: str
    image_token: str
    eos: str
    pad: str
    extra: dict[str, str]


PROMPTS = {
    "llava": Prompts(("<unk>", "<s>", "</s>", "<image>"), _VICUNA, "<image>", "</s>", "<unk>", {"bos_token": "<s>"}),
    "internvl": Prompts(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        _CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
        "<IMG_CONTEXT>",
        "<|im_end|>",
        "<|endoftext|>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "qwen2_vl": Prompts(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        "<|image_pad|>",
        "<|im_end|>",
        "<|endoftext|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    ),
}  # fmt: skip


def _corpus() -> list[str]:
    things = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    return [
        SYSTEM,
        *(f"What colour is the {s}? How many {s}s are there?" for s in SHAPES),
        *(f"What shape is the {c} object? How many {c} objects are there?" for c in COLOURS),
        *(f"Which is further left, the {t} or the {u}? Which is larger?" for t in things for u in things[::7]),
        *(f"What is the {f} code? How many objects are there? What is the value of bar A?" for f in FIELDS),
        *["\nsystem\nuser\nassistant\nUSER:\nASSISTANT:\n"] * 50,
        *(f"{t}" for t in things),
    ]


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A BPE of 512 tokens: all bytes, the words of the tasks, capitals and digits one by one."""
    prompts = PROMPTS[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("USER:|ASSISTANT:|[A-Z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(prompts.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(list(prompts.special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=prompts.eos,
        pad_token=prompts.pad,
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens=prompts.extra,
    )
    fast.chat_template = prompts.template
    return fast


def render(tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str | None]]) -> str:
    """The chat of one picture and its (question, answer) turns; an answer of None asks for one."""
    messages: list[dict] = []
    for i, (question, answer) in enumerate(turns):
        content = ([{"type": "image"}] if i == 0 else []) + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=turns[-1][1] is None)
    assert isinstance(text, str)
    return text
