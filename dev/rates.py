"""
Where the default learning rates come from: tiny models at four widths, a run for each rate.

    python dev/rates.py data/tinyshakespeare.txt
    python dev/rates.py 'data/tinyshakespeare/*_train_*.bin' --steps 100

For each scheme and optimizer a table: validation loss at the end, rates down, widths across, the best of each width
in bold. Runs are one thread each, as many at once as there are cores; --steps (300), --seed, --schemes,
--optimizers and --widths for others.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time

TRAINER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_us")
WIDTHS = [32, 64, 128, 256]
# Rates in octaves from the lowest; it depends on what an optimizer's step is relative to a weight of this scheme.
LOWEST = {("us", "adamw"): 0.01, ("sp", "adamw"): 0.0005, ("mup", "adamw"): 0.000125, ("umup", "adamw"): 0.03125,
          ("us", "lion"): 0.00125, ("sp", "lion"): 0.00003125, ("mup", "lion"): 0.00003125, ("umup", "lion"): 0.03125}
OCTAVES = 8


def run(args, scheme, optimizer, width, rate):
    flags = ["--input", args.input, "--scheme", scheme, "--optimizer", optimizer, "--width", width, "--lr", rate,
             "--heads", width // 32, "--layers", 2, "--seq", 64, "--batch", 8, "--steps", args.steps,
             "--warmup", args.steps // 10, "--seed", args.seed, "--eval-every", 0, "--eval-tokens", 16384,
             "--tokens", 1, "--base-width", 256]
    result = subprocess.run([TRAINER] + [str(f) for f in flags], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    found = re.search(r"validation loss ([0-9.]+)", result.stdout)
    if result.returncode and "is not finite" not in result.stderr:
        sys.exit(f"rates.py: {result.stderr.strip()}")
    return float(found.group(1)) if found else float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", default=sorted({kind[0] for kind in LOWEST}))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lion"])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    args = parser.parse_args()
    if not os.access(TRAINER, os.X_OK):
        sys.exit("rates.py: there is no ./train_us: make it first")
    jobs = {(kind, width, LOWEST[kind] * 2 ** octave): None
            for kind in LOWEST if kind[0] in args.schemes and kind[1] in args.optimizers
            for width in args.widths for octave in range(OCTAVES)}
    start = time.time()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {pool.submit(run, args, *kind, width, rate): (kind, width, rate) for kind, width, rate in jobs}
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            jobs[futures[future]] = future.result()
            print(f"\r{n} of {len(jobs)} runs, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for kind in {job[0]: None for job in jobs}:
        print(f"\n{kind[0]}, {kind[1]}, {args.steps} steps\n\n| rate | " + " | ".join(f"C = {w}" for w in args.widths) +
              " |\n|---|" + "---|" * len(args.widths))
        best = {w: min(jobs[kind, w, LOWEST[kind] * 2 ** o] for o in range(OCTAVES)) for w in args.widths}
        for octave in range(OCTAVES):
            rate = LOWEST[kind] * 2 ** octave
            losses = [jobs[kind, w, rate] for w in args.widths]
            print(f"| {rate:.3g} | " + " | ".join(f"**{x:.3f}**" if x == best[w] else f"{x:.3f}"
                                                   for x, w in zip(losses, args.widths)) + " |")


if __name__ == "__main__":
    main()
