"""Throughput of token pruning: images per second at every keep ratio, beside the ideal and the paper's.

    python tests/benchmarks/bench_token_pruning.py                                         # the protocol; for a GPU
    python tests/benchmarks/bench_token_pruning.py --warmup 2 --iterations 1 --repeats 25  # five minutes on two cores

Batch 32 of 256 × 128 pixels that are on the device already, float32 without TF32 as in the paper, eval and inference
mode; every repeat measures all networks in turn, between synchronisations. A ratio is the median of the repeats'
ratios, the spread their middle half: what slows a whole repeat cancels. The limit is the ratio of
multiply-accumulates; the obvious alternative masks tokens instead of removing them.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import timm
import torch

from models.token_pruning import PrunedViT, PrunedViTConfig, gumbel_noise, ideal_macs

PAPER = {0.5: 2269 / 1074, 0.6: 1843 / 1074, 0.7: 1585 / 1074, 0.8: 1392 / 1074, 0.9: 1279 / 1074}  # table V, DeiT-S


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=50, help="passes before the first repeat")
    parser.add_argument("--iterations", type=int, default=30, help="passes of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.repeats < 2 or args.iterations < 1 or args.warmup < 0:
        parser.error("at least 2 repeats of 1 pass, and no negative warm-up")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    fused = PrunedViT(PrunedViTConfig(backbone=args.backbone)).backbone.blocks[0].attn.fused_attn
    print(f"{name}; torch {torch.__version__}, timm {timm.__version__}; {args.backbone}, batch {args.batch}, "
          f"{args.precision}, fused attention {fused}, compiled {args.compile}; {args.warmup} passes of warm-up, "
          f"median of {args.repeats} × {args.iterations}")  # fmt: skip

    images = torch.randn(args.batch, 3, 256, 128, generator=torch.Generator().manual_seed(0)).to(device)
    networks = {"no pruning": network(args, device, pruning=False)}
    networks |= {p: network(args, device, keep_ratio=p) for p in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}
    run = {key: torch.compile(net) if args.compile else net for key, net in networks.items()}
    works: dict[str | float, Callable[[], object]] = {key: functools.partial(net, images) for key, net in run.items()}
    works["masked, p = 0.7"] = lambda: networks[0.7].masked(images)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        seconds = measured(works, device, args)
    plain = networks["no pruning"]
    base = ideal_macs(plain.num_tokens, plain.backbone.embed_dim, len(plain.backbone.blocks), 3 * 16 * 16)
    print(f"{'':16} {'images/s':>9} {'GMACs':>8} {'ratio':>7} {'ideal':>7} {'of ideal':>9} {'paper':>7}   spread")
    for key, runs in seconds.items():
        net = networks.get(key)
        net = net or networks[1.0]  # masks cost what dropping nothing costs
        if net.config.pruning:
            macs = ideal_macs(net.num_tokens, net.backbone.embed_dim, len(net.backbone.blocks), 3 * 16 * 16,
                              net.config.stages, net.counts)  # fmt: skip
        else:
            macs = base
        speed = args.batch / statistics.median(runs)
        ratios = [whole / own for whole, own in zip(seconds["no pruning"], runs, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        paper = f"{PAPER[key]:.3f}" if key in PAPER and "deit_small" in args.backbone else ""
        label = key if isinstance(key, str) else f"p = {key}"
        print(f"{label:16} {speed:9.1f} {macs / 1e9:8.4f} {ratio:7.3f} {base / macs:7.3f} "
              f"{100 * ratio * macs / base:8.1f}% {paper:>7}   {low:.3f} to {high:.3f}")  # fmt: skip
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    training = measured(
        {"without": lambda: step(plain, images), "with": lambda: step(networks[0.7], images)},
        device,
        args,
        2,
        min(3, args.iterations),
    )
    ratio = statistics.median(a / b for a, b in zip(training["with"], training["without"], strict=True))
    print(f"a training step (float32, not compiled) takes {ratio:.2f} × one without pruning: nothing is removed there")


def network(args: argparse.Namespace, device: torch.device, **changes) -> PrunedViT:
    torch.manual_seed(0)
    return PrunedViT(PrunedViTConfig(backbone=args.backbone, **changes)).to(device).eval()


def step(net: PrunedViT, images: torch.Tensor) -> None:
    noise = gumbel_noise(torch.rand(len(images), 3, net.num_tokens, 2, device=images.device))
    net.trained(images, noise).feature_BD.square().mean().backward()


def measured(
    works: dict,
    device: torch.device,
    args: argparse.Namespace,
    warmup: int | None = None,
    iterations: int | None = None,
) -> dict:
    """Seconds of one pass, for every repeat; the networks take turns, so that a slow minute meets all of them."""
    warmup, iterations = args.warmup if warmup is None else warmup, iterations or args.iterations
    for work in works.values():
        for _ in range(warmup):
            work()
    found: dict = {key: [] for key in works}
    for _ in range(args.repeats):
        for key, work in works.items():
            synchronise(device)
            started = time.perf_counter()
            for _ in range(iterations):
                work()
            synchronise(device)
            found[key].append((time.perf_counter() - started) / iterations)
    return found


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
