#!/usr/bin/env python3
"""
The claims of two papers, measured: µnit Scaling (µS, arXiv 2502.05967) and u-µP (arXiv 2407.17465).

    python dev/paper/run.py --list               what there is, and how long each takes here
    python dev/paper/run.py transfer depth       these experiments
    python dev/paper/run.py all                  all of them (make paper)
    python dev/paper/run.py transfer --device cuda --widths 256 1024 4096 --data 'fineweb/*_train_*.bin'

An experiment is a row of the table in experiments.py. It writes NAME.csv (every run), NAME.txt (a table and
one measured sentence) and NAME.png (needs matplotlib). Runs are one thread each, as many at once as --jobs;
every finished one is kept in out/paper, under its options and data, so that a second call goes on where the
first was stopped. The cache does not know the trainer: after a change to what it computes, use --fresh.
"""

import argparse
import csv
import json
import os
import re
import signal
import sys
import tempfile

import experiments
from lab import ROOT, TRAINERS, Failed, Lab

HERE = os.path.dirname(os.path.abspath(__file__))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"run.py: {message} (--help shows the usage)")


def read_rows(path):
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="", encoding="utf-8") as f:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(f)]


def write_rows(path, rows):
    columns = list(dict.fromkeys(k for row in rows for k in row))
    with open(path + ".new", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        short = lambda v: f"{v:.6g}" if isinstance(v, float) else v
        writer.writerows({k: short(v) for k, v in row.items()} for row in rows)
    os.replace(path + ".new", path)


def perform(e, lab, out, plot_only=False):
    """One experiment: its runs, table, sentence and picture. Returns what is missing for a picture, if so."""
    path, lab.name = os.path.join(out, e.name), e.name
    if not plot_only:
        write_rows(path + ".csv", e.run(lab, e))
    elif not os.path.isfile(path + ".csv"):
        sys.exit(f"run.py: there is no {path}.csv to plot: run the experiment {e.name} first")
    rows = read_rows(path + ".csv")  # always from the file: a picture shows what is in it
    lines, sentence = e.judge(e, rows)
    text = "\n".join(lines + ["", "measured: " + sentence])
    with open(path + ".txt", "w", encoding="utf-8") as f:
        f.write(text + "\n")
    if lab.mode != "rehearse":
        print(f"\n{e.name}: {e.claim} ({e.source})\n\n{text}\n", flush=True)
    try:
        import pictures
    except ImportError as missing:
        return missing.name
    pictures.draw(e, rows, path + ".png")


def list_all(args):
    everything = Lab(args, "plan", None)
    for e in experiments.TABLE:
        lab = Lab(args, "plan", None)
        e.run(lab, e)
        e.run(everything, e)
        print(f"{e.name:12} {e.claim}\n{'':12} {e.source}; varies {e.varies}; {len(lab.asked)} runs, "
              f"{minutes(lab)} CPU minutes")
    print(f"{'all':12} {len(everything.asked)} different runs, {minutes(everything)} CPU minutes")


def minutes(lab):
    return f"{max(sum(r['cost'] for r in lab.asked.values()) / 60, 0.1):.1f}"


def rehearse(args, names):
    failed = 0
    with tempfile.TemporaryDirectory() as out:
        for e in experiments.TABLE:
            if e.name not in names:
                continue
            lab = Lab(args, "rehearse", os.path.join(out, "cache", e.name))
            try:
                missing = perform(e, lab, out)
                picture = f"no picture: {missing} is missing" if missing else "with its picture"
                print(f"ok      {e.name}: {lab.real} runs stand for {len(lab.asked)}, {picture}")
            except Exception as wrong:  # one that fails must not hide the others
                failed += 1
                print(f"FAILED  {e.name}: {type(wrong).__name__}: {wrong}")
    print(f"{len(names) - failed} experiments rehearsed, {failed} failed")
    return failed > 0


def setting(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not OPTION=VALUE")
    return name, json.loads(value) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) else value


def main():
    positive = lambda text: int(text) if int(text) > 0 else int("")
    positive.__name__ = "positive number"
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="EXPERIMENT", help="names from --list, or all")
    p.add_argument("--list", action="store_true", help="claims, sources, runs, expected time")
    p.add_argument("--seeds", type=positive, default=1, help="seeds of every run [1, or what the row says]")
    p.add_argument("--widths", type=positive, nargs="+", help="for experiments over width")
    p.add_argument("--steps", type=positive, default=experiments.STEPS,
                   help=f"of each run [{experiments.STEPS}]")
    p.add_argument("--set", type=setting, nargs="+", default=[], metavar="OPTION=VALUE",
                   help="trainer's options for every run, such as seq=512 batch=64 precision=bf16")
    p.add_argument("--data", help="text, or shards as 'GLOB' [data/tinyshakespeare.txt]")
    p.add_argument("--device", choices=TRAINERS, default="cpu", help="which trainer [cpu]")
    p.add_argument("--jobs", type=positive, help="runs at once [cores; 1 for cuda]")
    p.add_argument("--out", default=os.path.join(HERE, "results"),
                   help="for tables and pictures [dev/paper/results]")
    p.add_argument("--fresh", action="store_true", help="run again what is in the cache")
    p.add_argument("--plot-only", action="store_true", help="text and pictures again, from the .csv")
    p.add_argument("--rehearse", action="store_true", help="tiny runs that take every road, kept nowhere")
    args = p.parse_args()
    args.jobs = args.jobs or (1 if args.device == "cuda" else os.cpu_count())
    if args.list:
        return list_all(args)
    known = [e.name for e in experiments.TABLE]
    unknown = [n for n in args.names if n not in known + ["all"]]
    if unknown:
        p.error(f"there is no experiment {unknown[0]}; there are {', '.join(known)}, all")
    if not args.names and not args.rehearse:
        p.error("which experiment? --list names them")
    names = known if "all" in args.names or not args.names else args.names
    # A rehearsal's text is always there, and nothing about it matters.
    args.data = args.data or os.path.join(ROOT, "train_us.c" if args.rehearse else "data/tinyshakespeare.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.rehearse:
        return rehearse(args, names)
    lab = Lab(args, "plan" if args.plot_only else "run", os.path.join(ROOT, "out", "paper"))
    os.makedirs(args.out, exist_ok=True)
    missing = [perform(e, lab, args.out, args.plot_only) for e in experiments.TABLE if e.name in names]
    if missing[-1]:
        print(f"run.py: no pictures: {missing[-1]} is missing (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; finished runs are kept, the same command goes on")
    except Failed as e:
        sys.exit(f"run.py: {e}")
    except OSError as e:
        sys.exit(f"run.py: {e.filename or 'cannot read or write'}: {e.strerror or e}")
