#!/usr/bin/env python3
"""The arithmetic of us.c once more, in PyTorch: slow, short, written from the papers and not from the C.

    python dev/reference.py --selftest                           the reference checks itself
    python dev/reference.py --check dump.safetensors             the C trainer's first step, its --dump
    python dev/reference.py --write dev/debug_state.safetensors  the state that the C tests compare with

needs: pip install torch numpy safetensors ml_dtypes

Papers: [µS] Narayan, Gupta, Paul, Blalock, "µnit Scaling", arXiv 2502.05967;
        [u-µP] Blake et al., "The Unit-Scaled Maximal Update Parametrization", arXiv 2407.17465.

Two models: `us` is µnit Scaling; `sp`, to compare with, is a GPT-2-like pre-LayerNorm model with every
multiplier 1. Three precisions: `fp32` rounds nothing; `bf16` rounds wherever a trainer stores BF16; `fp8`
also rounds the operands of the hidden matmuls, to E4M3 going forward and to E5M2 for the gradients.

Everything between two roundings is float64, so rounding is all the error there is. Only the forward pass is
written down; autograd derives the backward. One hand-made autograd.Function, Point, marks what a trainer
stores: what a value is rounded to on the way forward, and what its gradient is rounded to on the way back.

A correct FP32 trainer still differs a little: its sums depend on their order, so now and then a value falls
on the other side of a rounding boundary. In FP8 such a flip is 6 to 12 % of an element (E5M2: twice that)
and causes others. How far that carries is measured, not guessed: the model runs again in float32, with every
sum in random order, and the distance of these runs from the float64 run, the spread, is what a comparison
allows. Small models flip seldom and make sharp tests; for large ones fp32 is sharp, bf16 and fp8 are coarse.
"""
import argparse, importlib, json, math, os, struct, sys
from types import SimpleNamespace

def stop(message):
    sys.exit("reference.py: " + message)

def need(package):
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:                            # of this package, or of one that it needs
        package = e.name.partition(".")[0]
        stop(f"the package {package} is missing; install it with: pip install {package}")

np, safetensors, torch = need("numpy"), need("safetensors"), need("torch")
F = torch.nn.functional
torch.set_num_threads(1)

# ---- Number formats: BF16 (7 mantissa bits, the exponents of FP32) and the OCP 8-bit formats E4M3 and E5M2 -

BF16_MAX, E4M3_MAX, E5M2_MAX = (2 - 2.0**-7) * 2.0**127, 448.0, 57344.0

def nearest(x, bits, least):
    """The nearest number with `bits` mantissa bits, ties to even; 2^least is the least normal number."""
    mantissa, _ = torch.frexp(x)                                # x = mantissa 2^e, 1/2 <= |mantissa| < 1
    binade = torch.where(x == 0, torch.ones_like(x), x / (2 * mantissa))   # 2^(e-1), exactly
    ulp = binade.clamp(min=2.0**least) * 2.0**-bits             # below the least normal: subnormals
    return torch.round(x / ulp) * ulp                           # torch.round sends ties to even

def bf16(x):                                                    # as IEEE: what is too large becomes infinite
    y = nearest(x, 7, -126)
    y = torch.where(y.abs() > BF16_MAX, torch.copysign(torch.full_like(x, math.inf), x), y)
    return torch.where(x.isfinite(), y, x)

def e4m3(x):                                                    # clip (infinities too), round; NaN stays NaN
    return nearest(x.clamp(-E4M3_MAX, E4M3_MAX), 3, -6)

def e5m2(x):
    return nearest(x.clamp(-E5M2_MAX, E5M2_MAX), 2, -14)

def exact(x):
    return x.clone()

class Point(torch.autograd.Function):
    """A place where a tensor is stored: `value` maps it going forward, `grad` maps its gradient going back.
    The derivative of `value` is taken to be 1 (straight through)."""
    @staticmethod
    def forward(ctx, x, value, grad):
        ctx.grad = grad
        return value(x)
    @staticmethod
    def backward(ctx, d):
        return ctx.grad(d), None, None

NOISE = 4  # float32 runs exaggerate FP32's errors this many times, so that a few runs find what may flip

class ShuffledMatmul(torch.autograd.Function):
    """a b, and both products of its backward: summed in a random order, in eight parts one after another.
    To exaggerate, the distance to a second order is added: 0 where FP32 sums are exact, as FP8's may be."""
    @staticmethod
    def product(a, b, random):
        def shuffled():
            parts = torch.randperm(a.shape[-1], generator=random).chunk(8)
            return sum(a[..., k] @ b[..., k, :] for k in parts)
        y = shuffled()
        return y + (NOISE - 1) * (y - shuffled())
    @staticmethod
    def forward(ctx, a, b, random):
        ctx.save_for_backward(a, b)
        ctx.random = random
        return ShuffledMatmul.product(a, b, random)
    @staticmethod
    def backward(ctx, d):
        a, b = ctx.saved_tensors
        return ShuffledMatmul.product(d, b.mT, ctx.random), ShuffledMatmul.product(a.mT, d, ctx.random), None

class Numerics:
    """What is rounded to what: in float64, or, given a seed, in float32 with noise."""
    def __init__(self, precision, seed=None):
        self.dtype = torch.float64 if seed is None else torch.float32
        self.random = None if seed is None else torch.Generator().manual_seed(seed)
        self.casts = []                                         # (format, share flushed to 0, number clipped)
        self.R = exact if precision == "fp32" else bf16         # the stream, every output, every gradient
        self.operand = self.grad_operand = self.R               # operands of the hidden matmuls
        if precision == "fp8":                                  # always rounded from their BF16 values
            self.operand = lambda x: self.cast(e4m3, E4M3_MAX, bf16(x))
            self.grad_operand = lambda d: self.cast(e5m2, E5M2_MAX, bf16(d))

    def cast(self, to, top, x):
        y = to(x)
        flushed = ((y == 0) & (x != 0)).sum() / (x != 0).sum().clamp(min=1)
        self.casts.append((to.__name__, flushed.item(), (x.abs() > top).sum().item()))
        return y

    def matmul(self, a, b):
        return a @ b if self.random is None else ShuffledMatmul.apply(a, b, self.random)

    def jitter(self, x):
        if self.random is None:
            return x.clone()
        return x * (1 + NOISE * 2.0**-23 * (2 * torch.rand(x.shape, generator=self.random) - 1))

    def inexact(self, f, x):
        """f(x) and its derivative: the same to the last bit in no two implementations."""
        return Point.apply(f(Point.apply(x, exact, self.jitter)), self.jitter, exact)

# ---- The model ---------------------------------------------------------------------------------------------

def shapes(layers, C, T, Vp):
    """Parameter names and shapes. Vp: rows of the vocabulary, padded. qkv: rows of Q, of K, of V."""
    block = {"qkv": (3 * C, C), "out": (C, C), "ln1.gain": (C,), "ln1.bias": (C,),
             "up": (4 * C, C), "down": (C, 4 * C), "ln2.gain": (C,), "ln2.bias": (C,)}
    blocks = {f"h.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    return {"wte": (Vp, C), "wpe": (T, C)} | blocks | {"lnf.gain": (C,), "lnf.bias": (C,), "head": (Vp, C)}

def layernorm(x, gain, bias):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5) * gain + bias

ACTIVATIONS = {                                                 # compared in [µS] A.7
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x * torch.sigmoid(x),
}

def linear(x, W, alpha, num):
    """Y = alpha X W^T; autograd gives dX = alpha dY W and dW = alpha dY^T X: the same alpha, [µS] table 1.
    Y and dX are stored in BF16; X and W meet in E4M3 and dY in E5M2; dW is not rounded."""
    rows = Point.apply(x.reshape(-1, x.shape[-1]), num.operand, num.R)
    y = alpha * num.matmul(rows, Point.apply(W, num.operand, exact).T)
    return Point.apply(y, num.R, num.grad_operand).reshape(*x.shape[:-1], -1)

def attention(qkv, heads, num):
    """softmax(Q K^T / sqrt(D)) V, causal. Scores and probabilities are never stored, so not rounded."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (z.reshape(B, T, heads, C // heads).transpose(1, 2) for z in qkv.split(C, dim=-1))
    scores = num.matmul(q, k.mT) / math.sqrt(C // heads)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    P = num.inexact(lambda s: torch.softmax(s, dim=-1), scores)
    return num.matmul(P, v).transpose(1, 2).reshape(B, T, C)

def forward(p, tokens, targets, cfg, num):
    """Cross-entropy of every position (B,T), and the stored activations by name."""
    us, act = cfg.scheme == "us", {}
    a, b = math.sqrt(1 - cfg.tau), math.sqrt(cfg.tau)
    stored = lambda z: Point.apply(z, num.R, num.R)             # R of the value, R of the summed gradient
    alpha = lambda W: 1 / math.sqrt(W.shape[1]) if us else 1.0  # 1/sqrt(fan_in), [µS] table 2
    norm = lambda z, ln: num.inexact(lambda z: layernorm(z, p[ln + ".gain"], p[ln + ".bias"]), z)
    # sp: LayerNorm opens a branch; us: it closes it, [µS] eq. 11, fig. 4a
    enter = lambda x, ln: x if us else Point.apply(norm(x, ln), num.R, exact)
    leave = lambda x, f, ln: stored(a * x + b * norm(f, ln) if us else x + f)

    wte, wpe = Point.apply(p["wte"], num.R, exact), Point.apply(p["wpe"], num.R, exact)
    # sqrt(1/2): the sum of two rows of RMS 1 has RMS 1
    x = act["x0"] = stored((wte[tokens] + wpe[:tokens.shape[1]]) * (math.sqrt(0.5) if us else 1.0))
    for h in (f"h.{i}." for i in range(cfg.layers)):
        hidden = lambda x, name: linear(x, p[h + name], alpha(p[h + name]), num)
        qkv = hidden(enter(x, h + "ln1"), "qkv")
        y = Point.apply(attention(qkv, cfg.heads, num), num.R, exact)  # dy is rounded as the dX of `out`
        out = hidden(y, "out")
        mid = leave(x, out, h + "ln1")
        up = hidden(enter(mid, h + "ln2"), "up")
        g = Point.apply(num.inexact(ACTIVATIONS[cfg.activation], up), num.R, exact)
        down = hidden(g, "down")
        x = leave(mid, down, h + "ln2")
        act |= {h + k: z for k, z in dict(qkv=qkv, y=y, out=out, mid=mid, up=up, g=g, down=down, x=x).items()}

    # The head: logits = (1/C) x W^T, [µS] table 2, in BF16; rows beyond the vocabulary take no part.
    # The 1/C acts on the value and not on the gradient. Unit scaling ([u-µP]) allows that on an edge that all
    # paths to the loss cross, as it scales all gradients alike; and the backward starts from the sum of the
    # losses. So every gradient is S = N C times that of the mean loss: of order 1 for any batch and width, as
    # E5M2 needs it. A trainer gets it for nothing: dlogits = softmax - onehot, dx = dlogits W. (sp: S = N.)
    x = act["lnf"] = stored(norm(x, "lnf"))
    z = num.matmul(x.reshape(-1, x.shape[-1]), Point.apply(p["head"][:cfg.vocab], num.R, exact).T)
    factor = 1 / x.shape[-1] if us else 1.0
    logits = act["logits"] = Point.apply(z, lambda z: num.R(factor * z), num.R).reshape(*tokens.shape, -1)
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0], act

def first_step(p, tokens, targets, cfg, num):
    """Logits, loss, gradients (S times the true ones) and activations, under the names of a dump."""
    p = {name: t.detach().to(num.dtype).requires_grad_() for name, t in p.items()}
    losses, act = forward(p, tokens, targets, cfg, num)
    losses.sum().backward()
    result = {"logits": act.pop("logits"), "loss": losses.mean().reshape(1)}
    result |= {"grad." + name: t.grad for name, t in p.items()}
    result |= {"act." + name: t for name, t in act.items()}
    return {name: t.detach() for name, t in result.items()}

def grad_scale(cfg, tokens, C):
    return tokens.numel() * (C if cfg.scheme == "us" else 1)

# ---- The optimizers ----------------------------------------------------------------------------------------

def learning_rate(cfg, t):
    """Linear warm-up, then cosine to a tenth of the peak. t counts from 0."""
    s = t + 1
    if s <= cfg.warmup:
        return cfg.lr * s / cfg.warmup
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (s - cfg.warmup) / (cfg.steps - cfg.warmup))))

def train(p, batches, cfg, num, optimizer):
    """The first step; the parameters after the last; of each the loss and the norm of the true gradient."""
    p, C = {name: t.detach().to(num.dtype) for name, t in p.items()}, p["wte"].shape[1]
    m, v = ({name: torch.zeros_like(t) for name, t in p.items()} for _ in range(2))
    steps, norms = [], []
    for t, (tokens, targets) in enumerate(batches):
        step = first_step(p, tokens, targets, cfg, num)
        steps.append(step)
        S, rate = grad_scale(cfg, tokens, C), learning_rate(cfg, t)
        norms.append(math.sqrt(sum((step["grad." + name].double()**2).sum().item() for name in p)) / S)
        for name, W in p.items():
            g = step["grad." + name]
            if optimizer == "lion":                             # S does not matter
                u = torch.sign(0.9 * m[name] + 0.1 * g)
                m[name] = 0.99 * m[name] + 0.01 * g
            else:                                               # AdamW: epsilon is as large as the gradients
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g * g
                u = m[name] / (1 - 0.9**(t + 1)) / (torch.sqrt(v[name] / (1 - 0.95**(t + 1))) + 1e-8 * S)
            hidden = name.endswith((".qkv", ".out", ".up", ".down"))    # [µS] table 2, 3.2; AdamW: A.4
            width = math.sqrt(cfg.base_width / C) if hidden and cfg.scheme == "us" else 1.0
            decay = 0.0 if name.endswith((".gain", ".bias")) else cfg.decay * rate / cfg.lr
            p[name] = W - rate * width * u - decay * W
    return SimpleNamespace(first=steps[0], params=p, losses=torch.cat([s["loss"].double() for s in steps]),
                           grad_norms=torch.tensor(norms, dtype=torch.float64))

# ---- --check: a dump of the C trainer against the reference ------------------------------------------------

FP32_BOUND, RUNS, TIMES, FLOOR = 1e-5, 8, 3, 1e-4

def distance(a, b):
    """||a - b|| / ||b||; where b is zero, a must be."""
    error, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
    return error / size if size else (0.0 if error == 0 else math.inf)

def worst(errors):
    return float(np.max(list(errors)))                          # NaN, if there is one: max() might lose it

def read_dump(path):
    """Settings, parameters, batch and all tensors of a dump; ends with one line where something is wrong."""
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            meta, dump = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:
        reason = str(e).partition("\n")[0]
        stop(f"cannot read {path}: {reason}")
    try:
        cfg = SimpleNamespace(**{key: kind(meta[key]) for key, kind in (
            ("scheme", str), ("precision", str), ("activation", str), ("heads", int), ("vocab", int),
            ("tau", float), ("grad_scale", float))})
        cfg.device = meta.get("device", "CPU")
        p = {name[6:]: t.double() for name, t in dump.items() if name.startswith("param.")}
        tokens, targets = dump["tokens"].long(), dump["targets"].long()
        (T, C), Vp = p["wpe"].shape, p["wte"].shape[0]
        cfg.layers = sum(name.endswith(".qkv") for name in p)
        expected = shapes(cfg.layers, C, T, Vp)
        wrong = [n for n in expected.keys() | p.keys() if n not in p or tuple(p[n].shape) != expected.get(n)]
        for bad, what in (
                (wrong, "missing, unexpected or misshapen parameters: " + " ".join(sorted(wrong))),
                (cfg.scheme not in ("us", "sp"), "scheme " + cfg.scheme),
                (cfg.precision not in ("fp32", "bf16", "fp8"), "precision " + cfg.precision),
                (cfg.activation not in ACTIVATIONS, "activation " + cfg.activation),
                (cfg.heads < 1 or C % cfg.heads, f"{cfg.heads} heads at width {C}"),
                (not 0 <= cfg.tau <= 1, f"tau {cfg.tau}"),
                (not 0 < cfg.vocab <= Vp, f"vocabulary {cfg.vocab} with {Vp} rows"),
                (tokens.ndim != 2 or tokens.numel() == 0 or tokens.shape[1] > T, "shape of tokens"),
                (tokens.shape != targets.shape, "shape of targets")):
            if bad:
                raise ValueError(what)
        if any(t.min() < 0 or t.max() >= cfg.vocab for t in (tokens, targets)):
            raise ValueError("a token outside the vocabulary")
    except KeyError as e:
        stop(f"{path} is not the dump of a first step: no {e}")
    except (ValueError, IndexError) as e:
        stop(f"{path} is not a sound dump: {e}")
    return cfg, p, tokens, targets, dump

def check(path):
    cfg, p, tokens, targets, dump = read_dump(path)
    fp32, S = cfg.precision == "fp32", grad_scale(cfg, tokens, p["wte"].shape[1])
    reference = first_step(p, tokens, targets, cfg, Numerics(cfg.precision))
    spread = {name: 0.0 for name in reference}
    for seed in range(0 if fp32 else RUNS):
        run = first_step(p, tokens, targets, cfg, Numerics(cfg.precision, seed))
        spread = {name: worst([spread[name], distance(run[name], b)]) for name, b in reference.items()}
    print(f"{path}: {cfg.scheme} {cfg.precision}, L={cfg.layers} C={p['wte'].shape[1]} H={cfg.heads} "
          f"V={cfg.vocab}, batch {tokens.shape[0]} x {tokens.shape[1]}")
    how = f"{FP32_BOUND:g}" if fp32 else f"{TIMES} x the largest spread of {RUNS} float32 runs + {FLOOR:g}"
    print(f"bound: {how}")
    print(f"{'tensor':22s} {'RMS':>10s} {'error':>10s} {'spread':>10s} {'bound':>10s}")
    failed = 0
    for name, b in reference.items():
        bound, error, verdict = FP32_BOUND if fp32 else TIMES * spread[name] + FLOOR, math.nan, "ok"
        if name not in dump or dump[name].shape != b.shape:
            verdict = "FAIL: not there" if name not in dump else f"FAIL: shape {tuple(dump[name].shape)}"
        else:
            error, empty = distance(dump[name], b), (b == 0).all(-1)  # rows of padding, of absent tokens
            if not (error <= bound):                            # so that NaN fails
                verdict = "FAIL"
            elif name.startswith("grad.") and not (dump[name][empty] == 0).all():
                verdict = "FAIL: not 0 where it must be"
        failed += verdict != "ok"
        rms = b.square().mean().sqrt()
        print(f"{name:22s} {rms:10.3e} {error:10.1e} {spread[name]:10.1e} {bound:10.1e} {verdict}")
    if not (abs(cfg.grad_scale / S - 1) <= 1e-6):
        failed += 1
        print(f"grad_scale {cfg.grad_scale:g} FAIL: should be {S}")
    print(f"{'FAIL' if failed else 'PASS'}: {len(reference) + 1 - failed} of {len(reference) + 1} agree")
    if failed and cfg.device != "CPU" and not fp32:
        print("This is the dump of a GPU, whose attention also rounds probabilities to BF16: in bf16 and fp8 that\n"
              "shows, and grows behind it. Compare in --precision fp32; test_us.c judges each operation by itself.")
    return not failed

# ---- --write: the state that the C tests compare with ------------------------------------------------------

STATE = dict(layers=2, width=16, heads=4, batch=3, seq=10, vocab=80, tau=0.3, base_width=64, warmup=2,
             steps=5, decay=0.01, lr_us=0.02, lr_sp=0.002, activation="gelu")
# For these seeds, found by trying, no value in the three steps of fp8 comes near a rounding boundary: eight
# times NOISE flips none. So a correct trainer gets these numbers to FP32 accuracy and its tests can be sharp.
SEEDS = {"us": 261, "sp": 364}
WRITE_RUNS = 24

def random_params(random, shapes, std, std1):
    """Matrices N(0, std^2); gains and biases off 1 and 0 by N(0, std1^2), so that a missing one shows."""
    p = {}
    for name, shape in shapes.items():
        x = random.standard_normal(shape) * (std if len(shape) == 2 else std1) + name.endswith(".gain")
        p[name] = torch.from_numpy(x.astype(np.float32)).double()
    return p

def state(scheme, seed):
    """Settings, parameters and three batches of (tokens, targets)."""
    s = SimpleNamespace(**STATE, scheme=scheme, lr=STATE["lr_" + scheme])
    std = 1.0 if scheme == "us" else 0.2
    p = random_params(np.random.RandomState(seed), shapes(s.layers, s.width, s.seq, 128), std, 0.1)
    batches = np.random.RandomState(1000).randint(0, s.vocab, (3, 2, s.batch, s.seq))
    return s, p, torch.from_numpy(batches)

def save(path, tensors, metadata):
    """A safetensors file, in the order given: the same bytes every time."""
    header, blob = {"__metadata__": metadata}, b""
    for name, t in tensors.items():
        data = t.numpy().tobytes()
        header[name] = {"dtype": {torch.int32: "I32", torch.float32: "F32"}[t.dtype], "shape": list(t.shape),
                        "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as f:
            return f.write(struct.pack("<Q", len(text)) + text + blob)
    except OSError as e:
        stop(f"cannot write {path}: {e.strerror}")

def write(path):
    tensors, spread = {}, {}
    def widen(name, a, b):
        spread[name] = worst([spread.get(name, 0.0), distance(a, b)])
    for scheme in ("us", "sp"):
        s, p, batches = state(scheme, SEEDS[scheme])
        tensors |= {"tokens": batches[:, 0].int(), "targets": batches[:, 1].int()}
        tensors |= {f"{scheme}.param.{name}": t for name, t in p.items()}
        for precision, optimizer in (("fp32", "lion"), ("fp32", "adamw"), ("fp8", "lion"), ("fp8", "adamw")):
            at, after = f"{scheme}.{precision}.", f"{scheme}.{precision}.{optimizer}."
            run = train(p, batches, s, Numerics(precision), optimizer)
            first = [name for name in run.first if not name.startswith("act.")]
            tensors |= {at + name: run.first[name] for name in first}
            tensors |= {after + "param." + name: t for name, t in run.params.items()}
            tensors |= {after + "losses": run.losses, after + "grad_norms": run.grad_norms}
            for seed in range(WRITE_RUNS if precision == "fp8" else 0):
                other = train(p, batches, s, Numerics(precision, seed), optimizer)
                for name in first:
                    widen(at + "spread." + name, other.first[name], run.first[name])
                for name, w in p.items():                       # of the update
                    widen(after + "spread." + name, other.params[name].double() - w, run.params[name] - w)
                widen(after + "spread.losses", other.losses, run.losses)
                widen(after + "spread.grad_norms", other.grad_norms, run.grad_norms)
    tensors |= {name: torch.tensor([x]) for name, x in spread.items()}
    tensors = {name: t if t.dtype == torch.int32 else t.float() for name, t in tensors.items()}
    note = ("from dev/reference.py --write. grad: of the first step, S times the true one. OPTIMIZER.param: "
            "after three steps. spread: largest norm-wise relative distance of float32 runs from the float64 "
            "run; OPTIMIZER.spread.NAME: of the update from the first to the last parameters")
    size = save(path, tensors, {key: str(value) for key, value in STATE.items()} | {"note": note})
    for group in (f"{scheme}.fp8.{x}" for scheme in ("us", "sp") for x in ("spread.grad", "lion.", "adamw.")):
        x = sorted(value for name, value in spread.items() if name.startswith(group))
        print(f"{group + '*':20s} min {x[0]:.1e}  median {x[len(x) // 2]:.1e}  max {x[-1]:.1e}")
    print(f"{path}: {len(tensors)} tensors, {size} bytes")
    return size < 1_000_000 and all(t.isfinite().all() for t in tensors.values())

# ---- --selftest --------------------------------------------------------------------------------------------

def test_formats(expect):
    """Against ml_dtypes and torch: every value of a format, midpoints and their neighbours, any numbers."""
    ml_dtypes = need("ml_dtypes")
    random = np.random.RandomState(0)
    extra = [np.frombuffer(random.bytes(800000), np.float32), np.float32(random.standard_normal(200000)),
             np.float32([464, 465, 61440, 1e9, -1e9, np.nan, np.inf, -np.inf, -0.0])]
    for mine, theirs, in_torch, top in ((bf16, ml_dtypes.bfloat16, torch.bfloat16, math.inf),
                                        (e4m3, ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, E4M3_MAX),
                                        (e5m2, ml_dtypes.float8_e5m2, torch.float8_e5m2, E5M2_MAX)):
        name, bits = mine.__name__, np.uint16 if mine is bf16 else np.uint8
        codes = np.arange(np.iinfo(bits).max + 1).astype(bits).view(theirs).astype(np.float32)
        finite = np.unique(codes[np.isfinite(codes)]).astype(np.float64)
        middle = (finite[1:] + finite[:-1]) / 2                 # FP32 holds them exactly
        near = [np.nextafter(middle.astype(np.float32), np.float32(side)) for side in (-np.inf, np.inf)]
        x = np.concatenate([codes, middle.astype(np.float32), *near, *extra])
        with np.errstate(all="ignore"):
            clipped = np.clip(x, -top, top)                     # leaves NaN
            others = [clipped.astype(theirs).astype(np.float64),
                      torch.from_numpy(clipped).to(in_torch).double().numpy()]
        wrong = 0
        for got in (mine(torch.from_numpy(x).double()).numpy(), mine(torch.from_numpy(x)).double().numpy()):
            for want in others:
                same = (got == want) & (np.signbit(got) == np.signbit(want)) | np.isnan(got) & np.isnan(want)
                wrong += (~same).sum()
        expect(f"{name}: of {len(x)} numbers, rounded unlike ml_dtypes or torch", wrong, 0)
        sides = [(mine(torch.from_numpy(middle + side * np.diff(finite))).numpy() != to).sum()
                 for side, to in ((-2.0**-30, finite[:-1]), (2.0**-30, finite[1:]))]
        expect(f"{name}: closest neighbours of {len(middle)} midpoints, rounded wrongly", sum(sides), 0)
        ends = mine(torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)).tolist()
        expect(f"{name}: +-infinity does not become +-{top:g}, NaN does not stay",
               (ends[0] != top) + (ends[1] != -top) + (not math.isnan(ends[2])), 0)

def test_linear(expect):
    """One linear in FP8 against its three formulas, rounding by rounding."""
    random, num, alpha = torch.Generator().manual_seed(5), Numerics("fp8"), 0.3
    X, W, dY = (torch.randn(n, k, generator=random).double() for n, k in ((9, 24), (40, 24), (9, 40)))
    X, dY = bf16(X).requires_grad_(), bf16(dY)
    Y = linear(X, W.requires_grad_(), alpha, num)
    Y.backward(dY)
    qX, qW, qdY = e4m3(X.detach()), e4m3(bf16(W.detach())), e5m2(dY)
    expect("Y unlike bf16(alpha e4m3(X) e4m3(bf16(W))^T)", distance(Y.detach(), bf16(alpha * (qX @ qW.T))), 0)
    expect("dX unlike bf16(alpha e5m2(dY) e4m3(bf16(W)))", distance(X.grad, bf16(alpha * (qdY @ qW))), 0)
    expect("dW unlike alpha e5m2(dY)^T e4m3(X)", distance(W.grad, alpha * (qdY.T @ qX)), 1e-14)

def textbook(p, tokens, targets, cfg):
    """The mean loss as anybody would write it: no rounding, no gradient scale."""
    us, C = cfg.scheme == "us", p["wte"].shape[1]
    a, b = (math.sqrt(1 - cfg.tau), math.sqrt(cfg.tau)) if us else (1, 1)
    activation = dict(gelu=lambda x: F.gelu(x, approximate="tanh"), relu=F.relu, silu=F.silu)[cfg.activation]
    linear = lambda x, W: F.linear(x, W) / (math.sqrt(W.shape[1]) if us else 1)
    norm = lambda x, ln: F.layer_norm(x, (C,), p[ln + ".gain"], p[ln + ".bias"])
    x = (p["wte"][tokens] + p["wpe"]) / (math.sqrt(2) if us else 1)
    for h in (f"h.{i}." for i in range(cfg.layers)):
        def attend(x):
            qkv = linear(x, p[h + "qkv"]).unflatten(-1, (3, cfg.heads, -1))       # (B,T,3,H,D)
            q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return linear(y.transpose(1, 2).flatten(2), p[h + "out"])
        def mlp(x):
            return linear(activation(linear(x, p[h + "up"])), p[h + "down"])
        for ln, branch in ((h + "ln1", attend), (h + "ln2", mlp)):
            x = a * x + b * norm(branch(x), ln) if us else x + branch(norm(x, ln))
    logits = F.linear(norm(x, "lnf"), p["head"][:cfg.vocab]) / (C if us else 1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def test_gradients(expect):
    """With nothing rounded, the scaled backward is S times autograd's, and finite differences agree."""
    for scheme, activation in ((scheme, activation) for scheme in ("us", "sp") for activation in ACTIVATIONS):
        what, random = f"{scheme} {activation}: ", np.random.RandomState(3)
        cfg = SimpleNamespace(scheme=scheme, layers=2, heads=3, tau=0.3, activation=activation, vocab=50)
        p = random_params(random, shapes(2, 24, 7, 128), 1.0 if scheme == "us" else 0.2, 0.1)
        tokens, targets = torch.from_numpy(random.randint(0, 50, (2, 2, 7)))
        run = lambda p: first_step(p, tokens, targets, cfg, Numerics("fp32"))
        mine, S = run(p), grad_scale(cfg, tokens, 24)
        leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
        loss = textbook(leaves, tokens, targets, cfg)
        loss.backward()
        expect(what + "loss unlike the textbook's", distance(mine["loss"], loss.detach()), 1e-12)
        expect(what + f"gradients unlike {S} times autograd's",
               worst(distance(mine["grad." + name], S * t.grad) for name, t in leaves.items()), 1e-11)
        expect(what + "gradients of padded rows",
               worst(mine[name][50:].abs().max().item() for name in ("grad.wte", "grad.head")), 0)
        errors = []
        for name, w in p.items():                               # along the gradient plus anywhere
            g, d = mine["grad." + name] / S, torch.from_numpy(random.standard_normal(w.shape))
            d = g / g.norm() + d / d.norm()
            up, down = (run(p | {name: w + e * d})["loss"].item() for e in (1e-5, -1e-5))
            errors.append(abs((up - down) / 2e-5 - (g * d).sum().item()) / g.norm().item())
        expect(what + "gradients unlike finite differences", worst(errors), 1e-6)

def test_optimizers(expect):
    """The schedule at its corners, and the second step of both optimizers written out."""
    s, p, batches = state("us", 0)
    rates = [learning_rate(s, t) / s.lr for t in range(5)]
    off = np.abs(np.subtract(rates, [0.5, 1, 0.775, 0.325, 0.1])).max()
    expect("schedule unlike 1/2, 1, then cosine to 0.1", off, 1e-12)
    for optimizer in ("lion", "adamw"):
        one, two = (train(p, batches[:n], s, Numerics("fp32"), optimizer) for n in (1, 2))
        second, errors = first_step(one.params, *batches[1], s, Numerics("fp32")), []
        for name, w in one.params.items():
            a, b = one.first["grad." + name], second["grad." + name]
            u = torch.sign(0.009 * a + 0.1 * b)
            if optimizer == "adamw":
                rms = ((0.0475 * a**2 + 0.05 * b**2) / 0.0975).sqrt()
                u = (0.09 * a + 0.1 * b) / 0.19 / (rms + 1e-8 * 3 * 10 * 16)
            rate = 0.02 * (2 if name.startswith("h.") and w.ndim == 2 else 1)  # sqrt(64 / 16) = 2
            errors.append(distance(two.params[name], w - rate * u - (0.01 * w if w.ndim == 2 else 0)))
        expect(f"{optimizer}: second step unlike the formula", worst(errors), 1e-13)

def test_initialisation(expect):
    """What unit scaling promises before the first step: RMS 1 everywhere, and FP8 without scale factors."""
    B, T, C, L, V = 4, 128, 256, 4, 256
    with open(os.path.abspath(__file__), "rb") as f:                # the text is this file
        text = torch.tensor(list(f.read(B * (T + 1)))).reshape(B, T + 1)
    cfg = SimpleNamespace(scheme="us", layers=L, heads=4, tau=0.4, activation="gelu", vocab=V)    # [µS] 3.1
    p, num = random_params(np.random.RandomState(0), shapes(L, C, T, V), 1.0, 0.0), Numerics("fp8")
    step = first_step(p, text[:, :-1], text[:, 1:], cfg, num)
    rms = lambda t: t.square().mean().sqrt().item()
    def off(target, tensors):
        return worst(abs(rms(t) - target) for t in tensors)
    stream = [step["act.x0"]] + [step[f"act.h.{i}.{x}"] for i in range(L) for x in ("mid", "x")]
    expect("initial loss off ln V + 1/(2C)", abs(step["loss"].item() / (math.log(V) + 0.5 / C) - 1), 0.01)
    # At this width chance alignment of a branch with the stream moves the RMS by 2 to 6 %, as seeds go.
    expect("RMS of the stream, the input of qkv and up, off 1", off(1, stream), 0.05)
    expect("RMS of the input of down off 0.65", off(0.65, [step[f"act.h.{i}.g"] for i in range(L)]), 0.05)
    expect("RMS of the weights off 1", off(1, [t for t in p.values() if t.ndim == 2]), 0.05)
    for name in ("e4m3", "e5m2"):
        casts = [cast for cast in num.casts if cast[0] == name]
        expect(f"{len(casts)} {name} casts: largest share flushed", max(cast[1] for cast in casts), 0.005)
        expect(f"{len(casts)} {name} casts: numbers clipped", sum(cast[2] for cast in casts), 0)
    # [µS] eq. 6 for independent values; it is the first order in 1/k, and too high at the first positions.
    qkv = torch.randn(64, T, 3 * C, generator=torch.Generator().manual_seed(0)).double()
    variance = attention(qkv, 4, Numerics("fp32"))[:, -1].square().mean().item()
    expect(f"attention variance at position k = {T} off e/k - (e-1)/k^2",
           abs(variance / (math.e / T - (math.e - 1) / T**2) - 1), 0.1)

def selftest():
    outcomes = []
    def expect(what, error, bound):
        outcomes.append(bool(error <= bound))                   # NaN is no success
        print(f"{'ok  ' if outcomes[-1] else 'FAIL'} {what}: {error:.2g} (at most {bound:g})")
    for test in (test_formats, test_linear, test_gradients, test_optimizers, test_initialisation):
        test(expect)
    print(f"{sum(outcomes)} passed, {len(outcomes) - sum(outcomes)} failed")
    return all(outcomes)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--selftest", action="store_true", help="check the reference itself")
    action.add_argument("--check", metavar="DUMP", help="compare a dump of the C trainer's first step")
    action.add_argument("--write", metavar="FILE", help="write the state that the C tests compare with")
    args = parser.parse_args()
    good = selftest() if args.selftest else write(args.write) if args.write else check(args.check)
    sys.exit(0 if good else 1)
