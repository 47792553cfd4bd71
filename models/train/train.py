#!/usr/bin/env python3
"""Trains the demo model on a text and writes it as a Hugging Face checkpoint.

    python train.py --text input.txt --out ../demo

Balance comes from the selection bias alone, moved after every step; there is no
auxiliary loss. The total loss is next-token plus --mtp-weight times the
multi-token-prediction loss. Matrices inside the layers are trained by Muon, the
embeddings, head, router and norms by AdamW, at one learning rate: linear warm-up,
plateau, then linear decay to a hundredth over the last part of the run.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import corpus
from model import DEMO, Model

WARM_UP_STEPS = 50
DECAY_SHARE = 0.4  # of the run, at its end
FLOOR = 0.01  # of the peak learning rate
GRADIENT_NORM = 1.0
EVALUATION_BATCHES = 12


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokens", type=int, default=2_400_000, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="positions a window")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--balance-speed", type=float, default=4e-3, help="bias step of the router")
    parser.add_argument("--mtp-weight", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=50, help="steps between two lines")
    return parser.parse_args()


def optimizers(model, rate):
    """Muon for what maps rows to rows, AdamW for the rest."""
    inner = [
        p
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.endswith("_proj.weight") or name.endswith("_mqa.weight")
    ]
    taken = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    return muon, adam


def schedule(step, steps):
    """Share of the peak learning rate at `step`."""
    left = (steps - step) / (DECAY_SHARE * steps)
    return max(FLOOR, min(1.0, (step + 1) / WARM_UP_STEPS, left))


@torch.no_grad()
def evaluate(model, windows):
    """Mean (main, MTP) loss over held-out windows."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [torch.stack(model.losses(windows.batch(4))) for _ in range(EVALUATION_BATCHES)]
    for gate in model.gates():
        gate.load.zero_()
    return torch.stack(losses).mean(0).tolist()


def export(model, tokenizer, out, facts):
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.checkpoint(), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    template = (Path(__file__).parent / "chat_template.jinja").read_text().rstrip("\n")
    corpus.write_json(out / "config.json", model.config)
    corpus.write_json(out / "tokenizer_config.json", corpus.tokenizer_config(model.config, template))
    defaults = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    ids = {"bos_token_id": corpus.BOS, "eos_token_id": corpus.EOS, "pad_token_id": corpus.PAD}
    corpus.write_json(out / "generation_config.json", ids | defaults)
    corpus.write_json(out / "training.json", facts)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, held_out = corpus.split(args.text.read_text(encoding="utf-8"))
    tokenizer = corpus.train_tokenizer(training, DEMO["vocab_size"])
    if tokenizer.get_vocab_size() != DEMO["vocab_size"]:
        raise SystemExit(f"{args.text} is too short for a vocabulary of {DEMO['vocab_size']}")
    windows = corpus.Windows(training, tokenizer, args.length + 2, args.seed)
    unseen = corpus.Windows(held_out, tokenizer, args.length + 2, args.seed)
    model = Model(DEMO)
    parameters = sum(p.numel() for p in model.parameters())
    pair = optimizers(model, args.learning_rate)
    steps = max(1, args.tokens // (args.batch * args.length))
    print(f"{parameters / 1e6:.2f} M parameters, {steps} steps of {args.batch} x {args.length} tokens", flush=True)

    begun, smooth, peaks = time.monotonic(), None, []
    for step in range(steps):
        share = schedule(step, steps)
        for optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * share
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            main_loss, mtp_loss = model.losses(windows.batch(args.batch))
        (main_loss + args.mtp_weight * mtp_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer in pair:
            optimizer.step()
        peaks = [gate.balance(args.balance_speed * share) for gate in model.gates()]
        now = torch.stack([main_loss, mtp_loss]).detach()
        smooth = now if smooth is None else 0.95 * smooth + 0.05 * now
        if (step + 1) % args.report_every == 0 or step + 1 == steps:
            print(
                f"step {step + 1}/{steps}  main {smooth[0]:.3f}  mtp {smooth[1]:.3f}  "
                f"busiest expert {max(peaks):.2f}x  {time.monotonic() - begun:.0f} s",
                flush=True,
            )

    held = evaluate(model, unseen)
    print(f"held out: main {held[0]:.3f}  mtp {held[1]:.3f}", flush=True)
    facts = {
        "parameters": parameters,
        "tokens": steps * args.batch * args.length,
        "train_nats": smooth.tolist(),
        "held_out_nats": held,
        "load_max_over_mean": peaks,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    export(model, tokenizer, args.out, facts)


if __name__ == "__main__":
    main()
