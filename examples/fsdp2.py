"""Trains a small transformer that FSDP2 shards, and keeps the average of its weights.

    torchrun --nproc-per-node 2 examples/fsdp2.py --folder run

runs on two processes: on GPUs (nccl) where there are any, else on the CPU (gloo). Kill it and start
it again, on two processes or on any other number, and it goes on from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fused_ema

TOKENS, LENGTH, WIDTH, BATCH = 32, 16, 64, 12  # Of the batch each process takes a part.


class Transformer(nn.Module):
    """Learns to predict the next token; its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Of sequences of LENGTH + 1 tokens."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, tokens.device)
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).transpose(1, 2), tokens[:, 1:])


class Weights:
    """Model and optimizer, as torch.distributed.checkpoint saves them and reshards them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.both = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """DTensors, under the names of the model."""
        model, optimizer = get_state_dict(*self.both)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the same form."""
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(*self.both, model_state_dict=model, optim_state_dict=optimizer)


def batch(step: int, device: torch.device) -> Tensor:
    """Sequences that count, each by a number of its own: of one step the same in every process."""
    first, by = torch.randint(TOKENS, (2, BATCH, 1), generator=torch.Generator().manual_seed(step))
    return ((first + by * torch.arange(LENGTH + 1)) % TOKENS).to(device)


@torch.no_grad()
def evaluate(model: nn.Module, device: torch.device) -> float:
    """The loss on sequences that no step trains on; every process computes it."""
    model.eval()
    loss = model(batch(2**31, device)).item()
    model.train()
    return loss


def train(folder: Path, steps: int, save_every: int, device: torch.device) -> None:
    """Trains up to a step, from where the folder's last checkpoint stands."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # After sharding: each process averages the shards that it holds, and sends nothing.
    ema = fused_ema.EMAManager(model, momentum=0.05)
    ema.register_step_post_hook(optimizer)

    everything = {"weights": Weights(model, optimizer), "ema": ema}
    # A save writes .metadata last: a folder without it isn't complete.
    complete = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if complete:
        dcp.load(everything, checkpoint_id=folder / str(max(complete)))

    for step in range(ema.iteration, steps):
        model(batch(step, device)[rank::world]).backward()
        optimizer.step()  # The hook updates the average.
        optimizer.zero_grad()
        if (step + 1) % save_every == 0:
            raw = evaluate(model, device)
            with ema.swapped():  # In here the model holds the average.
                averaged = evaluate(model, device)
            dcp.save(everything, checkpoint_id=folder / str(step + 1))
            if rank == 0:
                print(f"step {step + 1}: loss {raw:.4f}, averaged {averaged:.4f}", flush=True)


def main() -> None:
    """One of the processes that torchrun starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args.folder, args.steps, args.save_every, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
