"""
Runs the trainer for experiments: as many runs at once as --jobs, one thread each, every finished one kept as
a small JSON file under the digest of its options and data.
"""

import concurrent.futures
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import experiments
import measure

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRAINERS = {"cpu": "train_us", "emu": "train_us_emu", "cuda": "train_us_cuda"}
INF = float("inf")
NAME = os.path.basename(sys.argv[0])  # of the command that uses this
# A rehearsal takes every road at sizes that cost nothing. Runs that differ in a number alone are run once.
TINY = {"width": 32, "layers": 2, "heads": 1, "seq": 16, "batch": 2, "steps": 3, "warmup": 1,
        "eval-tokens": 64}


class Failed(Exception):
    pass


def written(value):
    return str(int(value) if isinstance(value, float) and value == int(value) else value)


def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def digest_of_data(pattern):
    """Of the size and both ends of every file: shards are large, and differ there."""
    found = hashlib.sha256()
    for path in sorted(glob.glob(pattern)):
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            for at in (0, max(0, size - 2 ** 20)):
                f.seek(at)
                found.update(f.read(2 ** 20) + str(size).encode())
    return found.hexdigest()[:20]


def read_result(path):
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)["result"]
    except (FileNotFoundError, ValueError, KeyError):  # not there, or damaged
        return None
    return {**result, "loss": INF if result["loss"] is None else result["loss"]}


class Lab:
    """Runs what experiments ask for. mode: "plan" runs nothing and counts, "rehearse" runs tiny models."""

    def __init__(self, args, mode, cache):
        self.mode, self.cache, self.args = mode, cache, args
        self.asked, self.real = {}, 0  # results by digest of their options; runs made, not read
        self.name, self.kinds = "", {}  # of the experiment; of runs, in a rehearsal
        self.seeds, self.steps, self.widths = args.seeds, args.steps, args.widths
        self.settings = dict(args.set)
        self.children, self.lock, self.stopping = set(), threading.Lock(), False
        if mode != "plan":
            self.trainer = os.path.join(ROOT, TRAINERS[args.device])
            if not os.access(self.trainer, os.X_OK):
                sys.exit(f"{NAME}: there is no {self.trainer}: make {TRAINERS[args.device]}")
            if not glob.glob(args.data):
                known = args.data.endswith("tinyshakespeare.txt")
                sys.exit(f"{NAME}: there is no {args.data}" + ": sh data/tinyshakespeare.sh" * known)
            self.data = os.path.abspath(args.data)
            self.data_digest = digest_of_data(args.data)
            os.makedirs(cache, exist_ok=True)

    def complete(self, flags):
        """All options of a run, from those that an experiment names."""
        full = {**experiments.BASE, "steps": self.steps, **flags, **self.settings}
        full = {k: v(full) if callable(v) else v for k, v in full.items()}
        if self.mode == "rehearse":
            full.update(TINY, **({"stats-every": 1} if "stats-every" in full else {}))
        full.setdefault("heads", max(1, full["width"] // 32))
        full.setdefault("warmup", max(1, full["steps"] // 10))
        return {k: v for k, v in full.items() if not (k in experiments.NEUTRAL and v == 1)}

    def run(self, wanted, measured="loss"):
        """The results of these runs, in their order: dictionaries with a loss and what is measured."""
        full = [self.complete(flags) for flags in wanted]
        keys = [digest(flags, measured) for flags in full]
        fresh = {key: flags for key, flags in zip(keys, full) if key not in self.asked}
        if self.mode == "plan":
            for key, flags in fresh.items():
                self.asked[key] = {"loss": 1.0, "stats": [], "attention": [], "cost": cost(flags)}
        else:
            copies = {}
            if self.mode == "rehearse":  # one real run for all that differ in a swept number alone
                for key, flags in fresh.items():
                    kind = {k: None if k in experiments.SWEPT else v for k, v in flags.items()}
                    copies[key] = self.kinds.setdefault(digest(kind, measured), key)
                fresh = {key: flags for key, flags in fresh.items() if copies[key] == key}
            self.run_all(fresh, measured)
            self.asked.update({key: self.asked[source] for key, source in copies.items()})
        return [self.asked[key] for key in keys]

    def run_all(self, fresh, measured):
        todo = {}
        for key, flags in fresh.items():
            name = digest(flags, measured, self.data_digest, self.args.device)
            path = os.path.join(self.cache, name + ".json")
            kept = None if self.args.fresh else read_result(path)
            if kept:
                self.asked[key] = kept
            else:
                todo[key] = path
        total, done, start, shown = sum(cost(fresh[k]) for k in todo), 0, time.time(), 0
        pool = concurrent.futures.ThreadPoolExecutor(self.args.jobs)
        try:  # the longest first, so that no core waits for a last long one
            futures = {pool.submit(self.one, fresh[k], measured, todo[k]): k
                       for k in sorted(todo, key=lambda k: -cost(fresh[k]))}
            for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
                key = futures[future]
                self.asked[key] = future.result()
                self.real, done = self.real + 1, done + cost(fresh[key])
                left = max(0, (total - done) * (time.time() - start) / done)
                if self.mode == "run" and (sys.stderr.isatty() or time.time() > shown + 20 or n == len(todo)):
                    shown = time.time()
                    end = "\r" if sys.stderr.isatty() and n < len(todo) else "\n"
                    clock = f"{int(left) // 60}:{int(left) % 60:02}"
                    print(f"{self.name}: {n} of {len(todo)} runs, {clock} left ", end=end, file=sys.stderr,
                          flush=True)
        except BaseException:
            with self.lock:
                self.stopping = True
                for child in self.children:
                    child.kill()
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()

    def one(self, flags, measured, path):
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = measure.MEASURES[measured](self.call, flags, folder)
        kept = {**result, "loss": None if result["loss"] == INF else result["loss"]}  # JSON has no infinity
        part = f"{path}.{os.getpid()}"
        with open(part, "w", encoding="utf-8") as f:
            json.dump({"flags": flags, "measured": measured, "data": self.args.data, "result": kept,
                       "device": self.args.device, "seconds": round(time.time() - start, 1)}, f)
        os.replace(part, path)
        return result

    def call(self, flags):
        """Runs the trainer once: its validation loss, inf if it diverged, None if it only wrote a dump."""
        command = [self.trainer, "--input", self.data, "--eval-every", "0", "--tokens", "1"]
        for name, value in flags.items():
            command += ["--" + name] if value is True else ["--" + name, written(value)]
        with self.lock:
            if self.stopping:
                raise Failed("interrupted")
            # A session of its own: a trainer that got the terminal's Ctrl-C would stop early and still report
            # a loss.
            child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, encoding="utf-8",
                                     errors="replace", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     start_new_session=True)
            self.children.add(child)
        out, err = child.communicate()
        with self.lock:
            self.children.discard(child)
        if child.returncode and "is not finite" in err:
            return INF
        found = re.search(r"^validation loss (\S+?),", out, re.M)
        ended = found and f"\nstep {flags['steps']}/{flags['steps']} " in out  # not stopped from elsewhere
        if child.returncode or not (ended or os.path.isfile(flags.get("dump", ""))):
            line = (err.strip() or out.strip() or "it said nothing").splitlines()[-1]
            raise Failed(f"{line}\n  of: {' '.join(command)}")
        final = float(found.group(1)) if found else None
        return INF if final != final else final


def cost(flags):
    """Seconds of one thread, about: fitted to two blocks of 32 to 256 channels, Zen 3 with AVX2."""
    C, tokens = flags["width"], flags["steps"] * flags["batch"] * flags["seq"]
    attention = 0.0002 * flags["seq"] * C / 32
    return 1e-6 * tokens * flags["layers"] / 2 * (0.6 + 0.035 * C + 0.0009 * C * C + attention)
