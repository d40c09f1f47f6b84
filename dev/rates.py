"""
Where the default learning rates come from: tiny models at four widths, a run for each rate.

    python dev/rates.py data/tinyshakespeare.txt
    python dev/rates.py 'data/tinyshakespeare/*_train_*.bin' --steps 100

For each scheme and optimizer a table: validation loss at the end, rates down, widths across, the best of each width
in bold. Runs are one thread each, as many at once as there are cores, and kept as dev/paper/run.py keeps its own;
--steps (300), --seed, --schemes, --optimizers and --widths for others.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "paper"))
from lab import ROOT, Failed, Lab

WIDTHS = [32, 64, 128, 256]
# Rates in octaves from the lowest; it depends on what an optimizer's step is relative to a weight of this scheme.
LOWEST = {("us", "adamw"): 0.01, ("sp", "adamw"): 0.0005, ("mup", "adamw"): 0.000125, ("umup", "adamw"): 0.03125,
          ("us", "lion"): 0.00125, ("sp", "lion"): 0.00003125, ("mup", "lion"): 0.00003125, ("umup", "lion"): 0.03125}
OCTAVES = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="INPUT")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", default=sorted({kind[0] for kind in LOWEST}))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lion"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.set_defaults(device="cpu", jobs=os.cpu_count(), seeds=1, set=[], fresh=False)
    args = parser.parse_args()
    lab = Lab(args, "run", os.path.join(ROOT, "out", "paper"))
    lab.name = "rates"
    jobs = [(kind, width, LOWEST[kind] * 2 ** octave)
            for kind in LOWEST if kind[0] in args.schemes and kind[1] in args.optimizers
            for width in args.widths for octave in range(OCTAVES)]
    results = lab.run([{"scheme": scheme, "optimizer": optimizer, "width": width, "lr": rate, "seed": args.seed,
                        "seq": 64, "decay": "auto", "base-width": 256, "precision": "fp8"}
                       for (scheme, optimizer), width, rate in jobs])
    loss = {job: result["loss"] for job, result in zip(jobs, results)}
    for kind in {job[0]: None for job in jobs}:
        print(f"\n{kind[0]}, {kind[1]}, {args.steps} steps\n\n| rate | " + " | ".join(f"C = {w}" for w in args.widths) +
              " |\n|---|" + "---|" * len(args.widths))
        best = {w: min(loss[kind, w, LOWEST[kind] * 2 ** o] for o in range(OCTAVES)) for w in args.widths}
        for octave in range(OCTAVES):
            rate = LOWEST[kind] * 2 ** octave
            losses = [loss[kind, w, rate] for w in args.widths]
            print(f"| {rate:.3g} | " + " | ".join(f"**{x:.3f}**" if x == best[w] else f"{x:.3f}"
                                                   for x, w in zip(losses, args.widths)) + " |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("rates.py: interrupted; finished runs are kept, the same command goes on")
    except Failed as e:
        sys.exit(f"rates.py: {e}")
