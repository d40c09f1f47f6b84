"""
What dev/gpt2.sh does in Python: a run's lines as they come, which learning rate to try next, tables and pictures
(these need matplotlib, and are left out where it is missing). To draw a run's loss.png anew:
    python dev/gpt2.py result out/gpt2/124M 124M data/fineweb10B/fineweb_val_000000.bin
"""

import csv
import glob
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

# What others got: loss on FineWeb's validation shard, and HellaSwag: acc_norm by tokens, as llm.c has it and the
#   trainer too (acc_norm of lm-eval is by characters: other numbers).
# OpenAI's weights: github.com/karpathy/llm.c, dev/vislog.ipynb, loss_baseline and hella2_baseline, of 26 May 2024
#   (commit ee6fa5e), when its scripts knew no web text but FineWeb.
# llm.c's training: ends of its logs in github.com/KellerJordan/modded-nanogpt, records/track_1_short/
#   2024-10-13_llmc/main.log (19,560 steps) and track_2_medium/2025-01-18/main.log (60,000), of 524,288 tokens each;
#   HellaSwag of an earlier run, track_1_short/2024-11-04_50Bruns/README.md. Not found: this number for 350M, any for
#   774M, and for 1558M any on FineWeb (it was trained on FineWeb-EDU).
PUBLISHED = {"124M": [("OpenAI's GPT-2", 3.424958, 0.294463), ("llm.c, 10.3 B tokens", 3.2722, 0.299)],
             "350M": [("OpenAI's GPT-2", 3.083089, 0.375224), ("llm.c, 31.5 B tokens", 2.9282, None)],
             "774M": [("OpenAI's GPT-2", 3.000580, 0.431986)], "1558M": [("OpenAI's GPT-2", 2.831273, 0.488946)]}


def watch(log, tokens, timed, gpus, price, stop, shell, launcher):
    """Passes a trainer's lines on, all to the log and some to the screen. At step `timed` of this process it says when
    the end will be; after `stop` of them it leaves: the trainer, which writes to nobody then, saves and ends.
    (mpirun would not survive that, nor let its ranks save after a Ctrl-C: it is a child of `shell`, and hands USR1 on.)
    """

    def let_save(*_):
        subprocess.run(["pkill", "-USR1", "-P", shell, os.path.basename(launcher)])

    # After a Ctrl-C the trainer's last lines are still to come.
    signal.signal(signal.SIGINT, let_save if launcher else signal.SIG_IGN)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")  # no sample of text may end the run
    timed, gpus, price, ms = int(timed), int(gpus), float(price), []
    with open(log, "a", encoding="utf-8") as f:
        for line in sys.stdin:
            print(line, end="", file=f, flush=True)
            step = re.match(r"\s*step (\d+)/(\d+) \|.* ([\d.]+) ms \|", line)
            shown = not step or len(ms) < timed or "| val" in line
            if shown or sys.stdout.isatty():
                print(line if shown else line.rstrip() + "\033[K\r", end="", flush=True)
            ms += [float(step[3])] if step else []
            if step and len(ms) == timed:
                left, each = int(step[2]) - int(step[1]), max(sum(ms[timed // 2:]) / (timed - timed // 2), 1e-3)
                hours = left * each / 3.6e6  # without the first half, whose steps may be slow
                end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + 3600 * hours))
                cost = f"{hours * gpus:.3g} GPU hours" + f", ${hours * gpus * price:.2f}" * (price > 0)
                print(f"{1e3 * int(tokens) / each:,.0f} tokens/s: the {left} steps left take {hours:.3g} hours, until "
                      f"{end}: {cost}; validation comes on top", flush=True)
            if step and len(ms) == int(stop) and gpus == 1:
                return
            if step and len(ms) == int(stop):
                let_save()


def sweep(folder):
    """The losses by rate, infinity where a run diverged, and the best rate."""
    losses = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "lr_*", "loss")):
        try:
            loss = min(math.inf, float(open(path, encoding="utf-8").read().split()[-1]))  # NaN: it diverged
        except (ValueError, IndexError):
            sys.exit(f"gpt2.py: no loss is in {path}: remove it, and that run is validated again")
        losses[float(os.path.basename(os.path.dirname(path))[3:])] = loss
    return dict(sorted(losses.items())), min(losses, key=lambda rate: (losses[rate], rate), default=None)


def next_rate(folder, first):
    """Downhill by octaves, until the best of all has been tried from both sides; then it prints nothing."""
    losses, best = sweep(folder)
    wanted = [2 * best, best / 2] if losses else [float(first)]
    print(*[f"{rate:.12g}" for rate in wanted if rate not in losses and 2 ** -16 <= rate <= 16][:1])


def rates(folder, title):
    losses, best = sweep(folder)
    print(f"| rate | {title} |\n|---|---|")
    for rate, loss in losses.items():
        print(f"| {rate:g} | {loss:.4f} |" if rate != best else f"| **{rate:g}** | **{loss:.4f}** |")
    if not {2 * best, best / 2} <= losses.keys() or not math.isfinite(losses[best]):
        sys.exit(f"gpt2.py: the best of these is the last of them on one side; see the runs in {folder}")
    with open(os.path.join(folder, "rate"), "w", encoding="utf-8") as f:
        f.write(f"{best:.12g}\n")
    draw(os.path.join(folder, "rates.png"), [("learning rate", title, [("", "o-", 0, losses.items())], [])])


def draw(path, panels):
    """Panels: names of both axes, curves of (label, style, colour, points), lines across of (label, y)."""
    try:
        import plot  # its colours and fonts; it ends the program where matplotlib is missing
    except SystemExit:
        return print(f"no {path}: pictures take matplotlib (pip install matplotlib)")
    fig, axes = plot.plt.subplots(1, len(panels), figsize=(5.7 * len(panels), 4.4), squeeze=False, layout="constrained")
    for ax, (across, up, curves, lines) in zip(axes[0], panels):
        for label, style, color, points in curves:
            ax.plot(*zip(*points), style, color=plot.COLORS[color], ms=9 if style == "*" else 3, label=label, zorder=3)
        for color, (label, y) in enumerate(lines, 2):
            ax.axhline(y, ls="--", lw=1, color=plot.COLORS[color], label=f"{label}: {y:.4g}")
        ax.set(xlabel=across, ylabel=up)
        if across == "step":  # the fall from the first loss would take all of the picture
            end = max(x for curve in curves for x, _ in curve[3])
            late = [y for curve in curves for x, y in curve[3] if x >= end / 10] + [y for _, y in lines]
            ax.set(xlim=(0, 1.02 * end), ylim=(min(late) - 0.02 * max(late), max(late) * 1.02))
            ax.legend(fontsize=8)
        else:
            ax.set_xscale("log", base=2)
    plot.save(fig, path)


def result(folder, size, val):
    """The end of a run beside what was published; the loss on other text compares with none of it."""
    log, said, flags = [open(os.path.join(folder, name), encoding="utf-8")
                        for name in ("log.csv", "evaluate.txt", "flags.txt")]
    table = [row for row in csv.DictReader(log) if row["ms"]]  # a power cut may cost the end of it
    found = re.match(r"validation loss ([\d.]+), .*\n(?:hellaswag: .* ([\d.]+)\n)?", said.read())
    if not found:
        sys.exit(f"gpt2.py: there is no validation loss in {said.name}")
    ours = [float(number) if number else None for number in found.groups()]
    end = int(re.search(r"--steps (\d+)", flags.read())[1])
    others = [(who, loss if "fineweb_val_" in val else None, right) for who, loss, right in PUBLISHED.get(size, [])]
    print("| | validation loss | HellaSwag |\n|---|---|---|")
    for who, *numbers in [(f"us.c, {size}", *ours), *others]:
        print(f"| {who} | " + " | ".join(f"{x:.4f}" if x else "–" for x in numbers) + " |")
    print(f"the steps took {sum(float(row['ms']) for row in table) / 3.6e6:.3g} hours")
    n, panels = len(table) // 200 + 1, []
    means = [(int(part[-1]["step"]), sum(float(row["train_loss"]) for row in part) / len(part))
             for part in (table[i:i + n] for i in range(0, len(table), n))]
    for i, (column, name) in enumerate([("val_loss", "loss, nats per token"), ("hellaswag", "HellaSwag, acc_norm")]):
        seen = [(int(row["step"]), float(row[column])) for row in table if row.get(column)]
        if seen and ours[i]:
            curves = [("us.c", "o-", 1, seen), (f"us.c at the end: {ours[i]:.4f}", "*", 1, [(end, ours[i])])]
            curves += [("us.c, training", "-", 0, means)] if i == 0 else []
            panels += [("step", name, curves, [(who, numbers[i]) for who, *numbers in others if numbers[i]])]
    if panels:
        draw(os.path.join(folder, "loss.png"), panels)


def tiny(folder, text, seq):
    """A rehearsal's data in the formats of the real, a token a byte; the right answer is how the text goes on."""
    with open(text, "rb") as f:
        data, seq, draws = list(f.read(60000)), int(seq), random.Random(1)
    val, n, questions = 16 * seq + 1, seq // 4, []
    for i in range(8):
        at, label = draws.randrange(val - seq), i % 4
        ends = [at + n if k == label else draws.randrange(len(data) - seq) for k in range(4)]
        tokens = [i, label, 4, n, *data[at:at + n]] + [t for e in ends for t in (n, *data[e:e + n])]
        questions += [65535, 2 * len(tokens) + 4, *tokens]
    for name, magic, count, tokens in [("questions", 20240522, 8, questions), ("tiny_val_0", 20240520, val, data[:val]),
                                       ("tiny_train_1", 20240520, len(data) - val, data[val:])]:
        with open(os.path.join(folder, name + ".bin"), "wb") as f:
            f.write(struct.pack(f"<256i{len(tokens)}H", magic, 1, count, questions[1], *[0] * 252, *tokens))


if __name__ == "__main__":
    commands = {"watch": watch, "next": next_rate, "rates": rates, "result": result, "tiny": tiny}
    try:
        commands.get("".join(sys.argv[1:2]), lambda *_: sys.exit(__doc__))(*sys.argv[2:])
    except OSError as e:
        sys.exit(f"gpt2.py: {e.filename or 'cannot read or write'}: {e.strerror or e}")
