"""
Tests the scripts of this folder, as a user would run them: tokenize.py, tinyshakespeare.sh, fineweb.py and
hellaswag.py.
Of dev/reference.py it tests the one line about a package or a file that is missing or damaged, and how it prints.

    python data/test_data.py
    python data/test_data.py --vocab vocab.bpe --encoder encoder.json     # with GPT-2's real vocabulary too

Needs no network: web servers on 127.0.0.1 stand in for Hugging Face and GitHub, a script for curl, and a
vocabulary of 264 tokens for GPT-2's. What needs tiktoken or torch is skipped and counted where they are not
installed. Takes about a minute.
"""

import os
import sys

# The folder of this script has a file tokenize.py, which must not stand in for Python's module of that name.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [p for p in sys.path if os.path.abspath(p) != HERE]

import argparse
import array
import hashlib
import http.server
import importlib.util
import json
import math
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time

TOKENIZE, FINEWEB = os.path.join(HERE, "tokenize.py"), os.path.join(HERE, "fineweb.py")
SHAKESPEARE, HELLASWAG = os.path.join(HERE, "tinyshakespeare.sh"), os.path.join(HERE, "hellaswag.py")
REFERENCE = os.path.join(os.path.dirname(HERE), "dev", "reference.py")
TRAINER = os.path.join(os.path.dirname(HERE), "train_us")
HAVE_TIKTOKEN = importlib.util.find_spec("tiktoken") is not None
HAVE_REFERENCE = all(importlib.util.find_spec(name) for name in ("numpy", "safetensors", "torch"))
# For env: nobody listens at port 9, and an empty cache makes tiktoken try.
NO_DOWNLOAD = {"TIKTOKEN_CACHE_DIR": "", **{key: "http://127.0.0.1:9" for key in (
    "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")}}
counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(name, good, detail=""):
    counts["passed" if good else "failed"] += 1
    if not good:
        print(f"FAILED {name} {detail}")


def skip(name, why):
    counts["skipped"] += 1
    print(f"skipped: {name} ({why})")


def run(*command, env={}, **options):
    env = {**os.environ, "no_proxy": "127.0.0.1", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


def python(*command, **options):
    return run(sys.executable, *command, **options)


def works(name, done):
    check(name, done.returncode == 0 and done.stderr == "", f"{done.returncode} {done.stdout}{done.stderr}")
    return done.stdout


def fails(name, done, *words):
    """One line on stderr with these words, and exit code 1."""
    lines = done.stderr.splitlines()
    good = done.returncode == 1 and len(lines) == 1 and all(word in lines[0] for word in words)
    check(name, good, f"expected {words}, got {done.returncode} {done.stderr}")


def listing(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def write(path, data):
    with open(path, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path


def read(path):
    with open(path, "rb") as f:
        return f.read()


def without(tmp, package):
    """For env: the package cannot be imported, installed or not."""
    folder = f"{tmp}/without_{package}"
    os.makedirs(folder)
    # The first lines fail if data/tokenize.py stands in for Python's module of its name.
    write(f"{folder}/{package}.py",
          f"import tokenize\ntokenize.open\nraise ModuleNotFoundError(name='{package}')\n")
    return {"PYTHONPATH": folder}


def shard_tokens(path):
    """An independent reader of the format: every byte is accounted for."""
    data = read(path)
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1) and not any(header[3:]) and len(data) == 1024 + 2 * header[2], path
    return list(struct.unpack(f"<{header[2]}H", data[1024:]))


def make_shard(tokens):
    return struct.pack(f"<256i{len(tokens)}H", 20240520, 1, len(tokens), *[0] * 253, *tokens)


# ----------------------------------------------------------------------------------------------------------
# tokenize.py

# In these files a space is spelled \u0120 and a newline \u010a. The ids of the merges are 256, 257, ...
MERGES = ["h e", "l l", "\u0120 t", "\u0120t he", "he ll", "\u010a \u010a", "\u0120 \u010a"]
EOT = 256 + len(MERGES)


def make_vocab(folder):
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    symbols += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    write(os.path.join(folder, "vocab.bpe"), "#version: 0.2\n" + "\n".join(MERGES) + "\n")
    write(os.path.join(folder, "encoder.json"), json.dumps({s: i for i, s in enumerate(symbols)}))


def letters(text):
    return [ord(c) - 33 for c in text]


def test_tokenize_results(tmp, vocab):
    text = "hello the\nwell, <|endoftext|>\r\nd\u00e9j\u00e0 \u65e5\u672c \U0001f642  the  end \n\n"
    path = write(f"{tmp}/one.txt", text)
    out = works("plain text", python(TOKENIZE, path, "--out", f"{tmp}/one", *vocab, "--val-fraction", "0"))
    check("its files", listing(f"{tmp}/one") == ["gpt2_tokenizer.bin", "one_train_000000.bin"])
    tokens = shard_tokens(f"{tmp}/one/one_train_000000.bin")
    # hello: (he)(ll) merged, o; " the" merged; newline is byte 10, the 10th of the invisible ones (188 + 10)
    expected = [EOT, 260, *letters("o"), 259, 198, *letters("we"), 257, *letters(",")]
    check("its tokens by hand", tokens[:len(expected)] == expected, tokens[:len(expected)])
    check("end-of-text in the text is text", tokens.count(EOT) == 1)
    size = len(text.encode())
    check("its summary", f"{len(tokens)} tokens (0 val, {len(tokens)} train), {size} bytes, "
          f"{size / len(tokens):.3f} bytes per token, 2 files in {tmp}/one" in out, out)

    data = read(f"{tmp}/one/gpt2_tokenizer.bin")
    header, at, table = struct.unpack("<256I", data[:1024]), 1024, []
    while at < len(data):
        table.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    check("tokenizer header", header == (20240328, 2, EOT + 1, EOT) + (0,) * 252, header[:5])
    check("tokenizer table", sorted(table[:256]) == [bytes([b]) for b in range(256)] and table[256:] == [
          b"he", b"ll", b" t", b" the", b"hell", b"\n\n", b" \n", b"<|endoftext|>"], table[256:])
    check("round trip", b"".join(table[t] for t in tokens) == b"<|endoftext|>" + text.encode())

    shard = f"{tmp}/one/one_train_000000.bin"
    done = python(TOKENIZE, "--decode", shard, "--tokens", "4")
    check("--decode", (done.returncode, done.stdout) == (0, "<|endoftext|>hello the\n"), done)
    check("--decode counts", done.stderr == f"[4 of {len(tokens)} tokens]\n", done.stderr)
    done = python(TOKENIZE, "--decode", shard, "--tokens", "9999", env={"LC_ALL": "C"}, encoding="utf-8")
    check("--decode all", done.stdout == f"<|endoftext|>{text}\n".replace("\r\n", "\n"), done)
    os.remove(f"{tmp}/one/gpt2_tokenizer.bin")
    done = python(TOKENIZE, "--decode", shard, "--tokens", "2", *vocab)
    check("--decode without a table", done.stdout.endswith("\n<|endoftext|>hell\n"), done)

    out = works("--encode", python(TOKENIZE, "--encode", "hello the\nwe<|endoftext|>", *vocab))
    numbers = [int(number) for number in out.splitlines()[-1].split()]
    check("--encode: its numbers", numbers[:6] == expected[1:7] and EOT not in numbers, out)
    works("--tokenizer-only", python(TOKENIZE, "--out", f"{tmp}/only", "--tokenizer-only", *vocab))
    check("the same table", listing(f"{tmp}/only") == ["gpt2_tokenizer.bin"]
          and read(f"{tmp}/only/gpt2_tokenizer.bin") == data)


def test_tokenize_documents(tmp, vocab):
    first, second = ["the hell", "", "he said\nhe"], "well\n"
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(first)]
    a = write(f"{tmp}/a.jsonl", "\n\n".join(lines))
    b = write(f"{tmp}/b.txt", second)
    out = works("jsonl and text", python(TOKENIZE, a, b, "--out", f"{tmp}/docs", "--name", "mix",
                                         "--val-fraction", "0", *vocab))
    tokens = shard_tokens(f"{tmp}/docs/mix_train_000000.bin")
    expected = [EOT, *letters("t"), 256, 220, 260, EOT, 256, 220, *letters("said"), 198, 256,
                EOT, *letters("we"), 257, 198]
    check("end-of-text before each document", tokens == expected, tokens)
    check("bytes of the text and not of the json", f", {8 + 10 + 5} bytes, " in out, out)


def test_tokenize_shards(tmp, vocab):
    text = "".join(f"the {i} hello\n" for i in range(2000))
    path = write(f"{tmp}/big.txt", text)
    works("one shard each", python(TOKENIZE, path, "--out", f"{tmp}/whole", *vocab))
    whole = [f"{tmp}/whole/big_{split}.bin" for split in ("val_000000", "train_000001")]
    val, train = [shard_tokens(p) for p in whole]
    check("val is a tenth", abs(len(val) / len(val + train) - 0.1) < 0.005, (len(val), len(train)))
    check("val comes first", (val + train)[0] == EOT and EOT not in train)

    def shards(limit):
        done = python(TOKENIZE, path, "--out", f"{tmp}/cut", "--shard-tokens", str(limit), *vocab)
        names = [n for n in listing(f"{tmp}/cut") if re.fullmatch(r"big_(val|train)_\d{6}\.bin", n)]
        names.sort(key=lambda n: n[-10:])  # by number
        return works(f"shards of {limit}", done), names, [shard_tokens(f"{tmp}/cut/{n}") for n in names]

    out, names, parts = shards(1000)
    vals = -(-len(val) // 1000)
    trains = -(-len(train) // 1000)
    splits = ["val"] * vals + ["train"] * trains
    check("names", names == [f"big_{split}_{i:06d}.bin" for i, split in enumerate(splits)], names)
    check("sizes", all(len(p) == 1000 for i, p in enumerate(parts) if i not in (vals - 1, vals + trains - 1)))
    check("nothing lost between shards", sum(parts[:vals], []) == val and sum(parts[vals:], []) == train)
    keep = ["big_train_notes.bin", "big_x_train_000009.bin", "bigger_train_000009.bin"]
    for name in keep:
        write(f"{tmp}/cut/{name}", "x")
    out, names, parts = shards(5000)
    check("a shorter run replaces a longer one", sum(parts, []) == val + train and "removed" in out, names)
    check("other files stay", set(keep) <= set(listing(f"{tmp}/cut")))
    check("no temporary files", not [n for n in listing(f"{tmp}/cut") if n.endswith(".tmp")])


def test_tokenize_pieces(tmp, vocab):
    # In whatever pieces a file is read, its tokens must be those of the whole.
    symbols = ["\n", "\n", "\r\n", " ", "  ", "\t", "\u00a0", "\u0085", "\u2028", "\x1c", "he", "ll", " the",
               "\u00e9", "'s", "'ll", "'", "1", "\u00b2", "!", "\u65e5\u672c", "\U0001f642", "l", "re"]
    rng = random.Random(7)
    text = "".join(rng.choice(symbols) for _ in range(20000))
    path = write(f"{tmp}/pieces.txt", text)
    seen = set()
    for size in (1, 2, 3, 7, 64, 1 << 20):
        works(f"pieces of {size}", python(TOKENIZE, path, "--out", f"{tmp}/pieces", "--val-fraction", "0",
                                          "--piece-bytes", str(size), *vocab))
        seen.add(read(f"{tmp}/pieces/pieces_train_000000.bin"))
    check("pieces do not change the tokens", len(seen) == 1)


def test_tokenize_errors(tmp, vocab):
    good = write(f"{tmp}/good.txt", "the hello the\n" * 50)
    out = f"{tmp}/bad"

    def bad(name, arguments, *words, vocab=vocab):
        fails(name, python(TOKENIZE, *arguments, *vocab), "tokenize.py: ", *words)
        check(f"{name}: leaves nothing", listing(out) == [], listing(out))

    bad("missing file", [f"{tmp}/none.txt", "--out", out], "none.txt: No such file")
    bad("second file missing", [good, f"{tmp}/none.txt", "--out", out], "none.txt: No such file")
    bad("folder as file", [tmp, "--out", out], "Is a directory")
    bad("empty file", [write(f"{tmp}/empty.txt", ""), "--out", out], "empty.txt is empty")
    latin = write(f"{tmp}/latin.txt", b"abc\nd\xe9f\n")
    bad("not UTF-8", [latin, "--out", out], "latin.txt is not UTF-8", "byte 5")
    bad("not UTF-8, in a later piece", [latin, "--out", out, "--piece-bytes", "2"], "byte 5")
    bad("not json", [write(f"{tmp}/x.jsonl", '{"text": "a"}\n{"text": \n'), "--out", out], "x.jsonl, line 2")
    bad("no text", [write(f"{tmp}/y.jsonl", '{"txt": "a"}\n'), "--out", out], "y.jsonl, line 1", "text")
    bad("a list", [write(f"{tmp}/z.jsonl", '[1]\n'), "--out", out], "z.jsonl, line 1")
    bad("text is a number", [write(f"{tmp}/n.jsonl", '{"text": 3}\n'), "--out", out], "not a string")
    late = write(f"{tmp}/late.jsonl", '{"text": "hello the well"}\n' * 500 + "oops\n")
    bad("wrong after 500 lines", [late, "--out", out, "--shard-tokens", "100"], "line 501")
    bad("too little", [write(f"{tmp}/tiny.txt", "he"), "--out", out], "too little text")
    bad("no file", ["--out", out], "no FILE")
    bad("no out", [good], "no --out")
    bad("unknown flag", [good, "--out", out, "--vals", "1"], "--vals")
    for value in ("1", "-0.1", "nan", "x"):
        bad(f"--val-fraction {value}", [good, "--out", out, f"--val-fraction={value}"], "--val-fraction")
    for value in ("0", "2147483648", "1e6"):
        bad(f"--shard-tokens {value}", [good, "--out", out, "--shard-tokens", value], "--shard-tokens")
    bad("name with a slash", [good, "--out", out, "--name", "a/b"], "--name a/b")
    bad("out is a file", [good, "--out", good], "is a file")
    bad("out cannot be made", [good, "--out", "/dev/null/x"], "/dev/null/x: Not a directory")
    if os.geteuid():
        os.makedirs(f"{tmp}/locked", 0o555)
        bad("out cannot be written", [good, "--out", f"{tmp}/locked"], "Permission denied")
    else:
        skip("a folder without write permission", "root may write everywhere")

    noise = write(f"{tmp}/noise", random.Random(3).randbytes(5000))
    number = write(f"{tmp}/number.json", "3")
    other = write(f"{tmp}/other.bpe", "\n".join(["#version: 0.2", *MERGES[:-1], "l o"]) + "\n")
    bpe, encoder = vocab[1], vocab[3]
    for name, pair, word in [("noise as vocab", (noise, encoder), "is not a GPT-2 vocab.bpe"),
                             ("noise as encoder", (bpe, noise), "is not a GPT-2 encoder.json"),
                             ("text as vocab", (good, encoder), "is not a GPT-2 vocab.bpe"),
                             ("number as encoder", (bpe, number), "is not a GPT-2 encoder.json"),
                             ("other merges", (other, encoder), "do not belong together"),
                             ("missing vocab", (f"{tmp}/none.bpe", encoder), "none.bpe: No such file"),
                             ("missing encoder", (bpe, f"{tmp}/none.json"), "none.json: No such file")]:
        bad(name, [good, "--out", out], word, vocab=["--vocab", pair[0], "--encoder", pair[1]])
    bad("half of the pair", [good, "--out", out], "--encoder go together", vocab=["--encoder", encoder])
    done = python(TOKENIZE, good, "--out", out, env=NO_DOWNLOAD)
    fails("tiktoken cannot download", done, "could not download", "--vocab", "--encoder")


def test_tokenize_decode_errors(tmp, vocab):
    whole = make_shard([72, 65, 72])
    for name, data, word in [
            ("truncated", whole[:-1], "is damaged"), ("too long", whole + b"x", "is damaged"),
            ("short header", whole[:1023], "is not a token shard"), ("empty", b"", "is not a token shard"),
            ("other magic", b"\0" + whole[1:], "is not a token shard"),
            ("other version", whole[:4] + b"\2" + whole[5:], "has version 2"),
            ("negative count", whole[:8] + b"\xff" * 4 + whole[12:], "is damaged"),
            ("unknown token", make_shard([72, EOT + 1]), f"has the token {EOT + 1}")]:
        path = write(f"{tmp}/{name.replace(' ', '_')}.bin", data)
        done = python(TOKENIZE, "--decode", path, *vocab)
        fails(f"--decode, {name}", done, word)
    fails("--decode, missing", python(TOKENIZE, "--decode", f"{tmp}/none.bin", *vocab), "none.bin: No such")
    fails("--decode, folder", python(TOKENIZE, "--decode", tmp, *vocab), "Is a directory")
    write(f"{tmp}/gpt2_tokenizer.bin", "noise" * 500)
    path = write(f"{tmp}/good.bin", whole)
    fails("--decode, noise as table", python(TOKENIZE, "--decode", path), "is not a tokenizer file")
    write(f"{tmp}/gpt2_tokenizer.bin", struct.pack("<256I", 20240328, 2, 3, 2, *[0] * 252) + b"\1a\1b\5c")
    fails("--decode, truncated table", python(TOKENIZE, "--decode", path), "gpt2_tokenizer.bin is damaged")


def test_tokenize_interrupted(tmp, vocab):
    path = write(f"{tmp}/long.txt", "the hello well, the end\n" * 2_000_000)
    command = [sys.executable, TOKENIZE, path, "--out", f"{tmp}/stop", "--shard-tokens", "100000", *vocab]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.time() + 60
    while p.poll() is None and time.time() < limit and not any("train" in n for n in listing(f"{tmp}/stop")):
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    _, errors = p.communicate(timeout=60)
    check("interrupted: exit code", p.returncode == 1, p.returncode)
    check("interrupted: one line", errors == "tokenize.py: interrupted; no shard was written\n", errors)
    check("interrupted: leaves nothing", listing(f"{tmp}/stop") == [], listing(f"{tmp}/stop"))


def test_tokenize_without_tiktoken(tmp):
    path = write(f"{tmp}/good.txt", "the hello\n")
    done = python(TOKENIZE, path, "--out", f"{tmp}/out", env=without(tmp, "tiktoken"))
    fails("tiktoken missing", done, "pip install tiktoken")


def test_tokenize_gpt2(tmp, args):
    real = ["--vocab", args.vocab, "--encoder", args.encoder]
    path = write(f"{tmp}/hello.txt", "Hello world, it's   me")
    works("GPT-2", python(TOKENIZE, path, "--out", f"{tmp}/gpt2", "--val-fraction", "0", *real))
    tokens = shard_tokens(f"{tmp}/gpt2/hello_train_000000.bin")
    check("GPT-2's ids", tokens == [50256, 15496, 995, 11, 340, 338, 220, 220, 502], tokens)
    header = struct.unpack("<4I", read(f"{tmp}/gpt2/gpt2_tokenizer.bin")[:16])
    check("GPT-2's table", header == (20240328, 2, 50257, 50256), header)
    play = os.path.join(HERE, "tinyshakespeare.txt")
    if os.path.exists(play):
        out = works("tiny Shakespeare", python(TOKENIZE, play, "--out", f"{tmp}/play", *real))
        check("338025 tokens and an end-of-text", "338026 tokens (" in out, out)
    else:
        skip("tiny Shakespeare with GPT-2's vocabulary", "no data/tinyshakespeare.txt")


# ----------------------------------------------------------------------------------------------------------
# tinyshakespeare.sh

def test_tinyshakespeare(tmp):
    content = b"First Citizen:\nSpeak, speak.\n"
    with open(SHAKESPEARE) as f:
        script = f.read()
    url = re.search("^url=(.*)$", script, re.M)[1]
    # The script as it is, but for the sha256 of this test's content.
    script = re.sub("(?m)^sha256=[0-9a-f]{64}$", f"sha256={hashlib.sha256(content).hexdigest()}", script)
    script = write(f"{tmp}/fetch.sh", script)
    right, wrong = write(f"{tmp}/right", content), write(f"{tmp}/wrong", content[:-1])

    def tools(name, *extra, **scripts):
        """A folder to use as PATH, with a few real tools and the given scripts."""
        os.makedirs(f"{tmp}/{name}")
        for tool in ("sh", "cat", "cut", "dirname", "mv", "rm", "tr", "wc", *extra):
            os.symlink(shutil.which(tool), f"{tmp}/{name}/{tool}")
        for tool, lines in scripts.items():
            os.chmod(write(f"{tmp}/{name}/{tool}", "#!/bin/sh\n" + lines), 0o755)
        return {"PATH": f"{tmp}/{name}"}

    def fetch(name, env):
        os.makedirs(f"{tmp}/{name}")
        return run("sh", script, f"{tmp}/{name}", env=env)

    # The last two arguments of both programs are the file and the url.
    stand_in = 'while [ $# -gt 2 ]; do shift; done\ncat {} >"$1" && echo "$2" >"$1.url" && mv "$1.url" {}\n'
    asked = f"{tmp}/asked"
    curl = tools("curl", "sha256sum", curl=stand_in.format(right, asked))
    out = works("curl", fetch("a", curl))
    check("curl: the file", listing(f"{tmp}/a") == ["tinyshakespeare.txt"]
          and read(f"{tmp}/a/tinyshakespeare.txt") == content, out)
    check("curl: the url", read(asked).decode().strip() == url and url.startswith("https://"), url)
    failing = tools("failing", "sha256sum", curl="exit 6\n")
    out = works("again", run("sh", script, f"{tmp}/a", env=failing))
    check("already there", "already there and correct" in out, out)
    check("the default folder", works("default", run("sh", script, env=curl)).startswith("wrote ")
          and read(f"{tmp}/tinyshakespeare.txt") == content)
    works("wget", fetch("b", tools("wget", "sha256sum", wget=stand_in.format(right, asked))))
    check("wget: the file", read(f"{tmp}/b/tinyshakespeare.txt") == content)
    if shutil.which("shasum"):
        perl = tools("perl", "shasum", "perl", curl=stand_in.format(right, asked))
        works("shasum", fetch("c", perl))
    else:
        skip("tinyshakespeare.sh with shasum", "not installed")

    def bad(name, done, folder, *words):
        fails(f"tinyshakespeare.sh, {name}", done, "tinyshakespeare.sh: ", *words)
        check(f"tinyshakespeare.sh, {name}: leaves nothing", listing(folder) == [], listing(folder))

    bad("no network", fetch("d", failing), f"{tmp}/d", "could not download", url, "/d/tinyshakespeare.txt")
    short = tools("short", "sha256sum", curl=stand_in.format(wrong, asked))
    bad("cut short", fetch("e", short), f"{tmp}/e", "wrong sha256")
    half = tools("half", "sha256sum", curl=stand_in.format(right, asked) + "exit 18\n")
    bad("broken off", fetch("f", half), f"{tmp}/f", "could not download")
    bad("no program", fetch("g", tools("none", "sha256sum")), f"{tmp}/g", "needs curl or wget", url)
    unsure = tools("unsure", curl=stand_in.format(right, asked))
    bad("no checksum", fetch("h", unsure), f"{tmp}/h", "needs sha256sum or shasum")
    fails("no folder", run("sh", script, f"{tmp}/nowhere", env=curl), "there is no folder", "nowhere")
    fails("two folders", run("sh", script, tmp, tmp, env=curl), "got 2 arguments")
    os.makedirs(f"{tmp}/i")
    write(f"{tmp}/i/tinyshakespeare.txt", "mine")
    fails("something else is there", run("sh", script, f"{tmp}/i", env=curl), "wrong sha256", "move it away")
    check("and stays", read(f"{tmp}/i/tinyshakespeare.txt") == b"mine")
    os.makedirs(f"{tmp}/j/tinyshakespeare.txt")
    fails("a folder is there", run("sh", script, f"{tmp}/j", env=curl), "not a file")
    play = os.path.join(HERE, "tinyshakespeare.txt")
    if os.path.exists(play):
        works("the real file", run("sh", SHAKESPEARE, env=failing))
    else:
        skip("the real sha256", "no data/tinyshakespeare.txt")


# ----------------------------------------------------------------------------------------------------------
# fineweb.py

class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as Hugging Face does: a redirect with the file's size and sha256, then storage with ranges."""
    files, mode, break_after, ranges = {}, "", None, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        cls, name = type(self), self.path.rpartition("/")[2]
        if name not in cls.files or cls.mode == "404":
            return self.send_error(404)
        data = cls.files[name]
        if self.path.startswith("/datasets/"):
            digest = hashlib.sha256(data).hexdigest() if cls.mode != "wrong sha256" else "0" * 64
            self.send_response(302)
            if cls.mode != "no headers":
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Location", "/storage" + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        cls.ranges.append((name, start))
        if cls.mode == "no ranges":
            start = 0
            self.send_response(200)
        elif start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if cls.mode == "damage":
            body = body[:-2] + bytes(2)
        self.wfile.write(body if cls.break_after is None else body[:cls.break_after])


def test_fineweb(tmp):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    rng = random.Random(5)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    val, train, train2 = names
    names.append("finewebedu_val_000000.bin")
    shards = {name: make_shard([rng.randrange(50257) for _ in range(300000)]) for name in names}

    no_tiktoken = without(tmp, "tiktoken")  # so most of these get no table, and need no network

    def fetch(folder, *arguments, mode="", break_after=None, files=shards, env=no_tiktoken):
        FakeHub.files, FakeHub.mode, FakeHub.break_after, FakeHub.ranges = files, mode, break_after, []
        return python(FINEWEB, "--base-url", base, "--out", f"{tmp}/{folder}", *arguments, env=env)

    def same(folder, *names):
        return listing(f"{tmp}/{folder}") == sorted(names) and all(
            read(f"{tmp}/{folder}/{name}") == shards[name] for name in names)

    out = works("default", fetch("a"))
    check("one val and one train shard", same("a", val, train), listing(f"{tmp}/a"))
    check("says what it checked", out.count("0.6 MB, sha256 and format checked") == 2, out)
    check("says how much it will be", "2 shards of about 200 MB: 400 MB in" in out, out)
    note = out.splitlines()[-1]
    check("says why there is no table", "no " in note and "pip install tiktoken" in note, out)
    works("one more shard", fetch("a", "--shards", "2"))
    check("only the new one is fetched", FakeHub.ranges == [(train2, 0)] and same("a", val, train, train2))
    out = works("all are there", fetch("a", "--shards", "2", mode="404"))
    check("no request", FakeHub.ranges == [] and out.count("already there") == 3, out)
    works("edu", fetch("b", "--version", "edu", "--shards", "0"))
    check("edu: its val shard", same("b", "finewebedu_val_000000.bin"))

    done = fetch("c", "--shards", "0", break_after=250000)
    fails("interrupted", done, "broke off after 250000 of 601024 bytes", "same command continues")
    check("interrupted: only a .part", listing(f"{tmp}/c") == [val + ".part"])
    fails("interrupted again", fetch("c", "--shards", "0", break_after=250000), "after 500000 of 601024")
    works("resumed", fetch("c", "--shards", "0"))
    check("resumed where it broke off", FakeHub.ranges == [(val, 500000)] and same("c", val), FakeHub.ranges)
    fetch("d", "--shards", "0", break_after=1000)
    works("resumed without ranges", fetch("d", "--shards", "0", mode="no ranges"))
    check("started over", same("d", val))
    os.makedirs(f"{tmp}/e")
    write(f"{tmp}/e/{val}.part", shards[val])
    works("whole .part", fetch("e", "--shards", "0"))
    check("whole .part: taken", FakeHub.ranges == [(val, 601024)] and same("e", val))
    write(f"{tmp}/e/{train}.part", shards[train] + b"xx")
    fails("too long .part", fetch("e"), "has 601026 bytes, and the server says 601024", "deleted")
    works("and then", fetch("e"))
    check("it comes right", same("e", val, train))

    def bad(name, done, *words, folder):
        fails(f"fineweb.py, {name}", done, "fineweb.py: ", *words)
        left = listing(f"{tmp}/{folder}")
        check(f"fineweb.py, {name}: leaves nothing", left == [], left)

    bad("damaged on the way", fetch("f", mode="damage"), "does not have the sha256", folder="f")
    bad("wrong sha256", fetch("g", mode="wrong sha256"), "does not have the sha256", folder="g")
    out = works("no headers", fetch("h", mode="no headers"))
    check("no headers: says so", out.count("format checked; the server gave no sha256") == 2, out)
    check("no headers: the shards", same("h", val, train))
    for name, data, word in [("unknown token", make_shard([1, 50257, 2]), "has the token 50257"),
                             ("too short", shards[val][:-2], "would fit its header's 300000 tokens"),
                             ("too long", shards[val] + b"xx", "would fit its header's 300000 tokens"),
                             ("web page", b"<html>" * 500, "is not a token shard"),
                             ("a few bytes", b"<html>", "shorter than a shard's header"),
                             ("no tokens", make_shard([]), "would fit its header's 0 tokens")]:
        bad(name, fetch("i", files={val: data}), word, folder="i")
    bad("404", fetch("j", mode="404"), val, "answers 404", folder="j")
    bad("no network", python(FINEWEB, "--base-url", "http://127.0.0.1:9", "--out", f"{tmp}/k"),
        "could not reach http://127.0.0.1:9/datasets/kjj0/fineweb10B-gpt2/resolve/main/" + val,
        f"go to {tmp}/k", folder="k")
    os.makedirs(f"{tmp}/l")
    write(f"{tmp}/l/{val}", shards[val][:-2])
    fails("damaged before", fetch("l"), val, "delete it")
    check("damaged before: stays", read(f"{tmp}/l/{val}") == shards[val][:-2])
    for value in ("-1", "104", "x"):
        bad(f"--shards {value}", fetch("m", f"--shards={value}"), "--shards", folder="m")
    bad("--shards 100 of edu", fetch("m", "--shards", "100", "--version", "edu"), "0 to 99", folder="m")
    bad("--version", fetch("m", "--version", "v2"), "--version", folder="m")
    fails("out is a file", fetch(f"l/{val}"), "is a file")
    fails("out cannot be made", fetch(f"l/{val}/x"), "Not a directory")

    # The tokenizer's table
    vocab, table = ["--vocab", f"{tmp}/vocab.bpe", "--encoder", f"{tmp}/encoder.json"], "gpt2_tokenizer.bin"
    bad("half of the pair", fetch("m", *vocab[:2]), "--encoder go together", folder="m")
    fails("table without tiktoken", fetch("n n", "--shards", "0", *vocab), "pip install tiktoken")
    check("table without tiktoken: the shard", same("n n", val))
    write(f"{tmp}/a/{table}", "mine")
    out = works("table is there", fetch("a", "--shards", "0", *vocab))
    check("table is there: stays", read(f"{tmp}/a/{table}") == b"mine" and f"{table} is already" in out, out)
    if HAVE_TIKTOKEN:
        works("table", fetch("e", "--shards", "0", *vocab, env={}))
        works("table by hand", python(TOKENIZE, "--out", f"{tmp}/hand", "--tokenizer-only", *vocab))
        check("the same table", read(f"{tmp}/e/{table}") == read(f"{tmp}/hand/{table}"))
        check("table: nothing else", listing(f"{tmp}/e") == sorted([val, train, table]), listing(f"{tmp}/e"))
        out = works("table: no download", fetch("n n", "--shards", "0", env=NO_DOWNLOAD))
        note = out.splitlines()[-1]
        check("table: no download: says so", note.startswith("note: ") and "could not download" in note, out)
        command = shlex.split(note.partition("to write it later: ")[2])
        works("the command it names", run(*command, *vocab))
        check("the command: the table", read(f"{tmp}/n n/{table}") == read(f"{tmp}/hand/{table}"), command)
    else:
        skip("fineweb.py's table", "tiktoken is not installed")
    server.shutdown()


# ----------------------------------------------------------------------------------------------------------
# hellaswag.py

def eval_questions(path):
    """An independent reader of the format: [(label, context, endings)], and every byte is accounted for."""
    data = read(path)
    header = struct.unpack("<256i", data[:1024])
    values, at, questions, longest = struct.unpack(f"<{(len(data) - 1024) // 2}H", data[1024:]), 0, [], 0
    while at < len(values):
        start, size, index, label, endings = values[at:at + 5]
        assert (start, index) == (65535, len(questions)) and label < endings == 4, (path, at)
        lists, end = [], at + 5
        for _ in range(1 + endings):
            lists.append(list(values[end + 1:end + 1 + values[end]]))
            end += 1 + values[end]
        assert size == 2 * (end - at), (path, at, size)
        questions.append((label, lists[0], lists[1:]))
        at, longest = end, max(longest, size)
    assert header == (20240522, 1, len(questions), longest) + (0,) * 252 and at == len(values), path
    assert len(data) == 1024 + 2 * at, path
    return questions


def question(ctx="the hell", endings=("a", "b", "c", "d"), label=0, **more):
    return {"ctx": ctx, "endings": list(endings), "label": label, **more}


def test_hellaswag_results(tmp, vocab):
    asked = [question("the hell", ["he", "the", "well.", ""], 2, ind=24, split="val"),
             question("d\u00e9j\u00e0 <|endoftext|>\n\n", ["he" * 70, " x", "\U0001f642", "a b"], 3),
             question("hello ", ["\nx", "y", "z", "the"], 0)]
    lines = [json.dumps(asked[0]), "", json.dumps(asked[1], ensure_ascii=False), json.dumps(asked[2])]
    path, out = write(f"{tmp}/q.jsonl", "\n".join(lines)), f"{tmp}/out"
    said = works("questions", python(HELLASWAG, path, "--out", out, *vocab))
    check("one file", listing(out) == ["q.bin"], listing(out))
    questions = eval_questions(f"{out}/q.bin")
    # Spaces and newlines are bytes 32 and 10, the 33rd and 11th of the invisible ones (188 + ...).
    check("a question by hand", questions[0] == (2, [*letters("t"), 256, 220, 260], [
        [220, 256], [259], [220, *letters("we"), 257, *letters(".")], [220]]), questions[0])
    works("table", python(TOKENIZE, "--out", f"{tmp}/table", "--tokenizer-only", *vocab))
    table, data = [], read(f"{tmp}/table/gpt2_tokenizer.bin")[1024:]
    while data:
        table.append(data[1:1 + data[0]])
        data = data[1 + data[0]:]
    back = [(label, *[b"".join(table[t] for t in tokens).decode() for tokens in (ctx, *endings)])
            for label, ctx, endings in questions]
    check("all of them as text", back == [(q["label"], q["ctx"], *[" " + e for e in q["endings"]])
                                          for q in asked], back)
    check("end-of-text in a question is text", EOT not in questions[1][1], questions[1][1])
    longest = max(len(ctx) + max(map(len, endings)) for _, ctx, endings in questions)
    size, digest = os.path.getsize(f"{out}/q.bin"), hashlib.sha256(read(path)).hexdigest()
    check("what it says", f"wrote {out}/q.bin, 3 questions, {size} bytes; the longest, with one ending, has "
          f"{longest} tokens" in said and f"sha256 {digest}, which is not that of" in said, said)

    before = os.stat(f"{out}/q.bin").st_mtime_ns
    said = works("again", python(HELLASWAG, path, "--out", out, *vocab))
    check("left alone", os.stat(f"{out}/q.bin").st_mtime_ns == before and "already there and correct" in said)
    write(f"{out}/q.bin", read(f"{out}/q.bin")[:-2])
    works("damaged result", python(HELLASWAG, path, "--out", out, *vocab))
    check("is written again", eval_questions(f"{out}/q.bin") == questions)
    write(path, json.dumps(asked[1]) + "\r\n" + json.dumps(asked[0]) + "\r\n")
    works("other questions", python(HELLASWAG, path, "--out", out, *vocab))
    check("replace the result", eval_questions(f"{out}/q.bin") == [questions[1], questions[0]])
    check("no temporary files", listing(out) == ["q.bin"], listing(out))

    # A context of one-byte tokens, so that the question has as many bytes as the format holds, and two more.
    most = 65534 // 2 - 5 - 5 - 4 * 2
    path = write(f"{tmp}/most.jsonl", json.dumps(question("x" * most)))
    works("longest question", python(HELLASWAG, path, "--out", out, *vocab))
    check("its size", os.path.getsize(f"{out}/most.bin") == 1024 + 65534 and eval_questions(f"{out}/most.bin"))
    path = write(f"{tmp}/more.jsonl", "\n\n" + json.dumps(question("x" * (most + 1))))
    fails("too long", python(HELLASWAG, path, "--out", out, *vocab), "hellaswag.py: ", "more.jsonl, line 3",
          "65536 bytes", "holds 65535")
    check("too long: leaves nothing", listing(out) == ["most.bin", "q.bin"], listing(out))


def test_hellaswag_errors(tmp, vocab):
    out, good = f"{tmp}/bad", json.dumps(question())

    def bad(name, path, *words, vocab=vocab, out=out):
        fails(f"hellaswag.py, {name}", python(HELLASWAG, path, "--out", out, *vocab), "hellaswag.py: ", *words)
        check(f"hellaswag.py, {name}: leaves nothing", listing(out) == [], listing(out))

    def without_key(key):
        return json.dumps({k: v for k, v in question().items() if k != key})

    for name, line, word in [
            ("not JSON", good[:-1], "is not JSON"), ("not UTF-8", b"\xff\xfe\xfd", "is not JSON"),
            ("deep", "[" * 200000, "is not JSON"), ("a list", "[1]", "is not an object"),
            *[(f"no {key}", without_key(key), f'has no "{key}"') for key in question()],
            ("ctx is a number", json.dumps(question(3)), '"ctx" is not a text'),
            ("empty ctx", json.dumps(question("")), "or is empty"),
            ("3 endings", json.dumps(question(endings="abc")), "not a list of 4 texts"),
            ("5 endings", json.dumps(question(endings="abcde")), "not a list of 4 texts"),
            ("ending is null", json.dumps(question(endings=["a", "b", "c", None])), "not a list of 4 texts"),
            ("endings is a text", json.dumps({**question(), "endings": "abcd"}), "not a list of 4 texts"),
            *[(f"label {label}", json.dumps(question(label=label)), f'"label" is {json.dumps(label)},')
              for label in (-1, 4, "1", "", True, 1.0, None, float("nan"))]]:
        path = write(f"{tmp}/line.jsonl", good.encode() + b"\n\n"
                     + (line.encode() if isinstance(line, str) else line) + b"\n" + good.encode())
        bad(name, path, f"{path}, line 3: ", word)
    bad("no questions", write(f"{tmp}/empty.jsonl", "\n \n"), "empty.jsonl has no questions")
    bad("too many", write(f"{tmp}/many.jsonl", (good + "\n") * 65536), "65536 questions", "holds 65535")
    bad("missing", f"{tmp}/none.jsonl", "none.jsonl: No such file")
    bad("another ending of its name", write(f"{tmp}/x.json", good), "x.json: has to be a .jsonl file")
    os.makedirs(f"{tmp}/folder.jsonl")
    bad("a folder", f"{tmp}/folder.jsonl", "Is a directory")
    path = write(f"{tmp}/good.jsonl", good)
    bad("out is a file", path, "is a file", out=path)
    bad("out cannot be made", path, "/dev/null/x: Not a directory", out="/dev/null/x")
    bad("half of the pair", path, "--encoder go together", vocab=vocab[:2])
    bad("missing vocab", path, "none.bpe: No such file", vocab=["--vocab", f"{tmp}/none.bpe", *vocab[2:]])
    bad("noise as encoder", path, "is not a GPT-2 encoder.json", vocab=[*vocab[:3], path])
    fails("hellaswag.py, unknown flag", python(HELLASWAG, path, "--outs", out), "--outs")
    done = python(HELLASWAG, path, "--out", out, env=NO_DOWNLOAD)
    fails("hellaswag.py, no vocabulary", done, "hellaswag.py: ", "could not download", "--vocab", "--encoder")
    fails("hellaswag.py, no tiktoken", python(HELLASWAG, path, "--out", out, env=without(tmp, "tiktoken")),
          "hellaswag.py: ", "pip install tiktoken")
    check("hellaswag.py, no vocabulary: leaves nothing", listing(out) == [], listing(out))


class FakeSite(http.server.BaseHTTPRequestHandler):
    content, status, break_after, asked = b"", 200, None, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        cls = type(self)
        cls.asked.append(self.path)
        if cls.status != 200:
            return self.send_error(cls.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(cls.content)))
        self.end_headers()
        self.wfile.write(cls.content[:cls.break_after])


def test_hellaswag_fetch(tmp, vocab):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeSite)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = "".join(json.dumps(question(label=i % 4)) + "\n" for i in range(1000)).encode()
    with open(HELLASWAG) as f:
        script = f.read()
    url = re.search('^URL = "(.*)"$', script, re.M)[1]
    # The script as it is, but for this test's server and the sha256 of its content.
    base, digest = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(content).hexdigest()
    script = re.sub('(?m)^SHA256 = "[0-9a-f]{64}"$', f'SHA256 = "{digest}"', script)
    script = script.replace(f'URL = "{url}"', f'URL = "{base}/x/hellaswag_val.jsonl"')
    os.makedirs(f"{tmp}/data")
    shutil.copy(TOKENIZE, f"{tmp}/data")
    script, both = write(f"{tmp}/data/hellaswag.py", script), ["hellaswag_val.bin", "hellaswag_val.jsonl"]

    def fetch(folder, data=content, status=200, break_after=None, env={}):
        FakeSite.content, FakeSite.status, FakeSite.break_after, FakeSite.asked = data, status, break_after, []
        return python(script, *(["--out", f"{tmp}/{folder}"] if folder else []), *vocab, env=env)

    out, default = works("fetched", fetch(None)), f"{tmp}/data/hellaswag"
    check("fetched: to the default folder", listing(default) == both, listing(default))
    check("fetched: the files", read(f"{default}/{both[1]}") == content
          and [q[0] for q in eval_questions(f"{default}/{both[0]}")] == [0, 1, 2, 3] * 250)
    good = f"sha256 {digest}, HellaSwag's validation set" in out and "1000 questions" in out
    check("fetched: says so", good, out)
    check("fetched: what was asked for", FakeSite.asked == ["/x/hellaswag_val.jsonl"], FakeSite.asked)
    out = works("fetched again", fetch(None, status=404))
    check("fetched again: no request", FakeSite.asked == [] and "already there and correct" in out, out)

    def bad(name, done, folder, *words):
        fails(f"hellaswag.py, {name}", done, "hellaswag.py: ", *words)
        left = listing(f"{tmp}/{folder}")
        check(f"hellaswag.py, {name}: leaves nothing", left == [], left)

    bad("404", fetch("a", status=404), "a", "/x/hellaswag_val.jsonl: the server answers 404", "other means")
    bad("broken off", fetch("b", break_after=1000), "b", "broke off after 1000 bytes", "run this again")
    bad("another file", fetch("c", content[:-1]), "c", "is not the expected file", "try again later")
    os.makedirs(f"{tmp}/d")
    write(f"{tmp}/d/{both[1]}", content[:-1])
    fails("another file is there", fetch("d"), f"{tmp}/d/{both[1]}", "move it away", "FILE")
    check("another file is there: stays", listing(f"{tmp}/d") == both[1:] and FakeSite.asked == [])
    fails("fetched, no tiktoken", fetch("e", env=without(tmp, "tiktoken")), "pip install tiktoken")
    check("fetched, no tiktoken: the download stays", read(f"{tmp}/e/{both[1]}") == content)
    works("and with tiktoken", fetch("e"))
    check("and with tiktoken: no request", FakeSite.asked == [] and listing(f"{tmp}/e") == both)
    server.shutdown()
    server.server_close()

    done = fetch("n n")
    bad("no network", done, "n n", f"could not reach {base}/x/hellaswag_val.jsonl", "is there a network?",
        f"put it at {tmp}/n n/hellaswag_val.jsonl")
    write(f"{tmp}/n n/{both[1]}", content)
    command = shlex.split(done.stderr.partition("this works: ")[2])
    check("no network: the command it names", command[:2] == ["python", script], command)
    works("no network: it works", python(*command[1:]))
    check("no network: the result", read(f"{tmp}/n n/{both[0]}") == read(f"{default}/{both[0]}"))
    bad("no network, as it is", python(HELLASWAG, "--out", f"{tmp}/f", env=NO_DOWNLOAD), "f",
        f"could not reach {url}")
    real = os.path.join(HERE, "hellaswag", both[1])
    if os.path.exists(real):
        os.makedirs(f"{tmp}/g")
        os.symlink(real, f"{tmp}/g/{both[1]}")
        out = works("the real file", python(HELLASWAG, "--out", f"{tmp}/g", *vocab))
        check("the real file: its questions", "10042 questions" in out and len(eval_questions(
            f"{tmp}/g/{both[0]}")) == 10042, out)
    else:
        skip("HellaSwag's own file", "no data/hellaswag/hellaswag_val.jsonl")


# ----------------------------------------------------------------------------------------------------------
# dev/reference.py

def test_reference(tmp):
    packages = ["numpy", "safetensors", "torch"]
    for i, package in enumerate(packages):  # in the order of the script, so those before it do not matter
        env = without(tmp, package)
        for before in packages[:i]:
            write(f"{tmp}/without_{package}/{before}.py", "")
        fails(f"{package} missing", python(REFERENCE, "--selftest", env=env),
              f"reference.py: the package {package} is missing; install it with: pip install {package}")
    if not HAVE_REFERENCE:
        return skip("dev/reference.py with damaged files", "torch, numpy or safetensors is not installed")

    def model(path, **changes):
        """A model of bytes, without blocks, whose parameters are 0: each byte is as likely as any other."""
        shapes = {"wte": (256, 2), "wpe": (4, 2), "lnf.gain": (2,), "lnf.bias": (2,), "head": (256, 2)}
        meta = dict(scheme="us", precision="fp32", activation="gelu", heads="1", vocab="256", tau="0.4")
        header, at = {"__metadata__": {**meta, **changes}}, 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        header = json.dumps(header).encode()
        return write(path, struct.pack("<Q", len(header)) + header + bytes(at))

    sound, none = model(f"{tmp}/sound"), f"{tmp}/none"
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    other = struct.pack("<Q", len(header)) + header + bytes(4)
    files = [("empty", b"", "cannot read"), ("noise", b"<html>" * 500, "cannot read"),
             ("truncated", read(sound)[:-1], "cannot read"), ("other", other, "is not ")]
    for name, data, word in [("none", None, "cannot read"), *files]:
        path = f"{tmp}/{name}" if data is None else write(f"{tmp}/{name}", data)
        for action in ["--check", path], ["--generate", path, "--prompt", "a"]:
            fails(f"{action[0]}, {name}", python(REFERENCE, *action), "reference.py: ", path, word)
    for changes, word in [({"scheme": "x"}, "scheme x"), ({"precision": "fp4"}, "precision fp4"),
                          ({"tau": "a"}, "'a'"), ({"heads": "3"}, "3 heads"), ({"vocab": "257"}, "257"),
                          ({"alpha-out": "nan"}, "positive")]:
        path = model(f"{tmp}/changed", **changes)
        fails(f"--generate, {changes}", python(REFERENCE, "--generate", path, "--prompt", "a"), path, word)
    numbers = model(f"{tmp}/numbers", vocab="255")
    for path, prompt, word in [(numbers, "a", "numbers"), (numbers, "9 255", "below 255")]:
        fails(f"--prompt {prompt}", python(REFERENCE, "--generate", path, "--prompt", prompt), "--prompt", word)
    unsafe = b"\x1b[1m \x7f\xc2\x9b \xe2\x82. \xff \xed\xa0\x80 \r".decode(errors="surrogateescape")
    for path, prompt, text in [(sound, "ab", "ab??\n"), (sound, "", "??\n"), (sound, "ü\t€\n\ufffd", "ü\t€\n\ufffd??\n"),
                               (sound, unsafe, "?[1m ??? ??. ? ??? ???\n"), (sound, "a\udce2", "a???\n"),
                               (numbers, "97 98", "97 98 0 0 \n")]:
        done = python(REFERENCE, "--generate", path, "--prompt", prompt, "--tokens", "2", "--temperature", "0")
        check("--generate, the lowest of equals", works("--generate", done) == text, repr(done.stdout))

    def questions(labels):
        question = [*(2, 7, 8), *(1, 9), *(6, 1, 2, 3, 4, 5, 6)]  # the context, two answers
        body = b"".join(struct.pack("<17H", 65535, 34, 0, label, 2, *question) for label in labels)
        return struct.pack("<256i", 20240522, 1, len(labels), *[0] * 253) + body

    good = questions((0, 1, 0))
    path = write(f"{tmp}/questions", good)
    done = works("--hellaswag", python(REFERENCE, "--hellaswag", sound, path))
    check("--hellaswag, the first of equals", done.splitlines() == [
        "question 0: 0 of 5.5452 5.5452 right", "question 1: 0 of 5.5452 5.5452 wrong, it is 1",
        "question 2: 0 of 5.5452 5.5452 right", "hellaswag: 2 of 3 right, 0.6667"], done)
    fails("--hellaswag, no questions", python(REFERENCE, "--hellaswag", sound, none), "cannot read", none)
    for name, data, word in [("noise", bytes(2000), "20240522"), ("short", good[:-2], "too early"),
                             ("odd", good[:-1], "damaged"), ("long", good + bytes(2), "header"),
                             ("label", questions((0, 2)), "question 1"), ("none in it", questions(()), "header"),
                             ("size", good[:1026] + b"\x23" + good[1027:], "question 0"),
                             ("token", good[:-1] + b"\1", "question 2 has a token")]:
        path = write(f"{tmp}/questions", data)
        fails(f"--hellaswag, {name}", python(REFERENCE, "--hellaswag", sound, path), path, word)


# ----------------------------------------------------------------------------------------------------------
# HellaSwag once more, from the definition: what the trainer answers

def small_model(path):
    """An exported µS model in FP32 as a function: tokens to the logits after each."""
    import numpy as np
    data = read(path)
    size = int.from_bytes(data[:8], "little")
    header, w = json.loads(data[8:8 + size]), {}
    meta = header.pop("__metadata__")
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        w[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"]).astype(float)
    heads, tau = int(meta["heads"]), float(meta["tau"])
    linear = lambda x, name: x @ w[name].T / math.sqrt(w[name].shape[1])
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name + ".gain"] + w[name + ".bias"]

    def attention(qkv):
        n, parts = len(qkv), np.split(qkv, 3, -1)
        q, k, v = (x.reshape(n, heads, -1).transpose(1, 0, 2) for x in parts)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + np.triu(np.full((n, n), -np.inf), 1)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, -1)

    def logits(tokens):
        x = (w["wte"][tokens] + w["wpe"][:len(tokens)]) / math.sqrt(2)
        for i in range(int(meta["layers"])):
            h = f"h.{i}."
            branch = linear(attention(linear(x, h + "qkv")), h + "out")
            x = math.sqrt(1 - tau) * x + math.sqrt(tau) * norm(branch, h + "ln1")
            branch = linear(gelu(linear(x, h + "up")), h + "down")
            x = math.sqrt(1 - tau) * x + math.sqrt(tau) * norm(branch, h + "ln2")
        return norm(x, "lnf") @ w["head"][:50257].T / x.shape[-1]
    return logits, len(w["wpe"])


def test_answers(tmp):
    if not os.path.exists(TRAINER) or importlib.util.find_spec("numpy") is None:
        return skip("HellaSwag's answers", "./train_us is not built (make), or numpy is not installed")
    import numpy as np
    draws, T, model, questions = random.Random(5), 20, f"{tmp}/model", []
    write(f"{tmp}/text.bin", make_shard([draws.randrange(50257) for _ in range(900)]))
    done = run(TRAINER, "--input", f"{tmp}/text.bin", "--out", f"{tmp}/run", "--layers", "2", "--width", "32", "--seq",
               str(T), "--batch", "4", "--steps", "3", "--precision", "fp32", "--tokens", "1")
    works("train_us", done)
    works("--export", run(TRAINER, "--load", f"{tmp}/run/checkpoint.safetensors", "--export", model))
    logits, positions = small_model(model)
    check("positions", positions == T)
    for i in range(40):  # contexts and endings shorter and longer than the window
        context = [draws.randrange(50257) for _ in range(draws.randint(1, 30 if i % 3 == 0 else 8))]
        endings = [[draws.randrange(50257) for _ in range(draws.randint(1, 25 if i % 5 == 0 else 7))] for _ in range(4)]
        means = []
        for ending in endings:
            text = (context + ending)[-T - 1:]
            z = logits(text[:-1])
            losses = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), text[1:]]
            means.append(losses[-len(ending):].mean())
        questions.append((means.index(min(means)), context, endings))
    for shift in (0, 1):
        body = b""
        for i, (answer, context, endings) in enumerate(questions):
            words = [i, (answer + shift * (i % 4)) % 4, 4]
            for part in (context, *endings):
                words += [len(part), *part]
            body += struct.pack(f"<{len(words) + 2}H", 65535, 2 * len(words) + 4, *words)
        write(f"{tmp}/questions", struct.pack("<256i", 20240522, 1, len(questions), 2000, *[0] * 252) + body)
        done = run(TRAINER, "--load", model, "--evaluate", "--hellaswag", f"{tmp}/questions")
        right = 10 if shift else 40
        works("--evaluate", done)
        check("the trainer's answers", f"hellaswag: {right} of 40 right" in done.stdout, done.stdout[-200:])
        if HAVE_REFERENCE:
            done = python(REFERENCE, "--hellaswag", model, f"{tmp}/questions")
            check("the reference's answers", f"hellaswag: {right} of 40 right" in done.stdout, done.stdout[-200:])


# ----------------------------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description="Test the scripts of this folder; no network needed.")
    p.add_argument("--vocab", metavar="vocab.bpe", help="OpenAI's merges, for a test with GPT-2's vocabulary")
    p.add_argument("--encoder", metavar="encoder.json", help="OpenAI's token ids, goes with --vocab")
    args = p.parse_args()
    if bool(args.vocab) != bool(args.encoder):
        sys.exit("test_data.py: --vocab and --encoder go together: give both or neither")

    with_vocab = [test_tokenize_results, test_tokenize_documents, test_tokenize_shards, test_tokenize_pieces,
                  test_tokenize_errors, test_tokenize_decode_errors, test_tokenize_interrupted,
                  test_hellaswag_results, test_hellaswag_errors, test_hellaswag_fetch]
    others = [test_tokenize_without_tiktoken, test_tokenize_gpt2, test_tinyshakespeare, test_fineweb,
              test_reference, test_answers]
    for test in with_vocab + others:
        with tempfile.TemporaryDirectory() as tmp:
            make_vocab(tmp)
            needs_tiktoken = test in with_vocab or test == test_tokenize_gpt2
            try:
                if needs_tiktoken and not HAVE_TIKTOKEN:
                    skip(test.__name__, "tiktoken is not installed")
                elif test == test_tokenize_gpt2 and not args.vocab:
                    skip("GPT-2's own vocabulary", "give --vocab and --encoder")
                elif test == test_tokenize_gpt2:
                    test(tmp, args)
                elif test in with_vocab:
                    test(tmp, ["--vocab", f"{tmp}/vocab.bpe", "--encoder", f"{tmp}/encoder.json"])
                else:
                    test(tmp)
            except Exception as e:  # a missing file, say, where the rest of this test cannot go on
                check(test.__name__, False, f"stopped: {e!r}")
    print(f"{counts['passed']} passed, {counts['failed']} failed"
          + (f", {counts['skipped']} skipped" if counts["skipped"] else ""))
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
