"""
Draws the two pictures of a run, from the tables the trainer writes into its folder.

    python dev/plot.py loss loss.png runs/fp8 runs/bf16 --labels "FP8" "BF16" --val --diff
    python dev/plot.py loss seeds.png runs/fp8_s1 runs/fp8_s2 runs/bf16_s1 runs/bf16_s2 --group
    python dev/plot.py stats stats.png runs/fp8

loss   RUN/log.csv: training loss over steps, raw and smoothed, with the validation loss as markers. --group
       takes runs that differ only after the last _ of their names as one: mean and range over the seeds.
stats  RUN/stats.csv: the root mean square of every tensor that goes into a matrix product, over steps,
       against what its format can represent, and the share of its values that the cast turned into zero.

Needs matplotlib (pip install matplotlib).
"""

import argparse
import csv
import io
import os
import sys

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.lines import Line2D
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
    "legend.frameon": False})


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
    fig.savefig(drawn, format="png")
    # 256 colours are enough for these pictures, and a third of the size, which counts in a repository.
    small = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    try:
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

def main():
    p = Parser(description="Draw the loss curves of runs, or the sizes of the tensors of one run.")
    commands = p.add_subparsers(dest="command", metavar="loss|stats", required=True)
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
    args = p.parse_args()
    if not args.out.endswith(".png"):
        die(f"{args.out}: the picture's name has to end in .png")
    if args.command == "loss" and args.smooth is not None and args.smooth < 1:
        die(f"--smooth {args.smooth}: must be at least 1")
    plot_loss(args) if args.command == "loss" else plot_stats(args)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        die(f"{e.filename or 'cannot read or write'}: {e.strerror or e}")
    except KeyboardInterrupt:
        die("interrupted; no picture was written")
