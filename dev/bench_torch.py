#!/usr/bin/env python3
"""us.c, PyTorch and llm.c side by side: tokens/s of whole optimizer steps on this CPU. `make bench` calls it.

    python dev/bench_torch.py [--llmc out/bench_llmc] [--seconds 2] [--rounds 3] [SHAPE...]

They take turns of some seconds, in several rounds, and each one's fastest step counts: on a machine that
does other things too, that is the one disturbed least. Without PyTorch its rows are left out: pip install
torch (for a CPU alone: --index-url https://download.pytorch.org/whl/cpu).

The model in PyTorch is us.c's: LayerNorm at the end of each branch, tau, GELU by tanh, multipliers, a head of
its own; AdamW, the fused one. bf16 is autocast: weights, gradients and moments stay FP32, as in us.c (BF16
copies of FP32 masters, kept by hand, came within 2 % of it). Each multiplier stands at the narrower side of
its matmul, where it costs least. us.c's step also takes the gradient's norm.
"""
import argparse, math, os, signal, subprocess, sys, time

os.environ.setdefault("GOMP_SPINCOUNT", "2000")     # gcc's OpenMP, for all: see wait_briefly in train_us.c
try:
    import torch
    F = torch.nn.functional
except ImportError:
    torch = None

SHAPES = ["L4 H4 C256 T256 B4 V256", "L12 H12 C768 T64 B4 V50257"]
COMPILE_SECONDS = 120

def shapes(L, C, T, V):
    """As in reference.py."""
    block = {"qkv": (3 * C, C), "out": (C, C), "ln1.gain": (C,), "ln1.bias": (C,),
             "up": (4 * C, C), "down": (C, 4 * C), "ln2.gain": (C,), "ln2.bias": (C,)}
    blocks = {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    return {"wte": (V, C), "wpe": (T, C)} | blocks | {"lnf.gain": (C,), "lnf.bias": (C,), "head": (V, C)}

def loss_of(p, tokens, targets, L, H):
    """The mean loss of tokens (B,T)."""
    (B, T), C = tokens.shape, p["wpe"].shape[1]
    tau = min(0.4, 0.4 * (4 / L) ** 0.43)
    norm = lambda x, ln: F.layer_norm(x, (C,), p[ln + ".gain"], p[ln + ".bias"])
    join = lambda x, f, ln: math.sqrt(1 - tau) * x + math.sqrt(tau) * norm(f, ln)
    x = math.sqrt(0.5) * (F.embedding(tokens, p["wte"]) + p["wpe"])
    for h in (f"h.{i}." for i in range(L)):
        qkv = F.linear(C**-0.5 * x, p[h + "qkv"]).view(B, T, 3, H, C // H)
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = join(x, C**-0.5 * F.linear(y, p[h + "out"]), h + "ln1")
        g = F.gelu(F.linear(C**-0.5 * x, p[h + "up"]), approximate="tanh")
        x = join(x, (4 * C) ** -0.5 * F.linear(g, p[h + "down"]), h + "ln2")
    logits = F.linear(norm(x, "lnf") / C, p["head"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def torch_cases(L, H, C, T, B, V):
    """Name and step of each way to run one model. What does not compile is said, and left out."""
    start = lambda name, shape: (torch.randn if len(shape) == 2 else
                                 torch.ones if name.endswith("gain") else torch.zeros)(shape)
    p = {name: start(name, shape).requires_grad_() for name, shape in shapes(L, C, T, V).items()}
    optimizer = torch.optim.AdamW(p.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-3, fused=True)
    tokens, targets = torch.randint(0, V, (2, B, T))
    compiled = torch.compile(loss_of)
    def step(function, bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = function(p, tokens, targets, L, H)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    def too_long(*_):
        raise TimeoutError(f"takes over {COMPILE_SECONDS} s")
    signal.signal(signal.SIGALRM, too_long)
    for precision in ("fp32", "bf16"):
        for way, function in (("eager", loss_of), ("compiled", compiled)):
            one = lambda f=function, bf16=precision == "bf16": step(f, bf16)
            signal.alarm(COMPILE_SECONDS)
            try:
                one()
                yield f"PyTorch {precision}, {way}", lambda seconds, one=one: B * T / fastest(one, seconds)
            except Exception as e:                  # no C++ compiler, or no time
                print(f"  PyTorch {precision}, {way}, is left out: {str(e).splitlines()[0]}")
            signal.alarm(0)

def fastest(step, budget):
    """Seconds of the fastest of at least two steps."""
    times, end = [], time.perf_counter() + budget
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)

def program(*command):
    """A program that is given seconds too, and says tokens/s last."""
    return lambda seconds: float(subprocess.run([*command, str(seconds)], check=True, text=True,
                                                stdout=subprocess.PIPE).stdout.split()[-1])

def compare(shape, args):
    ours = ["fp32", "bf16", "fp8"]
    cases = {f"us.c {p}": program("./bench_us", "--one", shape, p) for p in ours}
    if torch:
        cases |= dict(torch_cases(*(int(word[1:]) for word in shape.split())))
    if args.llmc:
        cases["llm.c fp32"] = program(args.llmc, shape)
    best = dict.fromkeys(cases, 0.0)
    for _ in range(args.rounds):
        for name, rate in cases.items():
            best[name] = max(best[name], rate(args.seconds))
    print(f"\n{shape:<28} {'tokens/s':>12}" + "".join(f"{'us.c ' + p:>13}" for p in ours))
    for name, rate in best.items():
        print(f"  {name:<26} {rate:12.1f}" + "".join(f"{best['us.c ' + p] / rate:11.2f} x" for p in ours))
    sys.stdout.flush()

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llmc", help="the program made of bench_llmc.c")
    parser.add_argument("--seconds", type=float, default=2, help="of a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"such as {SHAPES[0]!r}")
    args = parser.parse_args()
    if not torch:
        print(f"no PyTorch in {sys.executable}: `pip install torch`, or `make bench PYTHON=` one that has it")
    if torch or args.llmc:
        others = ([f"PyTorch {torch.__version__}"] if torch else []) + (["llm.c"] if args.llmc else [])
        print(f"\nBeside {' and '.join(others)}, fastest steps in {args.rounds} turns of {args.seconds:g} s; "
              "columns: us.c is so many times as fast")
        for shape in args.shapes or SHAPES:
            compare(shape, args)

if __name__ == "__main__":
    main()
