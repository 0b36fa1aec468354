"""The loss alone: ours beside the plain one and PyTorch's `linear_cross_entropy`, in seconds and memory.

    python benches/loss.py [--tokens 4096] [--trained 0.4]

Each runs in a process of its own. The value and the gradients of all are compared first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sftcore.train.loss import Objective, chunked_losses, default_chunk_size

WIDTH, VOCABULARY = 576, 49152  # SmolLM2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once."""
    return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own chunks, over all tokens."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def chunked(gradients_in_forward: bool) -> Loss:
    """Ours: trained tokens alone, in chunks."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        trained = labels != -100
        return chunked_losses(
            hidden[trained],
            labels[trained],
            None,
            head=lambda part: part @ weight.T,
            parameters=[weight] if weight.requires_grad else [],  # type: ignore[list-item]
            objective=Objective(),
            chunk_size=default_chunk_size(VOCABULARY, hidden.device),
            gradients_in_forward=gradients_in_forward,
        ).total

    return loss


METHODS: dict[str, Loss] = {
    "plain": plain,
    "torch, chunks": torchs,
    "sftcore": chunked(True),
    "sftcore, again in the backward pass": chunked(False),
}


def inputs(tokens: int, trained: float, train_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.1).requires_grad_(train_head)
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[torch.rand(tokens) >= trained] = -100
    return hidden, weight, labels


def check() -> None:
    """Asserts that all give the same value and gradients."""
    hidden, weight, labels = inputs(300, 0.5, True)
    expected: tuple[Tensor, ...] | None = None
    for name, method in METHODS.items():
        loss = method(hidden, weight, labels)
        found = (loss.detach(), *torch.autograd.grad(loss, [hidden, weight]))
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5), name


def measure(name: str, tokens: int, trained: float, train_head: bool) -> dict[str, float]:
    hidden, weight, labels = inputs(tokens, trained, train_head)
    wanted = [hidden, weight] if train_head else [hidden]
    torch.autograd.grad(METHODS[name](hidden[:64], weight, labels[:64]), wanted)
    # Linux forgets the peak so far
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kilobytes()
    started = time.perf_counter()
    torch.autograd.grad(METHODS[name](hidden, weight, labels), wanted)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "megabytes": (peak_kilobytes() - before) / 1024}


def peak_kilobytes() -> int:
    """Returns the largest resident size of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--trained", type=float, default=0.4)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--train_head", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        found = measure(options.method, options.tokens, options.trained, options.train_head)
        print(json.dumps(found))
        return
    check()
    print(
        f"{options.tokens} tokens, {options.trained:.0%} trained, head {WIDTH} x {VOCABULARY}, float32, "
        f"{torch.get_num_threads()} threads; values and gradients are equal"
    )
    for train_head in (False, True):
        base = 0.0
        for name in METHODS:
            command = [sys.executable, __file__, "--method", name, "--tokens", str(options.tokens)]
            command += ["--trained", str(options.trained)] + ["--train_head"] * train_head
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(output)
            base = base or found["seconds"]
            head = "trained" if train_head else "frozen"
            print(
                f"head {head:<8} {name:<36} {found['seconds']:6.2f} s {found['seconds'] / base:5.2f} x "
                f"{found['megabytes']:7.0f} MB beyond inputs"
            )


if __name__ == "__main__":
    main()
