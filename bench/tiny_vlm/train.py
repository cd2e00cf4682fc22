"""Trains one small model: `python bench/tiny_vlm/train.py llava`. Needs one GPU (a CPU runs a smoke test)."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from capture import CapturedStep
from chats import Batch, ChatBuilder, Feed
from evaluate import accuracy, heldout
from families import (
    FAMILIES,
    VISUAL_TOKENS,
    check_fast_path,
    compile_layers,
    grid_tokens,
    make_model,
    position_ids,
    save_processor,
    text_hidden,
    tower_outputs,
    vision_constants,
    visual_tokens,
)
from losses import CellLoss, answer_loss
from muon import Muon
from narrow import NarrowAttention
from torch import Tensor, nn
from transformers import PreTrainedModel

VISION_SHARE = 0.25  # of the time, first: the vision tower alone learns to read cells, then it rests
NARROW_SHARE = 0.5  # of the time, last: attention is also to spread less, and tokens are evicted
MATRIX_RATE = 3.0  # Muon's learning rate over AdamW's
WEIGHT_DECAY = 0.05
COLUMNS = ["step", "seconds", "cell_loss", "answer_loss", "cell_loss_mid_decoder", "pooled_attention_entropy"]


class Trainer:
    """One model with its losses and optimizer; scheduled weights are tensors, which a captured step reads anew."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.family, self.device = args.family, device
        self.builder = ChatBuilder(args.family)
        self.model: PreTrainedModel = make_model(args.family, self.builder.tokenizer)
        self.model.to(device)
        if args.family == "qwen2_vl":
            self.model.set_attn_implementation({"vision_config": "tiny_flash_equal_lengths"})
        self.narrow = NarrowAttention()
        # A tile of LLaVA-NeXT does not show where in the picture it is; its overview does.
        self.seen_cells = CellLoss(256, measures=args.family != "llava").to(device)
        self.understood_cells, self.overview = (CellLoss(256).to(device) for _ in range(2))
        modules = (self.model, self.seen_cells, self.understood_cells, self.overview)
        self.parameters = [p for m in modules for p in m.parameters()]
        self.rate, self.matrix_rate, self.fade, self.spread = (torch.zeros((), device=device) for _ in range(4))
        gpu = device.type == "cuda"
        matrices = [p for name, p in self.model.named_parameters() if "layer" in name or "blocks" in name]
        self.muon = Muon(matrices, self.matrix_rate, WEIGHT_DECAY)
        rest = [p for p in self.parameters if p not in self.muon.momentum]
        plain = [p for p in rest if p.ndim < 2]
        groups = [{"params": [p for p in rest if p.ndim >= 2]}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=gpu, capturable=gpu
        )
        batch = self.builder.example(args.batch_size).to(device)
        difference = check_fast_path(self.family, self.model, batch.input_ids[:2], batch.images[:2], self.builder.first)
        print(f"{self.family}: fast path within {difference:.1e} of the model's own forward", flush=True)
        self.constants = vision_constants(self.family, self.model, batch.images)
        self.positions = position_ids(self.family, self.model, batch.input_ids)
        self.model.model.language_model.set_attn_implementation(self.narrow.name)
        if args.compile:
            compile_layers(self.family, self.model)
        self.steps = [
            CapturedStep(step, batch, self.clear, gpu and args.capture)
            for step in (self.see_step, self.answer_step, self.narrow_step)
        ]

    def schedule(self, args: argparse.Namespace, progress: float, stage_progress: float, stage_step: int) -> None:
        """Learning rates by warm-up and cosine; cells fade as answers take over; the spread comes in last."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * stage_progress))
        self.rate.fill_(args.lr * cosine * min(1.0, (stage_step + 1) / 300))
        self.matrix_rate.copy_(self.rate * MATRIX_RATE)
        self.fade.fill_(1 - 0.9 * progress)
        self.spread.fill_(args.spread * min(1.0, max(0.0, progress - 1 + NARROW_SHARE) / 0.2))

    def cell_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        cells = self.seen_cells(grid_tokens(self.family, visual), labels)
        if self.family != "llava":
            return cells
        # The overview tokens of LLaVA-NeXT stand for 2 x 2 cells; what is there wins over what is not.
        return cells + self.overview(visual[:, :144], F.max_pool2d(labels.float(), 2).long())

    def see_step(self, batch: Batch) -> list[Tensor]:
        """An update of the vision tower by the cell labels alone."""
        with torch.autocast(self.device.type, torch.bfloat16):
            tower = tower_outputs(self.family, self.model, batch.images, self.constants)
            cells = self.cell_loss(visual_tokens(self.family, self.model, tower), batch.labels)
        self.update(cells)
        return [cells.detach()]

    def answer_step(self, batch: Batch) -> list[Tensor]:
        """An update of everything but the tower, by the answers and the cells."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, *parts = self.answer_losses(batch)
        self.update(loss)
        return parts

    def narrow_step(self, batch: Batch) -> list[Tensor]:
        """The same with tokens evicted, and narrower attention."""
        self.narrow.begin(batch.targets, self.builder.first + VISUAL_TOKENS[self.family])
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, *parts = self.answer_losses(batch)
            spread = self.narrow.collect()
        self.update(loss + self.spread * spread)
        return [*parts, spread.detach()]

    def answer_losses(self, batch: Batch) -> tuple[Tensor, ...]:
        """The weighted sum of the losses, then the losses."""
        first = self.builder.first
        with torch.no_grad():
            tower = tower_outputs(self.family, self.model, batch.images, self.constants)
        visual = visual_tokens(self.family, self.model, tower)
        cells = self.cell_loss(visual, batch.labels)
        middle, last = text_hidden(self.model, batch.input_ids, visual, first, self.positions)
        answers = answer_loss(self.model.lm_head, last, batch.targets)
        seen = grid_tokens(self.family, middle[:, first : first + visual.shape[1]])
        understood = self.understood_cells(seen, batch.labels)
        loss = answers + self.fade * (0.5 * cells + 0.3 * understood)
        return loss, cells.detach(), answers.detach(), understood.detach()

    def update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.muon.step()
        self.clear()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    trainer = Trainer(args, device)
    feed = Feed(args.family, args.batch_size, args.seed, args.workers, device)
    curve: list[list[float]] = []
    step, progress = 0, 0.0
    stages = [0.0, VISION_SHARE, 1 - NARROW_SHARE, 1.0]
    begun = [0, 0, 0]  # the step at which each stage began
    batch = feed.next()
    start = time.perf_counter()
    while progress < 1:
        stage = max(i for i in range(3) if stages[i] <= progress)
        begun[stage + 1 :] = [step + 1] * (2 - stage)
        # The rate's cosine runs over the tower's stage, and again over the two stages of the answers.
        low, high = stages[0:2] if stage == 0 else (stages[1], 1.0)
        trainer.schedule(args, progress, (progress - low) / (high - low), step - begun[min(stage, 1)])
        losses = trainer.steps[stage](batch)
        if step % 200 == 0:
            curve.append([step, round(time.perf_counter() - start, 1), *(round(v.item(), 4) for v in losses)])
            print(
                f"{args.family}:", ", ".join(f"{n} {v}" for n, v in zip(COLUMNS, curve[-1], strict=False)), flush=True
            )
        step += 1
        progress = max((time.perf_counter() - start) / args.seconds, step / args.steps)
        batch = feed.next()
    feed.close()
    end = time.perf_counter()
    model = trainer.model.eval()
    found = accuracy(args.family, model, trainer.builder, heldout(args.heldout), trainer.positions)
    print(f"{args.family}: held-out accuracy {found}", flush=True)
    record = {
        "command": " ".join(["python", "bench/tiny_vlm/train.py", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": step,
        "batch_size": args.batch_size,
        "pictures_drawn": feed.drawn,
        "learning_rate": args.lr,
        "matrix_rate": args.lr * MATRIX_RATE,
        "spread_weight": args.spread,
        "seconds_of_setup": round(start - begin, 1),
        "seconds_of_training": round(end - start, 1),
        "heldout_questions_per_task": args.heldout,
        "heldout_accuracy": found,
        "loss_curve_columns": COLUMNS,
        "loss_curve": curve,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    save(args.family, model, trainer.builder, record, Path(args.out) / args.family)


def save(family: str, model: PreTrainedModel, builder: ChatBuilder, record: dict[str, object], folder: Path) -> None:
    """Writes weights (bf16), configs, tokenizer, image processor and training.json."""
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = builder.tokenizer.eos_token_id
    model.generation_config.pad_token_id = builder.tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    builder.tokenizer.save_pretrained(folder)
    save_processor(family, folder)
    (folder / "training.json").write_text(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--seconds", type=float, default=400, help="training time; the schedule is a function of it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after this many steps at the latest")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--spread", type=float, default=0.001, help="weight of the pooled attention's entropy in the loss"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=400, help="held-out questions per task")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="steps as CUDA graphs")
    parser.add_argument("--out", default="bench/tiny_vlm/models")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
