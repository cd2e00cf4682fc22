"""Batches of multi-turn chats about freshly drawn pictures, made by worker processes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from families import image_placeholder
from pictures import LABELS, MEASURES, Sample, draw_sample
from prompts import PROMPTS, make_tokenizer, render
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

QUESTIONS = 12  # a picture: about as many as fit into LENGTH tokens
LENGTH = 280  # of a chat beside its opening
TRAIN_SEED = 10_000_000  # held-out pictures use the seeds below it
IGNORE = -100


@dataclass
class Batch:
    """Pictures uint8 [B, 336, 336, 3], label maps int64 [B, 8, 24, 24], tokens and targets int64 [B, S] (-100: no loss)."""

    images: Tensor
    labels: Tensor
    input_ids: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))

    def copy_(self, other: Batch) -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs, non_blocking=True)

    def pin_memory(self) -> Batch:
        return Batch(*(t.pin_memory() for t in vars(self).values()))


class ChatBuilder:
    """Turns a sample into token ids and targets; `first` is the column of the picture's first token."""

    def __init__(self, family: str) -> None:
        self.tokenizer = make_tokenizer(family)
        image_token = PROMPTS[family].image_token
        # Marks stand where the questions and answers go; what lies between them is the template's own text.
        text = render(self.tokenizer, [("\0", "\1"), ("\0", None)]).replace(image_token, image_placeholder(family))
        self.opening, rest = text.split("\0", 1)
        self.ask, rest = rest.split("\1", 1)
        self.again = rest.split("\0", 1)[0]
        opening = self.encode(self.opening)
        self.prefix = opening
        self.first = opening.index(self.tokenizer.convert_tokens_to_ids(image_token))
        self.length = (len(opening) + LENGTH + 31) // 32 * 32
        self.stop = self.tokenizer.eos_token

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def build(self, turns: list[tuple[str, str]], length: int | None = None) -> tuple[list[int], list[int]]:
        """Ids and targets of a chat, right-padded to `length`; questions that do not fit are left out."""
        length = length or self.length
        ids, targets = list(self.prefix), [IGNORE] * len(self.prefix)
        for i, (question, answer) in enumerate(turns):
            ask = self.encode((self.again.removeprefix(self.stop) if i else "") + question + self.ask)
            reply = self.encode(answer + self.stop)
            if len(ids) + len(ask) + len(reply) > length:
                break
            ids += ask + reply
            targets += [IGNORE] * len(ask) + reply
        pad = length - len(ids)
        return ids + [self.tokenizer.pad_token_id] * pad, targets + [IGNORE] * pad

    def example(self, size: int) -> Batch:
        """A batch of the training's shapes."""
        samples = [draw_sample(seed, QUESTIONS) for seed in range(size)]
        return self.batch(samples, [[(q, a) for _, q, a in s.questions] for s in samples])

    def batch(self, samples: list[Sample], chats: list[list[tuple[str, str]]]) -> Batch:
        pairs = [self.build(chat) for chat in chats]
        return Batch(
            torch.from_numpy(np.stack([np.asarray(s.image) for s in samples])),
            torch.from_numpy(np.stack([np.stack([s.labels[k] for k in (*LABELS, *MEASURES)]) for s in samples])).long(),
            torch.tensor([ids for ids, _ in pairs]),
            torch.tensor([targets for _, targets in pairs]),
        )


class Chats(IterableDataset):
    """An endless stream of batches; every picture has a seed of its own, so none is drawn twice."""

    def __init__(self, family: str, batch_size: int, seed: int) -> None:
        self.family, self.batch_size, self.seed = family, batch_size, seed

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        torch.set_num_threads(1)
        builder = ChatBuilder(self.family)
        seed = TRAIN_SEED + self.seed * 1_000_000_000 + worker
        while True:
            samples = []
            for _ in range(self.batch_size):
                samples.append(draw_sample(seed, QUESTIONS))
                seed += workers
            yield builder.batch(samples, [[(q, a) for _, q, a in s.questions] for s in samples])


class Feed:
    """A pool of batches on the device that a thread keeps renewing, so that drawing never holds up a training step."""

    def __init__(
        self, family: str, batch_size: int, seed: int, workers: int, device: torch.device, size: int = 192
    ) -> None:
        self.drawn = 0
        self._pool: list[Batch] = []
        self._size, self._batch_size, self._device = size, batch_size, device
        self._loader = DataLoader(
            Chats(family, batch_size, seed),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        for batch in self._loader:
            if self._closed.is_set():
                return
            moved = batch.to(self._device)
            self.drawn += self._batch_size
            if len(self._pool) < self._size:
                self._pool.append(moved)
            else:
                self._pool[random.randrange(self._size)] = moved

    def next(self) -> Batch:
        """A random batch of the pool; waits for the first few."""
        while len(self._pool) < min(8, self._size):
            time.sleep(0.05)
        return random.choice(self._pool)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
