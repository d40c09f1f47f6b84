"""
The table of experiments: a row says what a paper claims, what is varied, and how it is judged and drawn.

A row of your own: series are families of curves (a label and trainer options each), across is what changes
from curve to curve, swept is what changes along a curve. A number may be a function of a run's other options.
"lr": BEST is the best rate that a sweep of RATES finds for this scheme and size (`transfer` makes the same
runs, and no run is made twice).

    Experiment("heads", "µS's best rate does not depend on the size of a head.", "ours", "rate, by heads",
               series={"us": {"scheme": "us"}, "umup": {"scheme": "umup"}},
               across=("heads", [1, 2, 4]), swept=("lr", RATE), base={"width": 64})
"""

import random
from dataclasses import dataclass, field
from typing import Callable

import judge

STEPS = 1200
# Small enough that a run takes two seconds, long enough that it leaves the plateau near 2.4 (what a bigram
# model reaches), where all rates look alike. Weight decay is small, so that the rate alone is seen.
BASE = {"scheme": "us", "layers": 2, "width": 64, "seq": 32, "batch": 8, "optimizer": "adamw",
        "decay": 2.0 ** -13, "base-width": 64, "precision": "fp32", "eval-tokens": 16384, "seed": 1}
MULTIPLIERS = ["emb-lr", "alpha-res", "alpha-res-attn-ratio", "alpha-attn", "alpha-act", "alpha-out"]
NEUTRAL = {*MULTIPLIERS, "head-lr", "norm-lr"}  # at 1 they are left out: it is the same run
SWEPT = {*MULTIPLIERS, "lr", "decay", "tau", "head-lr", "seed"}


def octaves(low, high, step=1):
    return [2.0 ** k for k in range(low, high + 1, step)]


# Where each scheme's optimum lies at these sizes. A sweep whose best is at an end goes on there, by up to two
# octaves.
RATES = {("sp", "adamw"): octaves(-12, -5), ("mup", "adamw"): octaves(-10, -5),
         ("us", "adamw"): octaves(-8, -3), ("umup", "adamw"): octaves(-4, 1), ("us", "lion"): octaves(-9, -3)}
RATE, BEST = "rates of the scheme", "best rate"


def rates(flags):
    return RATES[flags["scheme"].split("-")[0], flags["optimizer"]]


# ---- How rows are made

def seeds(lab, e):
    return list(range(1, max(lab.seeds, e.seeds) + 1))


def sweep(lab, e):
    """Runs for every series, across and swept value; rows for the .csv."""
    cells, grid, loss = {}, {}, {}
    for label, flags in e.series.items():
        for value, more in e.steps_across(lab):
            cells[label, value] = {**e.base, **flags, **more}
    cells = dict(zip(cells, with_best_rate(lab, cells.values())))
    name, values = e.swept or ("lr", None)
    for cell, flags in cells.items():
        grid[cell] = list(rates(lab.complete(flags)) if values == RATE else values or [flags["lr"]])

    def run(wanted):  # of (cell, x, seed)
        wanted = [w for w in wanted if w not in loss]
        results = lab.run([{**cells[cell], name: x, "seed": seed} for cell, x, seed in wanted])
        loss.update({w: r["loss"] for w, r in zip(wanted, results)})

    run([(cell, x, 1) for cell in cells for x in grid[cell]])
    best = lambda cell: min(grid[cell], key=lambda x: loss[cell, x, 1])
    for _ in range(2 * (lab.mode == "run" and name != "tau" and e.swept is not None)):
        for label in e.series:  # the whole family, so that its curves can be compared
            family = [c for c in cells if c[0] == label]
            ends = {best(c) for c in family}
            more = [grid[family[0]][0] / 2] * (min(ends) == min(grid[family[0]]))
            more += [grid[family[0]][-1] * 2] * (max(ends) == max(grid[family[0]]))
            for c in family:
                grid[c] = sorted(grid[c] + more)
        run([(cell, x, 1) for cell in cells for x in grid[cell]])
    near = {}  # further seeds only where the optimum is
    for cell, values in grid.items():
        at = len(values) // 2 if lab.mode == "plan" else values.index(best(cell))
        near[cell] = values[max(0, at - 1):at + 2]
    run([(cell, x, seed) for cell in cells for x in near[cell] for seed in seeds(lab, e)[1:]])
    return [{"series": label, "across": value, "x": x, "seed": seed, "loss": found,
             "options": " ".join(f"--{k} {v:.6g}" if isinstance(v, float) else f"--{k} {v}"
                                 for k, v in lab.complete({**cells[label, value], name: x}).items()
                                 if BASE.get(k) != v and k != "heads")}
            for ((label, value), x, seed), found in loss.items()]


def with_best_rate(lab, runs):
    """These runs; "lr": BEST becomes the best of a sweep in FP32 with nothing but scheme and size as here."""
    same = ("scheme", "width", "layers", "steps", "activation", "optimizer")
    alone = [{k: f[k] for k in same if k in f} for f in runs]
    wanted = [(str(a), {**a, "lr": x}) for f, a in zip(runs, alone) if f.get("lr") == BEST
              for x in rates(lab.complete(a))]
    found = {}
    for (a, f), result in zip(wanted, lab.run([f for _, f in wanted])):
        found.setdefault(a, []).append((result["loss"], f["lr"]))
    return [{**f, "lr": min(found[str(a)])[1]} if f.get("lr") == BEST else f for f, a in zip(runs, alone)]


def activations(lab, e):
    """Losses as always, and from the same runs what of down's input is flushed to zero."""
    runs = [{**e.base, **flags, "stats-every": max(1, lab.steps // 12)} for flags in e.series.values()]
    runs = [{**f, "seed": seed} for f in with_best_rate(lab, runs) for seed in seeds(lab, e)]
    rows = []
    for f, result in zip(runs, lab.run(runs, "stats")):
        lost = [(row[0], row[6]) for row in result["stats"] if row[1].endswith(".down") and row[2] == "input"]
        for step in sorted({s for s, _ in lost}):
            here = [x for s, x in lost if s == step]
            rows.append({"series": f["activation"], "lr": f["lr"], "seed": f["seed"], "loss": result["loss"],
                         "step": step, "flushed": sum(here) / len(here)})
    return rows


def all_stats(lab, e):
    runs = [{**e.base, **f, "stats-every": max(1, lab.steps // 6)} for f in e.series.values()]
    results = lab.run(with_best_rate(lab, runs), "stats")
    names = ["step", "tensor", "operand", "format", "rms", "max", "flushed", "saturated"]
    return [{"series": label, **dict(zip(names, row))} for label, result in zip(e.series, results)
            for row in result["stats"] if row[2] != "stream"]


def attention_outputs(lab, e):
    results = lab.run(with_best_rate(lab, [{**e.base, **flags} for flags in e.series.values()]), "attention")
    return [{"series": label, "when": when, "k": k + 1, "softmax": a, "root": b}
            for label, result in zip(e.series, results) for when, plain, root in result["attention"]
            for k, (a, b) in enumerate(zip(plain, root))]


FACTORS = [0.25, 0.5, 1.0, 2.0, 4.0]


def search(lab, e):
    """
    Independent search: the rate alone, then each multiplier alone at that rate, then the best of each.
    Random search: as many runs, values drawn from the same grids. Pairs: every two on a grid, the rest at 1.
    """
    rows = []
    for label, flags in e.series.items():
        names = e.extra[label]
        grid = {"lr": rates(lab.complete({**e.base, **flags})), **{n: FACTORS for n in names}}

        def run(phase, points, **more):
            results = lab.run([{**e.base, **flags, **point} for point in points])
            full = [{n: point.get(n, 1.0) for n in grid} for point in points]
            rows.extend({"series": label, "phase": phase, **more, **point, "loss": r["loss"]}
                        for point, r in zip(full, results))
            return [r["loss"] for r in results]

        at = lambda values, losses: values[losses.index(min(losses))]
        lr = at(grid["lr"], run("rate", [{"lr": x} for x in grid["lr"]]))
        alone = [(n, x) for n in names for x in FACTORS if x != 1]
        losses = dict(zip(alone, run("alone", [{"lr": lr, n: x} for n, x in alone])))
        losses.update({(n, 1.0): min(r["loss"] for r in rows if r["series"] == label and r["phase"] == "rate")
                       for n in names})
        run("together", [{"lr": lr, **{n: min(FACTORS, key=lambda x: losses[n, x]) for n in names}}])
        draw = random.Random(1)
        count = len(grid["lr"]) + len(alone) + 1
        run("random", [{n: draw.choice(values) for n, values in grid.items()} for _ in range(count)])
        grid["lr"] = [lr * x for x in FACTORS]
        for i, a in enumerate(grid):
            for b in list(grid)[i + 1:]:
                run("pair", [{"lr": lr, a: x, b: y} for x in grid[a] for y in grid[b]], a=a, b=b)
    return rows


# ---- The table

@dataclass
class Experiment:
    name: str
    claim: str  # one sentence, as the paper makes it
    source: str
    varies: str
    series: dict
    across: tuple = ("width", [64])
    swept: tuple = None
    base: dict = field(default_factory=dict)
    seeds: int = 1  # at least; --seeds for more
    run: Callable = sweep
    judge: Callable = judge.optima
    picture: str = "curves"
    extra: dict = field(default_factory=dict)

    def steps_across(self, lab):
        """(value, options) for each curve: numbers of one option, or labels with options of their own."""
        name, values = self.across
        if isinstance(values, dict):
            return list(values.items())
        if name == "width" and lab.widths and len(values) > 1:
            values = lab.widths
        if name == "steps":  # relative to --steps
            values = [max(1, round(v * lab.steps)) for v in values]
        return [(v, {name: v}) for v in values]


SCHEMES = {s: {"scheme": s} for s in ("sp", "mup", "us", "umup")}
US = {"us": {"scheme": "us"}}

TABLE = [
    Experiment("transfer", "The best learning rate of a small model is the best of a wide one; sp's moves.",
               "µS fig. 6, u-µP fig. 4b", "rate, by width",
               series=SCHEMES, across=("width", [32, 64, 128, 256]), swept=("lr", RATE)),
    Experiment("depth", "The best rate stays with depth too, by tau (µS) or unit residuals (u-µP).",
               "µS 3.1, u-µP fig. 2, 6", "rate, by layers",
               series={"us": {"scheme": "us"}, "us, tau 0.4": {"scheme": "us", "tau": 0.4},
                       "us, tau 1/(2L+1)": {"scheme": "us", "tau": lambda f: 1 / (2 * f["layers"] + 1)},
                       "umup": {"scheme": "umup"}, "mup": {"scheme": "mup", "base-layers": 2}},
               across=("layers", [2, 4, 8]), swept=("lr", RATE)),
    Experiment("steps", "The best rate moves little with the number of steps.", "u-µP fig. 2, 6",
               "rate, by steps at constant batch",
               series={s: SCHEMES[s] for s in ("sp", "us", "umup")},
               across=("steps", [0.25, 1, 4]), swept=("lr", RATE)),
    # At a constant number of tokens a batch of 32 would have 300 steps and never leave the plateau.
    Experiment("batch", "The best rate moves little with the batch.", "u-µP fig. 2, 6",
               "rate, by batch at constant steps (tokens grow)",
               series={s: SCHEMES[s] for s in ("sp", "us", "umup")},
               across=("batch", [4, 8, 16, 32]), swept=("lr", RATE)),
    Experiment("fp8", "µS and u-µP train in FP8 as in FP32 with no scale found from data; µP does not.",
               "µS table 5, u-µP fig. 4c", "format, with the static gradient scale S and without",
               series=SCHEMES, base={"lr": BEST}, seeds=3, judge=judge.variants, picture="variants",
               across=("format", {"FP32": {}, "FP8": {"precision": "fp8"},
                                  "FP8, S = 1": {"precision": "fp8", "grad-scale": 1}})),
    Experiment("rms", "All that enters a matmul has an RMS near 1 at the start, and stays in FP8's range.",
               "u-µP fig. 3, 9, µS fig. 12", "scheme; every operand of every hidden linear",
               series=SCHEMES, base={"lr": BEST, "precision": "fp8"},
               run=all_stats, judge=judge.ranges, picture="ranges"),
    Experiment("attention", "Attention's output has variance e/k - (e-1)/k² at position k; the square root "
               "of softmax would keep it at 1.", "µS eq. 6, fig. 2, 3",
               "position; at the start and after training",
               series=US, base={"lr": BEST, "width": 128, "seq": 128, "heads": 4, "batch": 4},
               run=attention_outputs, judge=judge.positions, picture="positions"),
    Experiment("norm", "With LayerNorm last in a branch deep models train at least as well as with it first, "
               "and a fixed tau is as good as a running mean.", "µS fig. 4, 9", "rate, by layers at C = 32",
               series={s: {"scheme": s} for s in ("us", "us-pre", "us-mean")}, base={"width": 32},
               across=("layers", [4, 12, 24]), swept=("lr", RATE)),
    Experiment("tau", "The best tau falls with depth, from 0.4 at 4 blocks.", "µS fig. 5, 9",
               "tau, by layers",
               series=US, base={"lr": BEST}, seeds=3, across=("layers", [2, 4, 8, 16]),
               swept=("tau", [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6]), judge=judge.taus),
    Experiment("activation", "GELU and SiLU push more of down's input below FP8's range than ReLU does.",
               "µS fig. 11, 12, A.7", "activation, in FP8",
               series={a: {"activation": a} for a in ("gelu", "relu", "silu")}, seeds=3,
               base={"lr": BEST, "precision": "fp8"}, run=activations, judge=judge.underflow,
               picture="underflow"),
    Experiment("search", "u-µP's multipliers can be searched one by one; the rate alone nearly suffices.",
               "u-µP algorithm 1, fig. 4a, 5", "all hyperparameters at C = 32",
               series={s: SCHEMES[s] for s in ("umup", "mup")}, base={"width": 32},
               extra={"umup": MULTIPLIERS[1:], "mup": ["emb-lr", "alpha-attn", "alpha-out"]},
               run=search, judge=judge.searches, picture="searches"),
    Experiment("decay", "The best fully decoupled weight decay is the same at every width.", "µS fig. 6",
               "weight decay, by width",
               series={s: SCHEMES[s] for s in ("us", "umup", "sp")}, base={"lr": BEST},
               across=("width", [32, 64, 128]), swept=("decay", octaves(-13, -6))),
    Experiment("embedding", "Embeddings should learn at C^-1/2, not at µP's constant rate.", "u-µP fig. 1",
               "embedding's rate rule and rate, by width (256 bytes are few: try a GPU, tokens, wide models)",
               series={"constant": {"scheme": "mup"},
                       "C^-1/2": {"scheme": "mup",
                                  "emb-lr": lambda f: (f["width"] / f["base-width"]) ** -0.5}},
               across=("width", [32, 64, 128, 256]), swept=("lr", RATE)),
    Experiment("optimizer", "The same width rules hold for Lion and for AdamW.", "µS A.4", "rate, by width",
               series={o: {"optimizer": o} for o in ("adamw", "lion")},
               across=("width", [32, 64, 128]), swept=("lr", RATE)),
    Experiment("head", "The head wants a higher rate where the last LayerNorm's gain does not learn.", "ours",
               "factor on the head's rate, norms learning or frozen",
               series={"norms learn": {}, "norms frozen": {"norm-lr": 0}}, base={"lr": BEST}, seeds=3,
               swept=("head-lr", octaves(0, 4))),
]
