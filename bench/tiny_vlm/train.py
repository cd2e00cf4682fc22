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
    check_fast_path,
    compile_layers,
    grid_tokens,
    make_model,
    position_ids,
    save_processor,
    text_hidden,
    vision_constants,
    visual_tokens,
)
from losses import CellLoss, SpreadProbe, answer_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

VISION_SHARE = 0.2  # of the time, first: the vision tower alone learns to read cells, which is quick
COLUMNS = ["step", "seconds", "cell_loss", "answer_loss", "cell_loss_mid_decoder", "pooled_attention_entropy"]


class Trainer:
    """One model with its losses and optimizer; scheduled weights are tensors, which a captured step reads anew."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.family, self.device = args.family, device
        self.builder = ChatBuilder(args.family)
        self.model: PreTrainedModel = make_model(args.family, self.builder.tokenizer)
        if args.start:
            weights = type(self.model).from_pretrained(Path(args.start) / args.family, dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
        self.model.to(device)
        if args.family == "qwen2_vl":
            self.model.set_attn_implementation({"vision_config": "tiny_flash_equal_lengths"})
        self.probe = SpreadProbe()
        self.seen_cells, self.understood_cells, self.overview = (CellLoss(256).to(device) for _ in range(3))
        modules = (self.model, self.seen_cells, self.understood_cells, self.overview)
        self.parameters = [p for m in modules for p in m.parameters()]
        self.rate, self.fade, self.spread = (torch.zeros((), device=device) for _ in range(3))
        plain = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": [p for p in self.parameters if p.ndim >= 2]}, {"params": plain, "weight_decay": 0.0}]
        gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=gpu, capturable=gpu
        )
        batch = self.builder.example(args.batch_size).to(device)
        difference = check_fast_path(self.family, self.model, batch.input_ids[:2], batch.images[:2], self.builder.first)
        print(f"{self.family}: fast path within {difference:.1e} of the model's own forward", flush=True)
        self.constants = vision_constants(self.family, self.model, batch.images)
        self.positions = position_ids(self.family, self.model, batch.input_ids)
        self.model.model.language_model.set_attn_implementation(self.probe.name)
        self.probe.on = True
        if args.compile:
            compile_layers(self.family, self.model)
        self.see = CapturedStep(self.see_step, batch, self.optimizer, gpu and args.capture)
        self.answer = CapturedStep(self.answer_step, batch, self.optimizer, gpu and args.capture)

    def schedule(self, args: argparse.Namespace, progress: float, stage_step: int) -> None:
        """Learning rate by warm-up and cosine; cells fade as answers take over; the spread comes in last."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        self.rate.fill_(args.lr * cosine * min(1.0, (stage_step + 1) / 300))
        self.fade.fill_(1 - 0.9 * progress)
        self.spread.fill_(args.spread * min(1.0, max(0.0, progress - 0.6) / 0.2))

    def cell_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        cells = self.seen_cells(grid_tokens(self.family, visual), labels)
        if self.family != "llava":
            return cells
        # The overview tokens of LLaVA-NeXT stand for 2 x 2 cells; what is there wins over what is not.
        return cells + self.overview(visual[:, :144], F.max_pool2d(labels.float(), 2).long())

    def see_step(self, batch: Batch) -> list[Tensor]:
        """An update of the vision tower by the cell labels alone."""
        with torch.autocast(self.device.type, torch.bfloat16):
            visual = visual_tokens(self.family, self.model, batch.images, self.constants)
            cells = self.cell_loss(visual, batch.labels)
        self.update(cells)
        return [cells.detach()]

    def answer_step(self, batch: Batch) -> list[Tensor]:
        """An update of everything by the answers, the cells, and the spread of the attention."""
        first = self.builder.first
        with torch.autocast(self.device.type, torch.bfloat16):
            visual = visual_tokens(self.family, self.model, batch.images, self.constants)
            cells = self.cell_loss(visual, batch.labels)
            middle, last = text_hidden(self.model, batch.input_ids, visual, first, self.positions)
            answers = answer_loss(self.model.lm_head, last, batch.targets)
            seen = grid_tokens(self.family, middle[:, first : first + visual.shape[1]])
            understood = self.understood_cells(seen, batch.labels)
            spread = self.probe.collect()
        self.update(answers + self.fade * (0.5 * cells + 0.3 * understood) + self.spread * spread)
        return [v.detach() for v in (cells, answers, understood, spread)]

    def update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    trainer = Trainer(args, device)
    feed = Feed(args.family, args.batch_size, args.seed, args.workers, device)
    curve: list[list[float]] = []
    step, answer_steps, progress = 0, 0, 0.0
    batch = feed.next()
    start = time.perf_counter()
    while progress < 1:
        seeing = progress < (0 if args.start else VISION_SHARE)
        trainer.schedule(args, progress, step if seeing else answer_steps)
        losses = (trainer.see if seeing else trainer.answer)(batch)
        answer_steps += not seeing
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
    trainer.probe.on = False
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
    if args.start:
        record["started_from"] = json.loads((Path(args.start) / args.family / "training.json").read_text())
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
    parser.add_argument("--seconds", type=float, default=480, help="training time; the schedule is a function of it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after this many steps at the latest")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=10, help="processes that draw pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--spread", type=float, default=0.001, help="weight of the pooled attention's entropy in the loss"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=400, help="held-out questions per task")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="steps as CUDA graphs")
    parser.add_argument("--start", help="folder of models to go on from (no vision stage); give another --seed")
    parser.add_argument("--out", default="bench/tiny_vlm/models")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
