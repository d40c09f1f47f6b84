"""
One picture for each experiment, from the rows of its .csv: 900 x 420 pixels, in the look of dev/plot.py.
Needs matplotlib.
"""

import contextlib
import io
import math
import os
import sys

import matplotlib  # (first, so that its absence is an ImportError; plot.py would exit)

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import judge
from plot import COLORS, INK, RANGES, FixedLocator, FuncFormatter, MaxNLocator, NullLocator, plt, save

INF = float("inf")
plt.rcParams.update({"font.size": 8, "legend.fontsize": 7.5, "axes.titlesize": 8.5,
                     "legend.handlelength": 1.6, "legend.borderaxespad": 0.2, "legend.labelspacing": 0.3})


def figure(columns, **more):
    fig, axes = plt.subplots(1, columns, figsize=(7.5, 3.5), squeeze=False, layout="constrained", **more)
    return fig, axes[0]


def title(ax, text):
    ax.set_title(text, loc="left", fontweight="bold")


def shades(n):
    return [plt.get_cmap("viridis")(0.88 * i / max(n - 1, 1)) for i in range(n)]


def log2_axis(axis, low, high, plain=False, most=8):
    ticks = range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / most)))
    axis.set_major_locator(FixedLocator([2.0 ** k for k in ticks]))
    axis.set_minor_locator(NullLocator())
    written = lambda x, _: f"{x:g}" if plain else f"$2^{{{round(math.log2(x))}}}$"
    axis.set_major_formatter(FuncFormatter(written))


def loss_limits(axes, lowest):
    """A loss axis for curves with these minima. What lies above, diverged runs too, is marked at its top."""
    lowest = [y for y in lowest if y < INF] or [0.0]
    low, high = min(lowest), max(lowest)
    top = high + max(0.25, 0.5 * (high - low))
    for ax in axes:
        ax.set_ylim(low - 0.06 * (top - low), top)
    return top


def curves(e, rows):
    found = judge.curves(rows)
    series = list(dict.fromkeys(s for s, _ in found))
    groups = list(dict.fromkeys(g for _, g in found))
    fig, axes = figure(len(series), sharey=True)
    means = {cell: judge.means(c) for cell, c in found.items()}
    top = loss_limits(axes, [min(m.values()) for m in means.values()])
    for ax, s in zip(axes, series):
        for group, color in zip(groups, shades(len(groups))):
            curve = means[s, group]
            shown = {x: y for x, y in curve.items() if y <= top}
            ax.plot(list(curve), [y if y < INF else math.nan for y in curve.values()], color=color, lw=1.2)
            ax.plot(list(shown), list(shown.values()), color=color, ls="none", marker="o", ms=2.5,
                    label=judge.number(group))
            gone = [x for x, y in curve.items() if y > top]
            if gone:
                ax.plot(gone, [top] * len(gone), color=color, ls="none", marker="x", ms=4, clip_on=False)
            for x, seeds in found[s, group].items():
                if len(seeds) > 1 and max(seeds.values()) <= top:
                    ax.plot([x, x], [min(seeds.values()), max(seeds.values())], color=color, lw=3, alpha=0.3)
            best = judge.optimum(found[s, group])
            ax.plot([best["x"]], [best["loss"]], color=color, marker="*", ms=9, mec="white", mew=0.6,
                    zorder=4)
        title(ax, s)
        ax.set_xscale("log", base=2)
        xs = [math.log2(x) for (label, _), m in means.items() if label == s for x in m]
        log2_axis(ax.xaxis, min(xs), max(xs), e.swept[0] in ("tau", "head-lr"), 12 // len(series))
        ax.set_xlabel({"lr": "rate"}.get(e.swept[0], e.swept[0]))
    axes[0].set_ylabel("validation loss (x: above, or diverged)")
    if len(groups) > 1:
        axes[-1].legend(title=e.across[0], loc="upper center", title_fontsize=7.5, frameon=True,
                        framealpha=0.85, edgecolor="none")
    return fig


def variants(e, rows):
    series = list(dict.fromkeys(r["series"] for r in rows))
    names = list(dict.fromkeys(r["across"] for r in rows))
    fig, (ax,) = figure(1)
    top = loss_limits([ax], [r["loss"] for r in rows if r["loss"] < min(q["loss"] for q in rows) + 0.6])
    for i, name in enumerate(names):
        for j, s in enumerate(series):
            y = [r["loss"] for r in rows if (r["series"], r["across"]) == (s, name)]
            x = j + 0.22 * (i - (len(names) - 1) / 2)
            ax.plot([x] * len(y), [min(v, top) for v in y], color=COLORS[i], ls="none", ms=5, alpha=0.6,
                    marker="x" if min(y) > top else "o", clip_on=False, label=name if j == 0 else None)
            ax.plot([x - 0.07, x + 0.07], [min(judge.mean(y), top)] * 2, color=COLORS[i], lw=2)
            if judge.mean(y) > top:
                ax.annotate(judge.text(judge.mean(y)), (x, top), (0, -10), textcoords="offset points",
                            ha="center", va="top", fontsize=7, color=COLORS[i])
    ax.set(xticks=range(len(series)), xticklabels=series, ylabel="validation loss (line: mean of seeds)")
    ax.legend()
    return fig


def ranges(e, rows):
    rows = [r for r in rows if judge.hidden(r["tensor"]) and r["rms"] > 0]
    series = list(dict.fromkeys(r["series"] for r in rows))
    fig, axes = figure(len(series), sharey=True)
    low, high = min(r["rms"] for r in rows), max(r["rms"] for r in rows)
    for ax, s in zip(axes, series):
        for color, (operand, name) in zip(COLORS, (("input", "inputs"), ("weight", "weights"),
                                                   ("grad", "output gradients"))):
            tensors = {}
            for r in rows:
                if r["series"] == s and r["operand"] == operand:
                    tensors.setdefault(r["tensor"], []).append((r["step"], r["rms"]))
            for i, line in enumerate(tensors.values()):
                ax.plot(*zip(*line), color=color, lw=0.9, alpha=0.8, label=None if i else name,
                        marker="o" if len(line) < 3 else None, ms=2.5)
        normal, tiny = RANGES["E4M3"][1], RANGES["E4M3"][0]
        ax.axhspan(normal, RANGES["E4M3"][2], color="#E1EBF7", lw=0, zorder=0)
        ax.axhspan(tiny, normal, color="#F1F6FC", lw=0, zorder=0)
        ax.set_yscale("log", base=2)
        ax.set_ylim(min(low, tiny) / 2, max(high * 2, 4))
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.set_xlabel("step")
        title(ax, s)
    log2_axis(axes[0].yaxis, *map(math.log2, axes[0].get_ylim()))
    axes[0].set_ylabel("RMS (blue: E4M3's range, light: fewer bits)")
    axes[0].legend(loc="lower left", frameon=True, framealpha=0.85, edgecolor="none")
    return fig


def positions(e, rows):
    fig, axes = figure(2, sharex=True)
    kinds = list(dict.fromkeys(r["when"] for r in rows))
    for ax, column, name in zip(axes, ("softmax", "root"), ("softmax", "square root of softmax")):
        for when, color in zip(kinds, COLORS):
            mine = sorted((r["k"], r[column]) for r in rows if r["when"] == when)
            ax.plot(*zip(*mine), color=color, lw=1.1, label=when)
        k = [1.0 * i for i in range(1, 1 + int(max(r["k"] for r in rows)))]
        theory = [judge.predicted(i) if column == "softmax" else 1.0 for i in k]
        ax.plot(k, theory, color=INK, lw=1, ls=(0, (5, 2)),
                label="e/k − (e−1)/k²" if column == "softmax" else "independent: 1")
        ax.set(xscale="log", yscale="log", xlabel="position k")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        title(ax, name)
        ax.legend(loc="best")
    axes[0].set_ylabel("variance over that of the values")
    return fig


def underflow(e, rows):
    fig, (ax, right) = figure(2, width_ratios=[2, 1])
    for i, s in enumerate(dict.fromkeys(r["series"] for r in rows)):
        mine = [r for r in rows if r["series"] == s]
        for seed in sorted({r["seed"] for r in mine}):
            line = sorted((r["step"], 100 * r["flushed"]) for r in mine if r["seed"] == seed)
            ax.plot(*zip(*line), color=COLORS[i], lw=1.1, alpha=0.8, label=s if seed == 1 else None,
                    marker="o" if len(line) < 3 else None, ms=3)
        losses = list({r["seed"]: r["loss"] for r in mine}.values())
        right.plot([i] * len(losses), losses, color=COLORS[i], ls="none", marker="o", ms=5, alpha=0.6)
        right.plot([i - 0.2, i + 0.2], [judge.mean(losses)] * 2, color=COLORS[i], lw=2)
    names = list(dict.fromkeys(r["series"] for r in rows))
    right.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.6, len(names) - 0.4))
    ax.set(xlabel="step", ylim=(0, None))
    title(ax, "down's input flushed to zero, % of its non-zero values")
    title(right, "validation loss, seeds and mean")
    ax.legend()
    return fig


def searches(e, rows):
    series = list(dict.fromkeys(r["series"] for r in rows))
    fig, axes = figure(1 + len(series), width_ratios=[1.5] + [1] * len(series))
    ax, shown = axes[0], []
    for s, color in zip(series, COLORS):
        independent, at_random = judge.searched(rows, s)
        for losses, style, name in ((judge.best_so_far(independent), "-", "one by one"),
                                    (judge.expected_best(at_random), (0, (4, 1.5)), "random, expected")):
            ax.plot(range(1, len(losses) + 1), [y if y < INF else math.nan for y in losses], color=color,
                    ls=style, lw=1.4, label=f"{s}, {name}")
            shown.append(min(losses))
    loss_limits([ax], shown)
    ax.set(xlabel="runs", ylabel="best validation loss so far")
    ax.legend()
    errors = {s: judge.transfer_errors(rows, s) for s in series}
    most = max(max(found.values()) for found in errors.values()) or 1
    short = {"alpha-res-attn-ratio": "α ratio", "emb-lr": "emb lr", "lr": "lr"}
    for ax, s in zip(axes[1:], series):
        names = list(dict.fromkeys(a for a, _ in errors[s]))
        labels = [short.get(n, n.replace("alpha-", "α ")) for n in names]
        ax.imshow([[errors[s].get((a, b), math.nan) for b in names] for a in names], vmin=0, vmax=most,
                  cmap="Blues")
        for (a, b), error in errors[s].items():
            ax.text(names.index(b), names.index(a), f"{1000 * error:.0f}", ha="center", va="center",
                    fontsize=6.5, color="white" if error > 0.6 * most else INK)
        ax.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="tuned", ylabel="fixed")
        ax.set_xticklabels(labels, rotation=90)
        ax.set_yticklabels(labels)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        title(ax, f"{s}: error, 1/1000")
    return fig


def draw(e, rows, path):
    fig = globals()[e.picture](e, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        save(fig, path)
    plt.close(fig)
