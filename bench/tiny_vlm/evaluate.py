"""Held-out questions and the exact-match accuracy of a model on them."""

from __future__ import annotations

from multiprocessing import Pool

import torch
from chats import ChatBuilder
from families import text_hidden, tower_outputs, vision_constants, visual_tokens
from pictures import TASKS, Sample, draw_sample
from torch import Tensor
from transformers import PreTrainedModel

Question = tuple[Sample, str, str, str]  # picture, task, question, answer


def heldout(per_task: int, start: int = 0) -> list[Question]:
    """`per_task` questions of every task, at most one a task and picture; picture seeds from `start` on."""
    chosen: dict[str, list[Question]] = {task: [] for task in TASKS}
    with Pool() as pool:
        while min(len(c) for c in chosen.values()) < per_task:
            for sample in pool.imap(draw_sample, range(start, start + 400), chunksize=10):
                for task in {t for t, _, _ in sample.questions}:
                    if len(chosen[task]) < per_task:
                        question, answer = next((q, a) for t, q, a in sample.questions if t == task)
                        chosen[task].append((sample, task, question, answer))
            start += 400
    return [question for task in TASKS for question in chosen[task]]


@torch.no_grad()
def accuracy(
    family: str, model: PreTrainedModel, builder: ChatBuilder, questions: list[Question], positions: Tensor | None
) -> dict[str, float]:
    """Exact-match accuracy per task of greedy answers to single questions.

    Greedy decoding gives exactly the answer if and only if every answer token is the most likely one after the tokens
    before it, so one forward pass decides.
    """
    device = next(model.parameters()).device
    hits: dict[str, list[bool]] = {task: [] for task in TASKS}
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        batch = builder.batch([q[0] for q in part], [[(q[2], q[3])] for q in part]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tower = tower_outputs(family, model, batch.images, vision_constants(family, model, batch.images))
            visual = visual_tokens(family, model, tower)
            _, hidden = text_hidden(model, batch.input_ids, visual, builder.first, positions)
            best = model.lm_head(hidden[:, :-1]).argmax(-1)
        target = batch.targets[:, 1:]
        right = ((best == target) | (target < 0)).all(1)
        for question, hit in zip(part, right.tolist(), strict=True):
            hits[question[1]].append(hit)
    return {task: sum(h) / len(h) for task, h in hits.items()}
