"""DQN with a target network: learns to walk along a corridor with a cliff, without any gym.

    python examples/target_network.py

takes some seconds on a CPU. The targets of the loss come from a second network, which follows the
first slowly: by averaging at each step, or as a copy every 10 steps (--hard).
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, smooth_l1_loss

import fused_ema

LENGTH, STEPS, DISCOUNT, WALKERS, BATCH = 12, 500, 0.95, 16, 128


def step(places: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A move of each walker, -1, +1 or a jump of +2: where it is then, its reward, whether done.

    The end is worth 1; a jump onto a multiple of 3 falls off a cliff.
    """
    moved = (places + torch.tensor([-1, 1, 2])[actions]).clamp(0, LENGTH - 1)
    is_over = (actions == 2) & (moved % 3 == 0) & (moved < LENGTH - 1)
    is_there = moved == LENGTH - 1
    return moved, is_there.float() - is_over.float() - 0.01, is_there | is_over


@torch.no_grad()
def reward_of(net: nn.Module) -> float:
    """The mean reward of a walk from each place, choosing what the network values most."""
    places = torch.arange(LENGTH - 1)
    total, is_walking = torch.zeros(len(places)), torch.ones(len(places), dtype=torch.bool)
    for _ in range(2 * LENGTH):
        places, reward, is_done = step(places, net(one_hot(places, LENGTH).float()).argmax(1))
        total += reward * is_walking
        is_walking &= ~is_done
    return total.mean().item()


def train(steps: int = STEPS, is_hard: bool = False) -> float:
    """Trains; returns the mean reward of the network's own walks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(LENGTH, 64), nn.ReLU(), nn.Linear(64, 3))
    target = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    # The target's own tensors are the averages; with a momentum of 1 they are copies.
    settings = {"momentum": 1, "interval": 10} if is_hard else {"momentum": 0.05}
    ema = fused_ema.EMAManager(net, into=target, **settings)
    ema.register_step_post_hook(optimizer)

    memory: list[tuple[Tensor, ...]] = []
    places = torch.zeros(WALKERS, dtype=torch.long)
    for i in range(steps):
        with torch.no_grad():
            actions = net(one_hot(places, LENGTH).float()).argmax(1)
        is_random = torch.rand(WALKERS) < max(0.1, 1 - 2 * i / steps)
        actions = torch.where(is_random, torch.randint(3, (WALKERS,)), actions)
        moved, reward, is_done = step(places, actions)
        memory.append((places, actions, reward, moved, is_done))
        places = torch.where(is_done, torch.randint(LENGTH - 1, (WALKERS,)), moved)

        chosen = [memory[j] for j in torch.randint(len(memory), (BATCH // WALKERS,)).tolist()]
        was, did, got, now, over = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        value = net(one_hot(was, LENGTH).float()).gather(1, did[:, None]).squeeze(1)
        wanted = got + DISCOUNT * target(one_hot(now, LENGTH).float()).amax(1) * ~over
        smooth_l1_loss(value, wanted).backward()
        optimizer.step()  # The hook moves the target network.
        optimizer.zero_grad()
    return reward_of(net)


if __name__ == "__main__":
    print(f"mean reward {train(is_hard='--hard' in sys.argv):.3f}")
