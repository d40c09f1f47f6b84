#!/usr/bin/env python3
"""Times PyTorch's causal scaled_dot_product_attention in BF16 at the large shapes of attention_forward.cu and
attention_backward.cu, to compare with their tables: needs torch and a GPU. FLOPs are counted as there: two
products forward, five backward, of each the half that the mask leaves."""
import statistics
import sys

try:
    import torch
except ImportError:
    sys.exit("sdpa.py: PyTorch is not installed")
if not torch.cuda.is_available():
    sys.exit("sdpa.py: PyTorch finds no GPU")

SHAPES = [(8, 1024, 768, 12), (4, 1024, 1600, 25)]  # B T C H


def median_us(run):
    """The median of 50 runs, each between two events, after 10 that nobody times."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(60)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in pairs[10:])


print(f"## PyTorch {torch.__version__} on {torch.cuda.get_device_name()}\n")
print("| B T C H | forward us | TFLOP/s | backward us | TFLOP/s |\n|---|---|---|---|---|")
for B, T, C, H in SHAPES:
    qkv = torch.randn(B, T, 3, H, C // H, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))

    def attention():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    y = attention()
    dy = torch.randn_like(y)
    with torch.no_grad():
        forward = median_us(attention)
    backward = median_us(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))
    flops = 2 * B * T * T * C
    print(f"| {B} {T} {C} {H} | {forward:.1f} | {flops / forward * 1e-6:.0f} "
          f"| {backward:.1f} | {2.5 * flops / backward * 1e-6:.0f} |")
