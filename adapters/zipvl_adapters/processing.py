"""A processor for pictures and text where transformers' own cannot be built, since that insists on torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.utils.hub import cached_file

from zipvl_adapters import internvl
from zipvl_adapters.families import IMAGE_BOXES, image_token_id

# Model types whose processor also builds a video processor, which needs torchvision, and their image processor in PIL.
PIL_IMAGE_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionImageProcessorPil",
    "internvl": "GotOcr2ImageProcessorPil",
    "qwen2_vl": "Qwen2VLImageProcessorPil",
    "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    "qwen3_vl": "Qwen2VLImageProcessorPil",
}


class PictureProcessor:
    """Pictures and text to what `generate()` takes, without torchvision and without video.

    A prompt holds one image token for each of its pictures; each becomes as many as the model makes of the picture.
    """

    def __init__(
        self, config: PreTrainedConfig, tokenizer: Any, image_processor: Any, chat_template: str | None
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template
        self.image_token = str(tokenizer.convert_ids_to_tokens(image_token_id(config)))

    @classmethod
    def from_pretrained(cls, source: str, config: PreTrainedConfig, revision: str | None = None) -> PictureProcessor:
        """From a folder or hub id; raises what transformers raises."""
        where = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        image_processor_class = getattr(transformers, PIL_IMAGE_PROCESSORS[config.model_type])
        image_processor = image_processor_class.from_pretrained(source, **where)
        template = tokenizer.chat_template
        if template is None:
            # Older repositories keep the template in a file of the processor alone.
            found = cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False, **where)
            template = json.loads(Path(found).read_text())["chat_template"] if found else None
        return cls(config, tokenizer, image_processor, template)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and the pictures' tensors; `kwargs` go to the tokenizer.

        images: one picture or a list of them, in the order of the prompts. Raises ValueError when prompts and pictures
        do not fit together.
        """
        if text is None:
            raise ValueError("text: expected a prompt or a list of prompts, got None")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        placeholders = sum(prompt.count(self.image_token) for prompt in prompts)
        if placeholders != len(pictures):
            raise ValueError(
                f"text: the prompts hold {placeholders} {self.image_token} for {len(pictures)} pictures; "
                "expected one for each"
            )
        vision: dict[str, Tensor] = {}
        if pictures:
            vision = dict(self.image_processor(images=pictures, return_tensors="pt"))
            runs = iter(self._placeholders(vision, len(pictures)))
            prompts = [self._expand(prompt, runs) for prompt in prompts]
        encoded = dict(self.tokenizer(prompts, return_tensors=return_tensors, **kwargs))
        if self.config.model_type.startswith("qwen"):
            encoded["mm_token_type_ids"] = (encoded["input_ids"] == image_token_id(self.config)).int()
        return BatchFeature(encoded | vision)

    def _placeholders(self, vision: dict[str, Tensor], pictures: int) -> list[str]:
        """What stands in the prompt for each picture; takes out of `vision` what models do not take."""
        tiles = vision.pop("num_patches", torch.ones(pictures, dtype=torch.int64))
        vision.pop("batch_num_images", None)
        kind = self.config.model_type
        if kind == "internvl":
            lengths = [int(n) * internvl.tokens_of_a_tile(self.config) for n in tiles]
            begin = getattr(self.tokenizer, "start_image_token", "<img>")
            end = getattr(self.tokenizer, "end_image_token", "</img>")
            return [f"{begin}{self.image_token * n}{end}" for n in lengths]
        boxes = IMAGE_BOXES[kind](self.config, vision, torch.zeros(1, 1, dtype=torch.bool), None)
        return [self.image_token * len(picture) for picture in boxes]

    def _expand(self, prompt: str, runs: Any) -> str:
        first, *rest = prompt.split(self.image_token)
        return first + "".join(next(runs) + part for part in rest)

    def apply_chat_template(self, messages: Any, *, tokenize: bool = False, **kwargs: Any) -> str:
        """The prompt for `messages`, as text."""
        if tokenize:
            raise ValueError("tokenize: expected False; give the returned text and the pictures to the processor")
        if self.chat_template is None:
            raise ValueError("chat_template: this model comes without one; write the prompt yourself")
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **kwargs
        )
        return str(rendered)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return str(self.tokenizer.decode(*args, **kwargs))
