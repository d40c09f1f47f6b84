"""
From the rows of an experiment's .csv: lines of a table, and one sentence with what was measured. No verdicts:
those are written by hand, in README.md. Standard library only.
"""

import math

INF = float("inf")
CLIFF = 0.4  # so much loss more within two values above the best (mostly rates: octaves) is no parabola
GUESS = math.log(256)  # loss of guessing a byte


def text(loss):
    return "diverged" if loss == INF else f"{loss:.4g}" if loss >= 100 else f"{loss:.3f}"


def number(x):
    return f"{x:g}" if isinstance(x, float) else str(x)


def power(x):
    return f"2^{math.log2(x):.1f}"


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def table(rows):
    rows = [[str(c) for c in row] for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, wide)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *lines[1:]]


# ---- Sweeps: where along a curve is the loss lowest?

def curves(rows):
    """{(series, across): {x: {seed: loss}}}, in the file's order."""
    found = {}
    for r in rows:
        found.setdefault((r["series"], r["across"]), {}).setdefault(r["x"], {})[r["seed"]] = r["loss"]
    return {cell: dict(sorted(curve.items())) for cell, curve in found.items()}


def means(curve):
    """
    {x: loss} over seeds. Far from the optimum there is seed 1 alone: such a point is moved by what the mean
    of all seeds differs from seed 1 where all ran, so that the curve has no step there.
    """
    most = max(map(len, curve.values()))
    full = [s for s in curve.values() if len(s) == most and INF not in s.values()]
    shift = mean(mean(s.values()) - s[1] for s in full if 1 in s) if most > 1 and full else 0.0
    return {x: mean(s.values()) + (shift if len(s) < most else 0.0) for x, s in curve.items()}


def vertex(points):
    """Lowest point of the parabola through three points (log2 x, loss), kept between the outer ones."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not right > left:
        return x1
    return min(max((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left), x0), x2)


def optimum(curve):
    """Of one curve: best x by parabola and on the grid, loss there, range over seeds, and a mark of doubt."""
    loss, most = means(curve), max(map(len, curve.values()))
    best = min((x for x in loss if len(curve[x]) == most), key=loss.get)
    grid = list(loss)
    at = grid.index(best)
    cliff = "~" if max(loss[x] for x in grid[at:at + 3]) > loss[best] + CLIFF else ""
    found = {"grid": best, "loss": loss[best], "x": best, "mark": "", "low": best, "high": best}
    near = grid[max(0, at - 1):at + 2]
    if len(near) < 3 and len(grid) > 1:
        return {**found, "mark": " (end)"}
    if len(near) < 3 or INF in [loss[x] for x in near]:
        return {**found, "mark": cliff}
    lowest = lambda at: 2 ** vertex([(math.log2(x), at(x)) for x in near])
    seeds = set.intersection(*(set(curve[x]) for x in near))
    single = [lowest(lambda x: curve[x][seed]) for seed in seeds if INF not in [curve[x][seed] for x in near]]
    return {**found, "x": lowest(loss.get), "mark": cliff, "low": min(single, default=best),
            "high": max(single, default=best)}


def optima(e, rows):
    found = {cell: optimum(curve) for cell, curve in curves(rows).items()}
    across, swept = e.across[0], e.swept[0]
    written = power if swept in ("lr", "decay") else lambda x: f"{x:.2g}"
    name = lambda group: ("C = " if across == "width" else across + " ") + number(group)
    groups = list(dict.fromkeys(a for _, a in found))
    lines, moved, lost, best = [["best " + swept + " (loss)", *map(name, groups),
                                 "octaves moved", "loss lost"]], [], [], []
    for s in dict.fromkeys(s for s, _ in found):
        mine = {g: found[s, g] for g in groups if (s, g) in found}
        first, last = list(mine.values())[0], list(mine.values())[-1]
        drift = math.log2(last["x"] / first["x"])
        there = means(curves(rows)[s, list(mine)[-1]])
        penalty = max(0.0, there.get(first["grid"], math.nan) - last["loss"])
        cells = [written(m["x"]) + m["mark"]
                 + (f" [{written(m['low'])}, {written(m['high'])}]" if m["high"] > m["low"] else "")
                 + f" ({text(m['loss'])})" for m in mine.values()]
        lines.append([s, *cells, f"{drift:+.1f}", text(penalty)])
        moved.append(f"{s} {drift:+.1f}{last['mark'] or first['mark']}")
        lost.append(f"{s} {text(penalty)}")
        best.append(f"{s} {written(last['x'])} ({text(last['loss'])})")
    notes = ["", "A parabola in log2 through the best value and its neighbours; [lowest, highest] of seeds.",
             "~ beside a cliff, where a parabola is biased away from it; (end): the grid ends there."]
    if len(groups) == 1:
        return table([row[:-2] for row in lines]) + notes, f"best {swept} (loss): {', '.join(best)}"
    first, last = name(groups[0]), name(groups[-1])
    return table(lines) + notes, (
        f"octaves that the best {swept} moves from {first} to {last}: {', '.join(moved)}; loss lost at "
        f"{last} with the best of {first}: {', '.join(lost)}; at its own best there: {', '.join(best)}")


def default_tau(layers):
    return min(0.4, 0.4 * (4 / layers) ** 0.43)


def taus(e, rows):
    lines, _ = optima(e, rows)
    found = {a: (optimum(c), c) for (_, a), c in curves(rows).items()}
    parts = [f"{number(a)} layers {o['x']:.2f}{o['mark']} (default {default_tau(a):.2f}; the grid spans "
             f"{text(max(means(c).values()) - o['loss'])} of loss)" for a, (o, c) in found.items()]
    return lines, "best tau by depth: " + ", ".join(parts)


# ---- Variants: the same model in a few ways

def variants(e, rows):
    found = {}
    for r in rows:
        found.setdefault((r["series"], r["across"]), []).append(r["loss"])
    names = list(dict.fromkeys(a for _, a in found))
    series = list(dict.fromkeys(s for s, _ in found))
    cell = lambda v: text(mean(v)) + (f" [{text(min(v))}, {text(max(v))}]" if len(v) > 1 else "")
    lines = [["loss, mean [range of seeds]", *names]]
    lines += [[s, *(cell(found[s, n]) for n in names)] for s in series]
    over = lambda s, n: mean(found[s, n]) - mean(found[s, names[0]])
    return table(lines), "; ".join(
        f"{n} over {names[0]}: " + ", ".join(f"{s} {over(s, n):+.3f}" for s in series) for n in names[1:])


# ---- Statistics

def hidden(tensor):
    return tensor.rpartition(".")[2] in ("qkv", "out", "up", "down")


def ranges(e, rows):
    rows = [r for r in rows if hidden(r["tensor"])]
    lines, parts = [["scheme", "operand", "RMS at first", "at the end", "over all steps",
                     "most flushed at first, %", "at the end", "over all steps"]], []
    for s in dict.fromkeys(r["series"] for r in rows):
        steps = [r["step"] for r in rows if r["series"] == s]
        for operand in ("input", "weight", "grad"):
            mine = [r for r in rows if r["series"] == s and r["operand"] == operand]
            kinds = [[r for r in mine if r["step"] == t] for t in (min(steps), max(steps))] + [mine]
            span = [f"{min(r['rms'] for r in k):.2g} to {max(r['rms'] for r in k):.2g}" for k in kinds]
            lost = [f"{100 * max(r['flushed'] for r in k):.2g}" for k in kinds]
            lines.append([s, operand, *span, *lost])
        mine = [r for r in rows if r["series"] == s]
        parts.append(f"{s} {min(r['rms'] for r in mine):.2g} to {max(r['rms'] for r in mine):.2g}, at most "
                     f"{100 * max(r['flushed'] for r in mine):.2g} % flushed")
    return table(lines), "RMS of all operands of hidden linears over all steps: " + "; ".join(parts)


def underflow(e, rows):
    lines, parts = [["activation", "loss, mean [range of seeds]", "down's input flushed, % at first", "most",
                     "at the end"]], []
    for s in dict.fromkeys(r["series"] for r in rows):
        mine = [r for r in rows if r["series"] == s]
        losses = list({r["seed"]: r["loss"] for r in mine}.values())
        steps = sorted({r["step"] for r in mine})
        lost = [100 * mean(r["flushed"] for r in mine if r["step"] == t) for t in steps]
        lines.append([s, f"{text(mean(losses))} [{text(min(losses))}, {text(max(losses))}]",
                      *(f"{x:.2f}" for x in (lost[0], max(lost), lost[-1]))])
        parts.append(f"{s} {text(mean(losses))} and {lost[-1]:.2f} % at the end, {max(lost):.2f} % at most")
    return table(lines), "loss and flushed share of down's input: " + "; ".join(parts)


# ---- Attention

def predicted(k):
    """Variance of attention over k independent values of variance 1 with unit-normal scores: µS eq. 6."""
    return math.e / k - (math.e - 1) / k ** 2


def positions(e, rows):
    kinds = list(dict.fromkeys(r["when"] for r in rows))
    ends = [2 ** n for n in range(20) if 2 ** n < max(r["k"] for r in rows)]
    spans = list(zip(ends, [k - 1 for k in ends[1:]] + [max(r["k"] for r in rows)]))
    at = lambda rows, column, span: mean(r[column] for r in rows if span[0] <= r["k"] <= span[1])
    lines = [["variance over that of the values",
              *(f"k {a:g}-{b:g}" if a < b else f"k {a:g}" for a, b in spans)],
             ["eq. 6", *(f"{mean(predicted(k) for k in range(int(a), int(b) + 1)):.3f}" for a, b in spans)]]
    parts = []
    for when in kinds:
        mine = [r for r in rows if r["when"] == when]
        for column in ("softmax", "root"):
            lines.append([f"{when}, {'square root of softmax' if column == 'root' else column}",
                          *(f"{at(mine, column, s):.3f}" for s in spans)])
        parts.append(f"{when} {at(mine, 'softmax', spans[-1]):.3f}, with the square root "
                     f"{at(mine, 'root', spans[-1]):.2f}")
    last = f"{spans[-1][0]:g} to {spans[-1][1]:g}"
    return table(lines), f"variance at positions {last} (eq. 6: {lines[1][-1]}): " + "; ".join(parts)


# ---- Searches

def best_so_far(losses):
    return [min(losses[:n]) for n in range(1, len(losses) + 1)]


def expected_best(losses):
    """The mean over all orders of the best of the first n: what a random search of n runs finds."""
    total, ordered = len(losses), sorted(losses)
    return [sum(x * math.comb(total - i - 1, n - 1) for i, x in enumerate(ordered[:total - n + 1]))
            / math.comb(total, n) for n in range(1, total + 1)]


def searched(rows, series):
    """Losses of the independent search, in its order, and of the random one."""
    mine = [r for r in rows if r["series"] == series]
    return ([r["loss"] for r in mine if r["phase"] in ("rate", "alone", "together")],
            [r["loss"] for r in mine if r["phase"] == "random"])


def transfer_errors(rows, series):
    """
    {(a, b): error}: b, tuned where a is not at its best, used where it is. Mean over the other values of a of
    loss(best a, its b) - loss(best a, best b), as u-µP's appendix defines it. Diverged is as bad as guessing.
    """
    found = {}
    for r in rows:
        if r["series"] == series and r["phase"] == "pair":
            found.setdefault((r["a"], r["b"]), {})[r[r["a"]], r[r["b"]]] = min(r["loss"], GUESS)
    errors = {}
    for (a, b), grid in found.items():
        for names, at in (((a, b), dict(grid)), ((b, a), {(y, x): v for (x, y), v in grid.items()})):
            fixed, _ = min(at, key=at.get)
            values = {x for x, _ in at}
            tuned = [min((y for x, y in at if x == other), key=lambda y: at[other, y])
                     for other in values - {fixed}]
            errors[names] = mean(at[fixed, y] - min(at.values()) for y in tuned)
    return errors


def searches(e, rows):
    lines = [["scheme", "rate alone (runs)", "independent, all (runs)", "its last, all at once",
              "random, expected, as many", "as many as for the rate", "transfer error, mean", "worst"]]
    parts, more = [], []
    for s in dict.fromkeys(r["series"] for r in rows):
        independent, at_random = searched(rows, s)
        sweep = [r["loss"] for r in rows if r["series"] == s and r["phase"] == "rate"]
        expected, errors = expected_best(at_random), transfer_errors(rows, s)
        worst = max(errors, key=errors.get)
        alone, both = (f"{text(min(x))} ({len(x)})" for x in (sweep, independent))
        lines.append([s, alone, both, text(independent[-1]), text(expected[-1]),
                      text(expected[len(sweep) - 1]), text(mean(errors.values())),
                      f"{text(errors[worst])} ({worst[1]}, {worst[0]} fixed)"])
        parts.append(f"{s}: loss (runs) with the rate alone {alone}, independent {both}, random "
                     f"{text(expected[-1])} in as many; mean transfer error {text(mean(errors.values()))}")
        names = list(dict.fromkeys(a for a, _ in errors))
        more += ["", *table([[f"{s}: fixed, down; tuned, across", *names]] + [
            [a, *("" if a == b else text(errors[a, b]) for b in names)] for a in names])]
    return table(lines) + more, "; ".join(parts)
