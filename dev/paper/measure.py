"""
What an experiment reads from a run: its loss, its statistics, its activations. Standard library only.

Each function gets call(flags), which starts the trainer and returns its validation loss (inf where it
diverged, None where it only wrote a dump), the flags of the run, and an empty folder for the trainer's files.
It returns what is kept of the run, as JSON.
"""

import array
import csv
import json
import math
import operator
import os
import random


def loss(call, flags, folder):
    return {"loss": call(flags)}


def stats(call, flags, folder):
    """Also the rows of stats.csv: step, tensor, operand, format, rms, max, flushed, saturated."""
    final = call({**flags, "out": folder})
    if not os.path.isfile(os.path.join(folder, "stats.csv")):  # it diverged before the first report
        return {"loss": final, "stats": []}
    with open(os.path.join(folder, "stats.csv"), newline="", encoding="utf-8") as f:
        rows = [[int(r[0]), *r[1:4], *map(float, r[4:])] for r in list(csv.reader(f))[1:]]
    return {"loss": final, "stats": rows}


def attention(call, flags, folder):
    """Mean square of attention's output by position, over that of the values, before and after training."""
    dump, run = os.path.join(folder, "dump"), os.path.join(folder, "run")
    heads, last, found = flags["heads"], flags["layers"] - 1, []

    def read(when):
        for block in sorted({0, last}):
            batch = heads_of(*read_tensor(dump, f"act.h.{block}.qkv"), heads)
            found.append([f"{when}, block {block}", *output_variance(batch)])

    call({**flags, "dump": dump})
    read("at init")
    size, T = flags["width"] // heads, flags["seq"]
    normal = random.Random(flags["seed"]).gauss
    found.append(["independent normal values", *output_variance(
        [[[[normal(0, 1) for _ in range(size)] for _ in range(T)] for _ in "qkv"]
         for _ in range(flags["batch"] * heads)])])
    final = call({**flags, "out": run})
    if math.isinf(final):
        return {"loss": final, "attention": found}
    call({**flags, "out": run, "resume": True, "steps": flags["steps"] + 1, "dump": dump})
    read("trained")
    return {"loss": final, "attention": found}


def read_tensor(path, name):
    """Shape and values of one tensor of a safetensors file: 8 bytes of length, JSON, raw numbers."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        entry = json.loads(f.read(size))[name]
        begin, end = entry["data_offsets"]
        f.seek(8 + size + begin)
        values = array.array("f")
        values.frombytes(f.read(end - begin))
    return entry["shape"], values


def heads_of(shape, values, heads):
    """(B, T, 3C) as B x heads triples q, k, v, each T rows of C / heads values."""
    B, T, C3 = shape
    D = C3 // 3 // heads

    def row(b, t, part, h):
        at = (b * T + t) * C3 + part * C3 // 3 + h * D
        return list(values[at:at + D])

    return [[[row(b, t, part, h) for t in range(T)] for part in range(3)]
            for b in range(B) for h in range(heads)]


def output_variance(batch):
    """By position: with softmax, and with the square roots of its probabilities, whose squares sum to 1."""
    T, D = len(batch[0][0]), len(batch[0][0][0])
    plain, root, scale = [0.0] * T, [0.0] * T, D ** -0.5
    dot = lambda x, y: sum(map(operator.mul, x, y))  # ends with the shorter one
    for q, k, v in batch:
        columns = list(zip(*v))
        for t in range(T):
            scores = [scale * dot(q[t], k[i]) for i in range(t + 1)]
            top = max(scores)
            p = [math.exp(s - top) for s in scores]
            total = sum(p)
            p = [x / total for x in p]
            roots = [math.sqrt(x) for x in p]
            plain[t] += sum(dot(p, c) ** 2 for c in columns)
            root[t] += sum(dot(roots, c) ** 2 for c in columns)
    size = sum(dot(x, x) for _, _, v in batch for x in v) / T
    return [x / size for x in plain], [x / size for x in root]


MEASURES = {"loss": loss, "stats": stats, "attention": attention}
