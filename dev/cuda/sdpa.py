#!/usr/bin/env python3
"""Times FlashAttention-2 as PyTorch has it (scaled_dot_product_attention, causal, BF16) at the large shapes of
attention_forward.cu and attention_backward.cu, to compare with their tables: needs torch 2.3 or later and a GPU. FLOPs
are counted as there: two products forward, five backward, of each the half that the mask leaves. As there, arrays
rotate so that nothing is found in the cache."""
import itertools
import statistics
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    sys.exit("sdpa.py: PyTorch (2.3 or later) is not installed")
if not torch.cuda.is_available():
    sys.exit("sdpa.py: PyTorch finds no GPU")

SHAPES = [(8, 1024, 768, 12), (4, 1024, 1600, 25)]  # B T C H
COPIES = 5  # of some 38 MB and more


def median_us(run, runs=10):
    """The median of 30 samples of so many runs each; the GPU sleeps first, so that the host gets ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for i in range(3 * runs):
        run()
    torch.cuda._sleep(200_000_000)
    events[0].record()
    for event in events[1:]:
        for i in range(runs):
            run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * a.elapsed_time(b) / runs for a, b in itertools.pairwise(events))


print(f"## PyTorch {torch.__version__} (FlashAttention-2) on {torch.cuda.get_device_name()}\n")
print("| B T C H | forward us | TFLOP/s | backward us | TFLOP/s |\n|---|---|---|---|---|")
for B, T, C, H in SHAPES:
    sets = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for i in range(COPIES):
            qkv = torch.randn(B, T, 3, H, C // H, device="cuda", dtype=torch.bfloat16)
            q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            sets.append((q, k, v, y, torch.randn_like(y)))
        turn = itertools.cycle(sets)

        def forward():
            torch.nn.functional.scaled_dot_product_attention(*next(turn)[:3], is_causal=True)

        def backward():
            q, k, v, y, dy = next(turn)
            torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)

        with torch.no_grad():
            forward_us = median_us(forward)
        backward_us = median_us(backward)
    flops = 2 * B * T * T * C
    print(f"| {B} {T} {C} {H} | {forward_us:.1f} | {flops / forward_us * 1e-6:.0f} "
          f"| {backward_us:.1f} | {2.5 * flops / backward_us * 1e-6:.0f} |")
