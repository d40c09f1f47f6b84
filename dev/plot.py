"""
Draws pictures of runs, from the tables and from the first step that the trainer writes.

    python dev/plot.py loss loss.png runs/fp8 runs/bf16 --labels "FP8" "BF16" --val --diff
    python dev/plot.py loss seeds.png runs/fp8_s1 runs/fp8_s2 runs/bf16_s1 runs/bf16_s2 --group
    python dev/plot.py stats stats.png runs/fp8
    python dev/plot.py block block.svg first_step.safetensors

loss   RUN/log.csv: training loss over steps, raw and smoothed, with the validation loss as markers. --group
       takes runs that differ only after the last _ of their names as one: mean and range over the seeds.
stats  RUN/stats.csv: the root mean square of every tensor that goes into a matrix product, over steps,
       against what its format can represent, and the share of its values that the cast turned into zero.

The others show one step at initialisation, from a file that the trainer wrote with --dump, beside what
theory predicts; dev/method.md explains them. formats, attention, block and gradients draw a picture; init,
update and decay only print.

Needs matplotlib (pip install matplotlib).
"""

import argparse
import csv
import io
import json
import os
import sys

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
    from PIL import Image
except ImportError:
    sys.exit("plot.py: the package matplotlib is missing; install it with: pip install matplotlib")

# Okabe and Ito's colours, which stay apart with all common kinds of colour blindness.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
INK, GREY, FAINT = "#222222", "#777777", "#E4E4E4"
plt.rcParams.update({
    "figure.dpi": 120, "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.7,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "lines.solid_capstyle": "round",
    "legend.frameon": False, "svg.hashsalt": "us.c"})


def die(message):
    sys.exit(f"plot.py: {message}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message} (--help shows the usage)")


def read_csv(path, needed):
    """The rows of a table as dictionaries, with numbers where they are numbers; empty fields are nan."""
    def value(text):
        try:
            return float(text) if text.strip() else float("nan")
        except ValueError:
            return text

    if not os.path.isfile(path):
        die(f"there is no {path}; RUN has to be the folder of a run that wrote it")
    try:
        with open(path, newline="", encoding="utf-8") as f:
            header, *lines = [line for line in csv.reader(f) if line] or [[]]
    except (UnicodeDecodeError, csv.Error):
        die(f"{path} is not a csv table")
    missing = [name for name in needed if name not in header]
    if missing:
        die(f"{path} has no column {', '.join(missing)}; is it a table of this program's trainer?")
    if lines and len(lines[-1]) < len(header):
        lines.pop()  # the trainer is writing it right now
    rows = []
    for number, line in enumerate(lines, 2):
        row = dict(zip(header, map(value, line)))
        wrong = [k for k in needed if isinstance(row.get(k), str) != (k in ("tensor", "operand", "format"))]
        if len(line) != len(header) or wrong:
            die(f"{path}, line {number}: cannot be read ({', '.join(wrong) or 'number of columns'})")
        rows.append(row)
    if not rows:
        die(f"{path} has no rows yet")
    return rows


def save(fig, out):
    drawn = io.BytesIO()
    vector = out.endswith(".svg")
    fig.savefig(drawn, format="svg" if vector else "png", metadata={"Date": None} if vector else None)
    try:
        if vector:
            with open(out + ".tmp", "wb") as f:
                f.write(drawn.getvalue())
        else:
            # 256 colours are enough for these pictures, and a third of the size, which counts in a
            # repository.
            small = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(out + ".tmp", format="png", optimize=True)
        os.replace(out + ".tmp", out)
    finally:
        if os.path.exists(out + ".tmp"):
            os.remove(out + ".tmp")
    print(f"wrote {out}, {os.path.getsize(out) / 1000:.0f} kB")


# ----------------------------------------------------------------------------------------------------------
# Loss

def smoothed(y, window):
    """Running mean over about a window of points around each one."""
    # At the start the window shrinks on both sides, as the loss falls steeply there and a one-sided mean
    # would be off. At the end it loses its right half alone, so that the last value is a mean of many too.
    index, half = np.arange(len(y)), window // 2
    first = index - np.minimum(half, index)
    last = np.minimum(index + np.minimum(half, index), len(y) - 1)
    total = np.concatenate([[0], np.cumsum(y)])
    return (total[last + 1] - total[first]) / (last + 1 - first)


def read_losses(run):
    rows = read_csv(os.path.join(run, "log.csv"), ["step", "train_loss", "val_loss"])
    step, train, val = (np.array([row[k] for row in rows]) for k in ("step", "train_loss", "val_loss"))
    if not np.isfinite(train).any():
        die(f"{run}/log.csv has no training loss")
    # A diverged run is drawn up to where it diverged.
    end = np.argmax(~np.isfinite(train)) if not np.isfinite(train).all() else len(train)
    if end < len(train):
        print(f"note: {run} is drawn up to step {step[end - 1]:.0f}; its loss is not finite after that")
    measured = np.isfinite(val)
    return {"step": step[:end], "train": train[:end], "val_step": step[measured], "val": val[measured]}


def mean_of(seeds, window):
    """One curve for several runs: means and ranges at the steps which all of them have."""
    def at(steps, key, series):
        found = [dict(zip(s[key], values)) for s, values in zip(seeds, series)]
        return np.array([[values[x] for x in steps] for values in found])

    step = sorted(set.intersection(*[set(s["step"]) for s in seeds]))
    val_step = sorted(set.intersection(*[set(s["val_step"]) for s in seeds]))
    if not step:
        die("the runs of a group have no step in common")
    train = at(step, "step", [s["train"] for s in seeds])
    smooth = at(step, "step", [smoothed(s["train"], window) for s in seeds])
    val = at(val_step, "val_step", [s["val"] for s in seeds])
    return {"step": np.array(step), "train": train.mean(0), "smooth": smooth.mean(0), "low": smooth.min(0),
            "high": smooth.max(0), "val_step": np.array(val_step), "val": val.mean(0), "seeds": len(seeds)}


def spread(positions, gap):
    """Positions from 0 to 1, moved a little to keep them a gap apart."""
    order = np.argsort(positions)
    at = np.array(positions, float)
    for _ in range(200):
        for a, b in zip(order, order[1:]):
            short = gap - (at[b] - at[a])
            if short > 1e-9:
                at[a] -= short / 2
                at[b] += short / 2
        at = np.clip(at, gap / 2, 1 - gap / 2)
    return at


def plot_loss(args):
    groups = {}
    for run in args.runs:
        name = os.path.basename(os.path.normpath(run))
        groups.setdefault(name.rpartition("_")[0] or name if args.group else run, []).append(run)
    names = [os.path.basename(os.path.normpath(name)) for name in groups]
    if args.labels:
        if len(args.labels) != len(names):
            die(f"--labels: has {len(args.labels)} names; name each of these curves: {' '.join(names)}")
        names = args.labels
    seeds = [[read_losses(run) for run in runs] for runs in groups.values()]
    window = args.smooth or max(1, max(len(s["step"]) for group in seeds for s in group) // 50)
    curves = [mean_of(group, window) for group in seeds]

    rows, height = ([3, 1], 6.8) if args.diff else ([1], 5.4)
    fig, axes = plt.subplots(len(rows), 1, figsize=(10, height), sharex=True, squeeze=False,
                             gridspec_kw={"height_ratios": rows})
    ax = axes[0, 0]
    fig.subplots_adjust(left=0.085, right=0.8, top=0.92 if args.title else 0.97,
                        bottom=0.6 / height, hspace=0.1)
    for i, (curve, group) in enumerate(zip(curves, seeds)):
        color = COLORS[i % len(COLORS)]
        if curve["seeds"] == 1:
            ax.plot(curve["step"], curve["train"], color=color, lw=0.6, alpha=0.25)
        else:
            ax.fill_between(curve["step"], curve["low"], curve["high"], color=color, alpha=0.2, lw=0)
        ax.plot(curve["step"], curve["smooth"], color=color, lw=1.6)
        if args.val:
            ax.plot(curve["val_step"], curve["val"], color=color, ls="none", marker="o", ms=5.5, mec="white",
                    clip_on=False, zorder=3)

    # The fall from the first loss is much the same for all and would take most of the picture.
    end = max(c["step"][-1] for c in curves)
    shown = np.concatenate([c["smooth"][(c["step"] >= min(end / 12, c["step"][-1]))] for c in curves])
    pad = 0.1 * (shown.max() - shown.min()) or 0.1
    ax.set_ylim(shown.min() - pad if args.ymin is None else args.ymin,
                shown.max() + pad if args.ymax is None else args.ymax)
    if ax.get_ylim()[0] >= ax.get_ylim()[1]:
        die("--ymin has to be below --ymax, and the loss between them")
    ax.set_xlim(0, end)
    for line in ax.lines:
        if line.get_marker() == "o":  # these may stand over the right edge, but not above or below
            y = line.get_ydata()
            line.set_ydata(np.where((y > ax.get_ylim()[0]) & (y < ax.get_ylim()[1]), y, np.nan))
    ax.set_ylabel("loss, nats per token")

    # Labels at the ends of the curves, in their colours, instead of a legend to look up.
    bottom, top = ax.get_ylim()
    ends = [np.clip((c["smooth"][-1] - bottom) / (top - bottom), 0.02, 0.98) for c in curves]
    for i, (y, curve) in enumerate(zip(spread(ends, 0.11), curves)):
        text = f"{names[i]}\ntrain {curve['smooth'][-1]:.3f}"
        if args.val and len(curve["val"]):
            text += f", val {curve['val'][-1]:.3f}"
        ax.annotate(text, (1, ends[i]), (1.025, y), xycoords="axes fraction", textcoords="axes fraction",
                    va="center", color=COLORS[i % len(COLORS)], linespacing=1.35, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": COLORS[i % len(COLORS)], "lw": 0.7, "shrinkA": 0})

    several = max(c["seeds"] for c in curves)
    keys = [Line2D([], [], color=GREY, lw=1.6)]
    texts = [f"training, mean of {window // 2 * 2 + 1} steps" if window > 1 else "training"]
    if several > 1:
        keys.append(plt.Rectangle((0, 0), 1, 1, color=GREY, alpha=0.25, lw=0))
        texts.append(f"lowest to highest of {several} seeds")
    elif window > 1:
        keys.append(Line2D([], [], color=GREY, lw=0.8, alpha=0.5))
        texts.append("training, each step")
    if args.val:
        keys.append(Line2D([], [], color=GREY, ls="none", marker="o", ms=5))
        texts.append("validation")
    ax.legend(keys, texts, loc="upper right", labelcolor=INK)

    if args.diff:
        below = axes[1, 0]
        base = dict(zip(curves[0]["step"], curves[0]["smooth"]))
        for i, curve in enumerate(curves):
            both = [(x, y - base[x]) for x, y in zip(curve["step"], curve["smooth"]) if x in base]
            below.plot(*np.array(both).reshape(-1, 2).T, color=COLORS[i % len(COLORS)], lw=1.4)
        below.set_ylabel(f"minus {names[0]}")
        late = np.concatenate([line.get_ydata()[line.get_xdata() >= end / 12] for line in below.lines])
        reach = 1.15 * np.abs(late).max() if late.size and np.abs(late).max() else 0.1
        below.set_ylim(-reach, reach)
    axes[-1, 0].set_xlabel("step")
    if args.title:
        fig.suptitle(args.title, x=0.085, y=0.98, ha="left", va="top", fontsize=12, fontweight="bold")
    save(fig, args.out)


# ----------------------------------------------------------------------------------------------------------
# Stats

OPERANDS = [("input", "inputs"), ("weight", "weights"), ("grad", "output gradients"),
            ("stream", "residual stream")]
# The smallest number, the smallest one with all bits of precision, and the largest.
RANGES = {"E4M3": (2.0 ** -9, 2.0 ** -6, 448.0), "E5M2": (2.0 ** -16, 2.0 ** -14, 57344.0)}
STYLES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1))]
EMBEDDING, HEAD = "#000000", "#D55E00"
LARGEST = {"color": GREY, "lw": 1.1, "ls": (0, (1, 1.5))}


def place(tensor):
    """h.3.qkv is (3, "qkv"), and what belongs to no block is (None, its name)."""
    parts = tensor.split(".", 2)
    if len(parts) == 3 and parts[0] == "h" and parts[1].isdigit():
        return int(parts[1]), parts[2]
    return None, tensor


def power_of_two(x, _=None):
    return f"$2^{{{round(np.log2(x))}}}$"


def read_stats(run):
    """{operand: {tensor: rows}} in the order of the table."""
    path = os.path.join(run, "stats.csv")
    rows = read_csv(path, ["step", "tensor", "operand", "format", "rms", "max", "flushed", "saturated"])
    table = {operand: {} for operand, _ in OPERANDS}
    for row in rows:
        if row["operand"] not in table:
            die(f"{path} has the operand {row['operand']}; known are {', '.join(table)}")
        table[row["operand"]].setdefault(row["tensor"], []).append(row)
    return table


def plot_stats(args):
    table = read_stats(args.run)
    places = [place(tensor) for series in table.values() for tensor in series]
    blocks = 1 + max((block for block, _ in places if block is not None), default=0)
    kinds = list(dict.fromkeys(kind for block, kind in places if block is not None and kind != "x"))
    depth = [matplotlib.colors.to_hex(c) for c in plt.get_cmap("viridis")(np.linspace(0, 0.88, blocks))]

    def look(tensor):
        block, kind = place(tensor)
        if block is None:
            return {"color": EMBEDDING if kind == "x" else HEAD, "lw": 1.6, "zorder": 4}
        style = "-" if kind == "x" else STYLES[kinds.index(kind) % len(STYLES)]
        return {"color": depth[block], "lw": 1.1, "ls": style}

    fig, axes = plt.subplots(2, 4, figsize=(10, 6.2), gridspec_kw={"height_ratios": [3, 2]})
    fig.subplots_adjust(left=0.07, right=0.985, top=0.905, bottom=0.08, wspace=0.25, hspace=0.09)
    for (operand, title), ax, below in zip(OPERANDS, axes[0], axes[1]):
        series = table[operand]
        draw_rms(ax, series, look)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=18)
        if operand != "stream":
            draw_flushed(below, series, look)
            ax.tick_params(labelbottom=False)
    steps = [row["step"] for series in table.values() for rows in series.values() for row in rows]
    room = min(steps) == max(steps)
    for ax in axes.flat[:7]:
        ax.set_xlim(min(steps) - room, max(steps) + room)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in [axes[0, 3], *axes[1, :3]]:
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("root mean square")
    axes[1, 0].set_ylabel("values flushed to zero, %")

    # The stream is not cast, so its place below is free for the legend.
    axes[1, 3].axis("off")
    bar = axes[1, 3].inset_axes([0.0, 0.56, 1.0, 0.05])
    bar.imshow([range(blocks)], aspect="auto", cmap=matplotlib.colors.ListedColormap(depth))
    bar.set(xticks=sorted({0, blocks - 1}), yticks=[])
    bar.grid(False)
    bar.spines[:].set_visible(False)
    bar.tick_params(length=0, labelsize=8.5)
    bar.set_title("block", fontsize=8.5, loc="left", pad=3)
    keys = [(kind, {"color": INK, "lw": 1.3, "ls": STYLES[i % len(STYLES)]}) for i, kind in enumerate(kinds)]
    for tensor, name in [("head", "head"), ("x", "embedding")]:
        if (None, tensor) in places:
            keys.append((name, look(tensor)))
    keys.append(("largest value", LARGEST))
    axes[1, 3].legend([Line2D([], [], **style) for _, style in keys], [name for name, _ in keys], ncols=2,
                      loc="lower left", bbox_to_anchor=(-0.1, -0.17), columnspacing=1.2, handlelength=2.4,
                      fontsize=8.5)
    save(fig, args.out)


def draw_rms(ax, series, look):
    formats = [rows[-1]["format"] for rows in series.values()]
    main = max(dict.fromkeys(formats), key=formats.count, default="not recorded")
    others = [f"{tensor}: {kind}" for tensor, kind in zip(series, formats) if kind != main]
    largest = {}
    for tensor, rows in series.items():
        rms = np.array([row["rms"] for row in rows])
        ax.plot([row["step"] for row in rows], np.where(rms > 0, rms, np.nan), **look(tensor), **dots(rows))
        for row in rows:
            largest[row["step"]] = max(row["max"], largest.get(row["step"], 0))
    ax.plot(*np.array(sorted(largest.items())).reshape(-1, 2).T, **LARGEST)

    # The axis shows all of the data, and the ends of the format as far as they are near enough to matter.
    values = [row["rms"] for rows in series.values() for row in rows] + list(largest.values())
    ends = [v for v in values if v > 0 and np.isfinite(v)] or [1.0]
    note = main
    if main in RANGES:
        tiny, normal, most = RANGES[main]
        note += f", {power_of_two(tiny)} to {most:.0f}"
        ends += [tiny] + [most] * (max(ends) > most / 64)
        ax.axhspan(normal, most, color="#E1EBF7", lw=0, zorder=0)
        ax.axhspan(tiny, normal, color="#F1F6FC", lw=0, zorder=0)
        for y, text in [(normal, "full precision"), (tiny, "fewer bits")]:
            ax.text(0.97, y * 1.15, text, transform=ax.get_yaxis_transform(), ha="right", fontsize=8,
                    color=GREY)
    if 0 < len(others) < 3:
        note += f"  ({', '.join(others)})"
    ax.text(0, 1.025, note, transform=ax.transAxes, fontsize=8.5, color=GREY)
    ax.set_yscale("log", base=2)
    ax.set_ylim(min(ends) / 2, max(ends) * 2)
    low, high = np.log2(ax.get_ylim())
    every = next(n for n in (1, 2, 4, 8, 16, 64) if (high - low) / n <= 9)
    ax.yaxis.set_major_locator(FixedLocator(2.0 ** np.arange(every * np.ceil(low / every), high, every)))
    ax.yaxis.set_major_formatter(FuncFormatter(power_of_two))
    ax.yaxis.set_minor_locator(NullLocator())


def draw_flushed(ax, series, look):
    cast = {tensor: rows for tensor, rows in series.items() if rows[-1]["format"] in RANGES}
    for tensor, rows in cast.items():
        flushed = [100 * row["flushed"] for row in rows]
        ax.plot([row["step"] for row in rows], flushed, **look(tensor), **dots(rows))
    ax.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    ax.set_ylim(-0.002, 100)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.01, 0.1, 1, 10, 100]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    every = [row for rows in cast.values() for row in rows]
    worst = max(every, key=lambda row: row["saturated"], default=None)
    if worst is None:
        text = "no 8-bit format"
    elif worst["saturated"] > 0:
        text = (f"saturated: at most {100 * worst['saturated']:.2g} %\n"
                f"({worst['tensor']}, step {worst['step']:.0f})")
    else:
        text = "none saturated"
    ax.text(0.03, 0.96, text, transform=ax.transAxes, va="top", fontsize=8.5, color=GREY, linespacing=1.4)


def dots(rows):
    return {"marker": "o", "ms": 3} if len(rows) < 3 else {}


# ----------------------------------------------------------------------------------------------------------
# One step: the dump of a first step (--dump), against what theory says. dev/method.md has the theory.

BF16 = (2.0 ** -126, 2.0 ** -126, 3.39e38)  # as RANGES below; its subnormals play no part here
MANTISSA = {"BF16": 7, "E4M3": 3, "E5M2": 2}
HIDDEN = ["qkv", "out", "up", "down"]
STEP_HELP = "a file that train_us wrote with --dump"


def cast(x, kind):
    """x in a narrower format, as a float: clipped, then the nearest value, ties to even."""
    if kind == "FP32":
        return x
    _, normal, most = BF16 if kind == "BF16" else RANGES[kind]
    exponent = np.frexp(np.maximum(np.abs(x), normal))[1] - 1  # 2^exponent <= |x|
    step = np.ldexp(np.float32(1), exponent - MANTISSA[kind])
    return np.clip(np.round(x / step) * step, -most, most).astype(np.float32)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def cosine(x, y):
    return float(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def read_tensors(path):
    """Settings and tensors of a safetensors file of this program's trainer."""
    if not os.path.isfile(path):
        die(f"there is no {path}")
    data = open(path, "rb").read()
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        meta, tensors = header.pop("__metadata__"), {}
        for name, entry in header.items():
            begin, end = (8 + size + at for at in entry["data_offsets"])
            kind = {"F32": "<f4", "I32": "<i4"}[entry["dtype"]]
            tensors[name] = np.frombuffer(data[begin:end], kind).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError):
        die(f"{path} is not a safetensors file of this program's trainer")
    return meta, tensors


def read_dump(path):
    meta, tensors = read_tensors(path)
    if "act.x0" not in tensors or meta["scheme"] != "us" or meta["activation"] != "gelu":
        die(f"{path} is not what --dump writes for --scheme us with gelu")
    d = {name: t.reshape(-1, t.shape[-1]) if name.startswith("act.") else t
         for name, t in tensors.items()}  # all positions of all sequences are rows
    formats = {"fp32": ("FP32", "FP32", "FP32"), "bf16": ("BF16", "BF16", "BF16"),
               "fp8": ("BF16", "E4M3", "E5M2")}
    d["stream"], d["operand"], d["gradient"] = formats[meta["precision"]]
    d["B"], d["T"] = tensors["tokens"].shape
    d["N"], d["L"], d["C"], d["H"] = d["B"] * d["T"], *(int(meta[k]) for k in ("layers", "width", "heads"))
    d["V"], d["tau"], d["S"] = int(meta["vocab"]), float(meta["tau"]), float(meta["grad_scale"])
    d["logits"] = d["act.logits"][:, :d["V"]]
    d["name"] = f"L {d['L']}, C {d['C']}, heads {d['H']}, {d['B']} x {d['T']} tokens, {meta['precision']}"
    return d


def before(d, l, kind):
    """What the linear `kind` of block l reads."""
    here = {"qkv": f"h.{l - 1}.x" if l else "x0", "out": f"h.{l}.y", "up": f"h.{l}.mid", "down": f"h.{l}.g"}
    return d["act." + here[kind]]


def by_head(d, x):
    """(N, D H) as (B, H, T, D)."""
    return x.reshape(d["B"], d["T"], d["H"], -1).transpose(0, 2, 1, 3)


def attention_of(d, l):
    """Q, K, V and the probabilities of block l."""
    q, k, v = (by_head(d, x) for x in np.split(d[f"act.h.{l}.qkv"], 3, axis=1))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(np.float32(q.shape[-1]))
    scores[..., np.triu(np.ones((d["T"], d["T"]), bool), 1)] = -np.inf
    return q, k, v, softmax(scores)


def norm_backward(dout, x, gain):
    centered = x - x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(np.mean(centered ** 2, 1, keepdims=True) + 1e-5)
    xh, d = centered * rstd, dout * gain
    return rstd * (d - d.mean(1, keepdims=True) - xh * (d * xh).mean(1, keepdims=True))


def gelu_slope(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x / np.cosh(u) ** 2 * np.sqrt(2 / np.pi) * (1 + 0.134145 * x ** 2)


def backward(d, scale=1.0):
    """The gradients between operations, which a dump leaves out: backward once more, from its activations and
    with the trainer's roundings, on scale * S times the true gradient. dy.X and dx.X are of linear X's output
    and input, d.X is of the stream, dw.X of a weight."""
    R, g, a, b = lambda x: cast(x, d["stream"]), {}, np.sqrt(1 - d["tau"]), np.sqrt(d["tau"])

    def linear(l, kind, dy):
        name, x = f"h.{l}.{kind}", cast(before(d, l, kind), d["operand"])
        w, dy8 = cast(R(d["param." + name]), d["operand"]), cast(dy, d["gradient"])
        alpha = np.float32(w.shape[1] ** -0.5)
        g["dy." + name], g["dx." + name], g["dw." + name] = dy, R(alpha * (dy8 @ w)), alpha * (dy8.T @ x)
        return g["dx." + name]

    dlogits = softmax(d["logits"])
    dlogits[np.arange(d["N"]), d["targets"].ravel()] -= 1
    g["dlogits"] = R(np.float32(scale) * dlogits)
    dx = R(g["dlogits"] @ R(d["param.head"][:d["V"]]))
    g["dx.head"], g["dw.head"] = dx, g["dlogits"].T @ d["act.lnf"]
    dx = R(norm_backward(dx, d[f"act.h.{d['L'] - 1}.x"], d["param.lnf.gain"]))
    for l in reversed(range(d["L"])):
        g[f"d.h.{l}.x"] = dx
        dy = R(norm_backward(b * dx, d[f"act.h.{l}.down"], d[f"param.h.{l}.ln2.gain"]))
        dg = linear(l, "down", dy)
        dx = R(a * dx + linear(l, "up", R(dg * gelu_slope(d[f"act.h.{l}.up"]))))
        g[f"d.h.{l}.mid"] = dx
        dy = R(norm_backward(b * dx, d[f"act.h.{l}.out"], d[f"param.h.{l}.ln1.gain"]))
        dy = by_head(d, linear(l, "out", dy))
        q, k, v, p = attention_of(d, l)
        dp = dy @ v.transpose(0, 1, 3, 2)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(np.float32(q.shape[-1]))
        parts = ds @ k, ds.transpose(0, 1, 3, 2) @ q, p.transpose(0, 1, 3, 2) @ dy
        dqkv = np.concatenate([z.transpose(0, 2, 1, 3).reshape(d["N"], -1) for z in parts], axis=1)
        dx = R(a * dx + linear(l, "qkv", R(dqkv)))
    g["d.x0"] = dx
    if scale == 1:  # the weight gradients are in the dump: that is the check of all this
        off = {n[3:]: rms(w - d["grad." + n[3:]][:len(w)]) / rms(w) for n, w in g.items() if n[:3] == "dw."}
        worst = max(off, key=off.get)
        print(f"{d['name']}: gradients between operations computed again from the dump; "
              f"weight gradients are {100 * off[worst]:.2g} % off the dump's at most ({worst})")
        if off[worst] > 0.5:  # FP32 agrees to 1e-6; in FP8, values at a boundary fall to either side
            die("that is too much: this script and the trainer do not compute the same")
    return g


def flushed(x, kind):
    """Share of the non-zero values that a cast turns into zero."""
    return np.count_nonzero((cast(x, kind) == 0) & (x != 0)) / max(np.count_nonzero(x), 1)


def attention_variance(k):
    """Variance of attention over k independent values of variance 1 with unit-normal scores: [µS] eq. 6."""
    return np.e / k - (np.e - 1) / k ** 2


# Of GELU and of its slope where the input is a unit normal: dev/method.md, 5.
GELU_RMS = np.sqrt(1 / 3 + 1 / (2 * np.pi * np.sqrt(3)))
SLOPE_RMS = np.sqrt(1 / 3 + 2 / (3 * np.pi * np.sqrt(3)))


def alike(d, x):
    """Correlation of two positions of a sequence: the mean product of their rows over the mean square."""
    x = x.reshape(d["B"], d["T"], -1).astype(np.float64)
    return (np.mean(x.sum(1) ** 2) / np.mean(x ** 2) / d["T"] - 1) / (d["T"] - 1)


def table(*rows):
    """Prints rows of a Markdown table; numbers with three digits."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(c if isinstance(c, str) else f"{c:.3g}" for c in row) + " |")
        if i == 0:
            print("|" + "---|" * len(row))


def print_init(args):
    for path in args.dumps:
        d = read_dump(path)
        g = backward(d)
        print(f"\nlinears: RMS over {d['L']} blocks; gain: that of the output over that of the input")
        rows = [["linear", "fan_in", "fan_out", "RMS of X", "RMS of Y", "gain", "predicted",
                 "RMS of dY", "RMS of dX", "gain of dX", "predicted √(fan_out/fan_in)"]]
        for kind in HIDDEN:
            names = [f"h.{l}.{kind}" for l in range(d["L"])]
            o, i = d["param." + names[0]].shape
            x = rms([rms(before(d, l, kind)) for l in range(d["L"])])
            y, dy, dx = (rms([rms(of[at + n]) for n in names])
                         for of, at in ((d, "act."), (g, "dy."), (g, "dx.")))
            rows.append([kind, str(i), str(o), x, y, y / x, 1.0, dy, dx, dx / dy, np.sqrt(o / i)])
        table(*rows)
        print("\nthe stream")
        after = np.unique(np.linspace(0, d["L"], min(d["L"] + 1, 9)).round().astype(int))
        blocks = [f"h.{n - 1}.x" if n else "x0" for n in after]
        table(["after", *(f"block {n - 1}" if n else "x0" for n in after)],
              ["RMS, predicted 1", *(rms(d["act." + n]) for n in blocks)],
              ["of a plain sum: √(1 + 2 blocks)", *(np.sqrt(1 + 2 * n) for n in after)],
              ["share of x0 in its variance", *(cosine(d["act." + n], d["act.x0"]) ** 2 for n in blocks)],
              ["predicted (1 - tau)^(2 blocks)", *((1 - d["tau"]) ** (2 * n) for n in after)],
              ["RMS of its gradient", *(rms(g["d." + n]) for n in blocks)])
        gelu = rms([rms(d[f"act.h.{l}.g"]) for l in range(d["L"])])
        print(f"\nGELU's output: RMS {gelu:.3f}, of a unit normal {GELU_RMS:.3f} (slope: {SLOPE_RMS:.3f})")
        print(f"logits: RMS {rms(d['logits']):.4f}, 1/√C is {d['C'] ** -0.5:.4f}; "
              f"loss {d['loss'][0]:.4f}, ln V + 1/2C is {np.log(d['V']) + 0.5 / d['C']:.4f}")
        print(f"dlogits: RMS {rms(g['dlogits']):.4f}, 1/√V is {d['V'] ** -0.5:.4f}; "
              f"gradient that enters the last LayerNorm: RMS {rms(g['dx.head']):.3f}, predicted 1\n")


def print_update(args):
    """What a first update of size 1 does to each linear's output: signs, as Lion's and AdamW's first is."""
    found, dumps = {}, sorted((read_dump(path) for path in args.dumps), key=lambda d: d["C"])
    for d in dumps:
        for kind in HIDDEN:
            change = []
            for l in range(d["L"]):
                sign = np.sign(d[f"grad.h.{l}.{kind}"])
                change.append(rms(before(d, l, kind) @ sign.T) / np.sqrt(sign.shape[1]))
            found.setdefault(kind, []).append(rms(change))
        sign = np.sign(d["grad.head"][:d["V"]])
        found.setdefault("head", []).append(rms(d["act.lnf"] @ sign.T) / d["C"])
        found.setdefault("head, over RMS of logits", []).append(found["head"][-1] / rms(d["logits"]))
    width = [d["C"] for d in dumps]
    rows = [["RMS of the change over lr", *(f"C = {c}" for c in width), "grows as C to the"]]
    for kind, change in found.items():
        power = np.polyfit(np.log(width), np.log(change), 1)[0] if len(set(width)) > 1 else float("nan")
        rows.append([kind, *change, f"{power:.2f}"])
    table(*rows)


def print_decay(args):
    """Rows of wte for bytes that never occur get no gradient: decay is all that moves them."""
    d = read_dump(args.dump)
    if d["V"] != 256:
        die(f"{args.dump}: bytes that never occur are looked for; this model reads tokens")
    rows = [["run", "width", "peak rate", "rows of wte without a gradient", "they shrink to", "predicted"]]
    for path in args.checkpoints:
        meta, after = read_tensors(path)
        c = {k: float(meta[k]) for k in ("steps", "step", "warmup", "decay", "lr", "width", "seed")}
        if "wte" not in after or c["width"] != d["C"]:
            die(f"{path} is not a checkpoint of a model as wide as that of {args.dump}")
        s = np.arange(1, c["step"] + 1)
        cosine = 0.1 + 0.45 * (1 + np.cos(np.pi * (s - c["warmup"]) / max(c["steps"] - c["warmup"], 1)))
        share = np.where(s <= c["warmup"], s / max(c["warmup"], 1), cosine)
        ratio = after["wte"] / d["param.wte"]
        alone = np.ptp(ratio, axis=1) < 1e-4  # one factor for the whole row
        rows.append([path, str(int(c["width"])), c["lr"], str(alone.sum()),
                     f"{np.median(ratio[alone]):.4f}" if alone.any() else "-",
                     f"{np.prod(1 - c['decay'] * share):.4f}"])
    table(*rows)


FORWARD, BACKWARD = COLORS[0], COLORS[1]


def plot_block(args):
    """One block, top to bottom; its two branches side by side. Theory knows nothing of the run but tau, T and
    the gradient that comes in from above; RMS values it predicts stand before the measured ones."""
    d = read_dump(args.dump)
    l = args.block
    if not 0 <= l < d["L"]:
        die(f"--block {l}: the blocks of {args.dump} are 0 to {d['L'] - 1}")
    g, a, b = backward(d), np.sqrt(1 - d["tau"]), np.sqrt(d["tau"])
    h, act, var = f"h.{l}.", lambda n: rms(d[f"act.h.{l}.{n}"]), attention_variance(np.arange(1, d["T"] + 1))
    top = rms(g[f"d.{h}x"])  # given; below, each prediction follows from the one before
    ratio = SLOPE_RMS / GELU_RMS
    mid = top * np.sqrt(a ** 2 + b ** 2 * ratio ** 2)
    branch = {kind: (d[f"act.{h}{after}"] - a * d[entry]) / b for kind, after, entry in
              (("ln1", "mid", f"act.h.{l - 1}.x" if l else "act.x0"), ("ln2", "x", f"act.{h}mid"))}
    # Each arrow: predicted and measured RMS, of the tensor and of its gradient; then the box below.
    alpha = lambda kind: f"1/√{d[f'param.{h}{kind}'].shape[1]} · x W$^T$"
    lin = f"x, W in {d['operand']}, dy in {d['gradient']}"
    stream = f"√{1 - d['tau']:.3g} stream + √{d['tau']:.3g} branch"
    Y, dY = np.sqrt(var.mean()), b * mid * np.sqrt((1 / var).mean())
    attention = [
        (1, rms(before(d, l, "qkv")), np.sqrt(3) * b * mid, rms(g[f"dx.{h}qkv"]), "qkv: " + alpha("qkv"),
         lin),
        (1, act("qkv"), b * mid, rms(g[f"dy.{h}qkv"]), "softmax(Q K$^T$/√D) V", "causal"),
        (Y, act("y"), dY, rms(g[f"dx.{h}out"]), "out: " + alpha("out"), lin),
        (Y, act("out"), dY, rms(g[f"dy.{h}out"]), "LayerNorm 1", ""),
        (1, rms(branch["ln1"]), b * mid, b * rms(g[f"d.{h}mid"]), stream, ""),
        (1, act("mid"), mid, rms(g[f"d.{h}mid"]), "", "")]
    mlp = [
        (1, act("mid"), top * b * ratio, rms(g[f"dx.{h}up"]), "up: " + alpha("up"), lin),
        (1, act("up"), top * b * ratio / 2, rms(g[f"dy.{h}up"]), "GELU", ""),
        (GELU_RMS, act("g"), top * b / GELU_RMS / 2, rms(g[f"dx.{h}down"]), "down: " + alpha("down"), lin),
        (GELU_RMS, act("down"), top * b / GELU_RMS, rms(g[f"dy.{h}down"]), "LayerNorm 2", ""),
        (1, rms(branch["ln2"]), top * b, b * top, stream, ""),
        (1, act("x"), top, top, "", "")]

    fig, axes = plt.subplots(1, 2, figsize=(10, 7.4))
    fig.subplots_adjust(left=0.01, right=0.99, top=0.87, bottom=0.045, wspace=0.02)
    fig.text(0.02, 0.975, f"Block {l} at initialisation", fontsize=12, fontweight="bold", va="top")
    fig.text(0.02, 0.935, f"{d['name']}, tau {d['tau']:.3g}.  RMS, predicted | measured.  "
             f"Gradients are S = N C = {d['S']:.0f} times the true ones.", va="top")
    entry = "d." + (f"h.{l - 1}.x" if l else "x0")
    skipped = [(rms(g[entry]), mid * np.sqrt(a ** 2 + 3 * b ** 2), "attention"),
               (rms(g[f"d.{h}mid"]), mid, "mlp")]
    for ax, steps, (total, wanted, name) in zip(axes, (attention, mlp), skipped):
        ax.set(xlim=(0, 10), ylim=(-0.2, 11.6))
        ax.axis("off")
        number = lambda x: f"{x:.3f}" if x < 0.0995 else f"{x:.2f}"
        pair = lambda p, m: f"{number(p)} | {number(m)}"
        ax.text(5.5, 11.5, f"{name} branch", ha="center", fontweight="bold", va="center")
        ax.text(5.2, 11.0, "↓ tensor", color=FORWARD, ha="right", va="center")
        ax.text(5.8, 11.0, "↑ gradient", color=BACKWARD, ha="left", va="center")
        ax.plot([1.1, 1.1, 2.95], [10.55, 1.35, 1.35], color=GREY, lw=1)
        ax.plot([1.1, 5.5], [10.55, 10.55], color=GREY, lw=1)
        ax.annotate("", (3, 1.35), (2.6, 1.35), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1})
        ax.text(0.95, 6, f"stream; its gradient {pair(wanted, total)}", rotation=90, ha="right", va="center",
                color=BACKWARD)
        for i, (p, m, gp, gm, title, note) in enumerate(steps):
            y = 10.55 - 2.05 * i  # where the arrow begins
            ax.annotate("", (5.5, y - 0.85 if title else y - 0.6), (5.5, y),
                        arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1, "shrinkA": 0, "shrinkB": 0})
            given = i == len(steps) - 1 and name == "mlp"
            ax.text(5.2, y - 0.38, pair(p, m), color=FORWARD, ha="right", va="center")
            ax.text(5.8, y - 0.38, f"given {number(gm)}" if given else pair(gp, gm), color=BACKWARD,
                    ha="left", va="center")
            if title:
                ax.add_patch(FancyBboxPatch((3, y - 2.05), 5, 1.2, "round,pad=0,rounding_size=0.15",
                                            fc="#F1F6FC", ec=GREY, lw=0.7))
                ax.text(5.5, y - (1.22 if note else 1.45), title, ha="center", va="center")
                ax.text(5.5, y - 1.75, note, ha="center", va="center", fontsize=8, color=GREY)
    save(fig, args.out)


def plot_attention(args):
    d = read_dump(args.dump)
    k = np.arange(1, d["T"] + 1)
    depth = [matplotlib.colors.to_hex(c) for c in plt.get_cmap("viridis")(np.linspace(0, 0.88, d["L"]))]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    fig.subplots_adjust(left=0.07, right=0.985, top=0.86, bottom=0.11, wspace=0.17)
    rows = [["block", "c of V", "variance, last quarter of k", "c + (1 - c) eq. 6", "eq. 6",
             "square root of softmax", "1 + 0.78 c (k - 1)", "c of attention's output", "c of GELU's",
             "c of the stream after the block"]]
    late = k > 0.75 * d["T"]
    for l in range(d["L"]):
        _, _, v, p = attention_of(d, l)
        c, size = alike(d, d[f"act.h.{l}.qkv"][:, 2 * d["C"]:]), np.mean(v ** 2)
        plain, root = (np.mean((w @ v) ** 2, axis=(0, 1, 3)) / size for w in (p, np.sqrt(p)))
        if l == 0:
            alone = np.mean(np.square(p).sum(-1), axis=(0, 1))
            axes[0].plot(k, alone, color=GREY, lw=1, label="block 0, were its values independent")
        theory = c + (1 - c) * attention_variance(k), 1 + c * np.exp(-0.25) * (k - 1)
        for ax, y, line, label in zip(axes, (plain, root), theory, (f"block {l}: c = {c:.2f}", None)):
            ax.plot(k, y, color=depth[l], lw=0.5, alpha=0.4)
            ax.plot(k, smoothed(y, 9), color=depth[l], lw=1.5, label=label)
            ax.plot(k, line, color=depth[l], lw=1, ls=(0, (1, 1.5)))
        rows.append([str(l), c, *(y[late].mean() for y in (plain, theory[0], attention_variance(k), root,
                                                           theory[1])),
                     *(alike(d, d[f"act.h.{l}.{n}"]) for n in ("y", "g", "x"))])
    axes[0].plot(k, attention_variance(k), color=INK, lw=1.2, ls=(0, (5, 2)), label="e/k − (e−1)/k²")
    axes[1].plot(k, np.ones(d["T"]), color=INK, lw=1.2, ls=(0, (5, 2)), label="independent values: 1")
    for ax, title in zip(axes, ("softmax", "square root of softmax (not in this program)")):
        ax.set(xscale="log", yscale="log", xlim=(1, d["T"]), xlabel="position k")
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
        ax.legend(fontsize=8.5, loc="lower left" if ax is axes[0] else "upper left")
    axes[0].set_ylabel("variance of attention's output over that of the values")
    fig.text(0.07, 0.965, f"{d['name']}, at initialisation.  Dotted: with the values' correlation c",
             fontsize=8.5, color=GREY, va="top")
    table(*rows)
    print("\nblock 0, were its values independent (the sum of squared probabilities)")
    some = [k == 1, (k > 1) & (k < 5), (k > 12) & (k < 21), (k > 48) & (k < 81), late]
    mean = np.array([[y[s].mean() for s in some if s.any()] for y in (alone, attention_variance(k))])
    table(["k", *(f"{k[s][0]} to {k[s][-1]}" for s in some if s.any())], ["measured", *mean[0]],
          ["eq. 6", *mean[1]], ["ratio", *(mean[0] / mean[1])])
    save(fig, args.out)


def plot_formats(args):
    """What a cast does to a unit normal (a weight of the dump) times 2^j."""
    d = read_dump(args.dump)
    w, scale = d["param.h.0.up"].ravel(), 2.0 ** np.arange(-20, 20.01, 0.25)
    fig, (ax, below) = plt.subplots(2, 1, figsize=(10, 5.4), sharex=True,
                                    gridspec_kw={"height_ratios": [3, 2]})
    fig.subplots_adjust(left=0.075, right=0.985, top=0.93, bottom=0.095, hspace=0.09)
    rows = [["format", "error of a cast at RMS 1", "at most 1.1 times that from RMS", "to RMS",
             "flushed at RMS 1"]]
    for color, kind in zip(COLORS, RANGES):
        x = [np.float32(s) * w for s in scale]
        error = np.array([100 * rms(cast(y, kind) - y) / rms(y) for y in x])
        lost = np.array([100 * flushed(y, kind) for y in x])
        ax.plot(scale, error, color=color, lw=1.6, label=f"{kind}: {MANTISSA[kind]} bits of mantissa")
        below.plot(scale, lost, color=color, lw=1.6)
        good, one = scale[error < 1.1 * error[scale == 1]], scale == 1
        rows.append([kind, f"{error[one][0]:.2f} %", *(f"2^{np.log2(s):g}" for s in (good[0], good[-1])),
                     f"{lost[one][0]:.3f} %"])
    ax.set(xscale="log", yscale="log", ylim=(1, 130), ylabel="error of a cast, RMS, %")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(power_of_two))
    ax.xaxis.set_major_locator(FixedLocator(2.0 ** np.arange(-20, 21, 4)))
    ax.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    below.set(xlim=(scale[0], scale[-1]), ylim=(0, 102), ylabel="flushed to zero, %",
              xlabel="RMS of the tensor before the cast (a normal distribution)")
    for axis in (ax, below):
        axis.axvline(1, color=INK, lw=1, ls=(0, (5, 2)))
    ax.legend(loc="lower left")
    table(*rows)
    save(fig, args.out)


def plot_gradients(args):
    d = read_dump(args.dump)
    scaled, true = backward(d), backward(d, 1 / d["S"])
    rows = [["output gradient of"] + [f"block {l}" for l in range(d["L"])]]
    fig, axes = plt.subplots(2, 1, figsize=(10, 5.6), sharex=True)
    fig.subplots_adjust(left=0.075, right=0.985, top=0.93, bottom=0.09, hspace=0.2)
    tiny, normal, most = RANGES["E5M2"]
    bins = np.arange(-60, 17, 0.5)
    for kind, color in zip(HIDDEN, COLORS):
        names = [f"dy.h.{l}.{kind}" for l in range(d["L"])]
        share = lambda g: [f"{100 * flushed(g[n], 'E5M2'):.2f} %" if g[n].any() else "all zero"
                           for n in names]
        once = [f"{100 * flushed(scaled[n] / np.float32(d['S']), 'E5M2'):.1f} %" for n in names]
        rows += [[f"{kind}, with S", *share(scaled)], [f"{kind}, over S: that cast alone", *once],
                 [f"{kind}, without S: the whole way", *share(true)]]
        values = np.concatenate([scaled[n].ravel() for n in names])
        values = np.log2(np.abs(values[values != 0]).astype(np.float64))
        for ax, shift in zip(axes, (0, np.log2(d["S"]))):
            count = np.histogram(values - shift, bins)[0] / len(values)
            ax.stairs(100 * count, bins, color=color, lw=1.5, label=kind)
    for ax, title in zip(axes, (f"with S = N C = {d['S']:.0f}", "the true gradient, divided by S")):
        ax.axvspan(np.log2(normal), np.log2(most), color="#E1EBF7", lw=0, zorder=0)
        ax.axvspan(np.log2(tiny), np.log2(normal), color="#F1F6FC", lw=0, zorder=0)
        ax.axvline(np.log2(tiny) - 1, color=INK, lw=1, ls=(0, (5, 2)))
        ax.set(xlim=(-40, 17), ylabel="values per half octave, %")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:.0f}}}$"))
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for x, text, side in ((np.log2(normal) + 0.3, "E5M2 in full precision", "left"),
                          (np.log2(tiny) - 1.3, "flushed to zero", "right")):
        axes[0].text(x, axes[0].get_ylim()[1] * 0.93, text, fontsize=8.5, color=GREY, ha=side, va="top")
    axes[0].legend(loc="center left", title="gradient of the output of")
    axes[1].set_xlabel("magnitude of a gradient, before its cast")
    table(*rows)
    save(fig, args.out)


PICTURES = {"formats": (plot_formats, "what a cast costs, by the RMS of a tensor"),
            "attention": (plot_attention, "variance of attention's output by position"),
            "block": (plot_block, "one block, with predicted and measured RMS at every arrow"),
            "gradients": (plot_gradients, "output gradients against E5M2's range, with S and without")}
TABLES = {"init": (print_init, "RMS of tensors and gradients at initialisation, against theory"),
          "update": (print_update, "what a first update changes, by width"),
          "decay": (print_decay, "weight decay where nothing else moves a weight")}


# ----------------------------------------------------------------------------------------------------------

def main():
    p = Parser(description="Draw the loss curves of runs, the sizes of tensors, and a first step.")
    commands = p.add_subparsers(dest="command", required=True,
                                metavar="|".join(["loss", "stats", *PICTURES, *TABLES]))
    loss = commands.add_parser("loss", help="loss over steps of one or more runs")
    loss.add_argument("out", metavar="OUT.png", help="the picture to write")
    loss.add_argument("runs", nargs="+", metavar="RUN", help="folder with a log.csv")
    loss.add_argument("--labels", nargs="+", metavar="NAME", help="names of the curves (default: folders)")
    loss.add_argument("--smooth", type=int, metavar="N", help="steps to average over (default: a run's 1/50)")
    loss.add_argument("--val", action="store_true", help="show the validation loss too")
    loss.add_argument("--group", action="store_true",
                      help="one curve for runs with the same name up to the last _: mean and range")
    loss.add_argument("--diff", action="store_true", help="add the difference to the first curve below")
    loss.add_argument("--ymin", type=float, help="lower end of the loss axis (default: from the data)")
    loss.add_argument("--ymax", type=float, help="upper end (default: leaves out the first steep fall)")
    loss.add_argument("--title", help="a line above the picture")
    stats = commands.add_parser("stats", help="sizes of tensors against the range of their formats")
    stats.add_argument("out", metavar="OUT.png", help="the picture to write")
    stats.add_argument("run", metavar="RUN", help="folder with a stats.csv")
    for name, (_, text) in PICTURES.items():
        picture = commands.add_parser(name, help=text)
        picture.add_argument("out", metavar="OUT.svg", help="the picture to write (or OUT.png)")
        picture.add_argument("dump", metavar="DUMP", help=STEP_HELP)
        if name == "block":
            picture.add_argument("--block", type=int, default=0, metavar="N", help="which one (default: 0)")
    for name, (_, text) in TABLES.items():
        printed = commands.add_parser(name, help=text)
        if name == "decay":
            printed.add_argument("dump", metavar="DUMP", help=STEP_HELP + ": the parameters before a run")
            printed.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                                 help="after it, with the same seed")
        else:
            printed.add_argument("dumps", nargs="+", metavar="DUMP", help=STEP_HELP)
    args = p.parse_args()
    if args.command not in TABLES and not args.out.endswith((".png", ".svg")):
        die(f"{args.out}: the picture's name has to end in .png or .svg")
    if args.command == "loss" and args.smooth is not None and args.smooth < 1:
        die(f"--smooth {args.smooth}: must be at least 1")
    known = {"loss": plot_loss, "stats": plot_stats, **{k: f for k, (f, _) in (PICTURES | TABLES).items()}}
    known[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        die(f"{e.filename or 'cannot read or write'}: {e.strerror or e}")
    except KeyboardInterrupt:
        die("interrupted; no picture was written")
