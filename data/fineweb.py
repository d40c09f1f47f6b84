"""
Fetches ready-made shards of GPT-2 tokens of FineWeb, 10 billion tokens of filtered web text.

    python data/fineweb.py                                    # 1 val and 1 train shard into data/fineweb10B
    python data/fineweb.py --shards 10                        # 10 train shards, 1 billion tokens, 2 GB
    python data/fineweb.py --version edu --shards 99 --out /big/edu

A shard is 100 million tokens, 200 MB, in the format of data/tokenize.py; a version's last one is shorter.
A download that breaks off is continued by the same command; shards that are there are only checked.

    classic  https://huggingface.co/datasets/kjj0/fineweb10B-gpt2      103 train shards
    edu      https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2    99 train shards, educational pages

The tokenizer's table, gpt2_tokenizer.bin, which turns tokens back into text, is written next to the shards.
That needs tiktoken (pip install tiktoken), which fetches GPT-2's vocabulary on first use; --vocab and
--encoder replace that download, as in data/tokenize.py. Where it fails, the shards are there all the same.
"""

import os
import sys

# The folder of this script has a file tokenize.py, which must not stand in for Python's module of that name.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [p for p in sys.path if os.path.abspath(p) != HERE]

import argparse
import array
import hashlib
import http.client
import re
import shlex
import struct
import subprocess
import urllib.error
import urllib.request

VERSIONS = {  # dataset, first part of the files' names, train shards there are, default folder
    "classic": ("kjj0/fineweb10B-gpt2", "fineweb", 103, "fineweb10B"),
    "edu": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99, "finewebedu10B"),
}
SHARD_MAGIC, SHARD_VERSION, GPT2_VOCAB = 20240520, 1, 50257
BLOCK = 1 << 20


def die(message):
    sys.exit(f"fineweb.py: {message}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message} (--help shows the usage)")


def shard_problem(path):
    """What is wrong with a shard's format, or None."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        header = f.read(1024)
        if len(header) < 1024:
            return f"is {size} bytes, shorter than a shard's header"
        magic, version, count = struct.unpack("<3i", header[:12])
        if magic != SHARD_MAGIC or version != SHARD_VERSION:
            return f"is not a token shard (starts with {magic}, {version})"
        if count < 1 or size != 1024 + 2 * count:
            return f"has {size} bytes, and {1024 + 2 * count} would fit its header's {count} tokens"
        while block := f.read(BLOCK):
            tokens = array.array("H", block)
            if sys.byteorder == "big":
                tokens.byteswap()
            if max(tokens) >= GPT2_VOCAB:
                return f"has the token {max(tokens)}, and GPT-2's end at {GPT2_VOCAB - 1}"


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps Hugging Face's headers from the answers on the way."""

    def __init__(self):
        self.headers = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def note(self, headers):
        self.headers.update({k.lower(): v for k, v in headers.items() if k.lower().startswith("x-linked-")})


def fetch(url, part):
    """Downloads to the file part, from where it ends; returns the size and sha256 the server reports."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    redirects = Redirects()
    headers = {"User-Agent": "us.c/fineweb.py", "Range": f"bytes={have}-"}
    try:
        answer = urllib.request.build_opener(redirects).open(
            urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code != 416 or not have:  # 416: nothing follows byte `have`, so the file is whole, or too long
            die(f"{url}: the server answers {e.code} {e.reason}; try again later, or see if the page exists")
        answer = e
    except (OSError, http.client.HTTPException) as e:
        die(f"could not reach {url} ({getattr(e, 'reason', e)}); is there a network? "
            f"Files got by other means go to {os.path.dirname(part)}")
    redirects.note(answer.headers)

    # The shards are in Git LFS, whose id of a file is its sha256. Hugging Face sends it, and the size, as
    # headers of its first answer, before the redirect to the storage. So the checksum is only as good as the
    # connection it came over: it finds damage on the way, and not a file that was replaced at the source.
    # There is no second list of checksums to compare with. Answers without these headers are checked for
    # their format and for the length of the transfer alone.
    sha256 = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', redirects.headers.get("x-linked-etag", ""))
    content_range = answer.headers.get("Content-Range", "")  # "bytes 100-199/200", and "bytes */200" for 416
    size = redirects.headers.get("x-linked-size") or content_range.rpartition("/")[2]
    if not size and answer.status == 200:
        size = answer.headers.get("Content-Length")
    size = int(size) if size and size.isdigit() else None

    with answer:
        if answer.status == 416:
            return size, sha256 and sha256[1]
        # A server that ignores the range sends the whole file.
        resumed = answer.status == 206 and content_range.startswith(f"bytes {have}-")
        with open(part, "ab" if resumed else "wb") as f:
            done, block = f.tell(), b"first"
            while block:
                try:
                    block = answer.read(BLOCK)
                except (OSError, http.client.HTTPException):
                    block = b""  # the size tells whether this is the end
                f.write(block)
                done += len(block)
                if sys.stderr.isatty():
                    print(f"\r{done / 1e6:.0f} of {(size or 0) / 1e6:.0f} MB\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if size is not None and done < size:
        die(f"the connection broke off after {done} of {size} bytes of {os.path.basename(part)}; "
            "the same command continues from there")
    return size, sha256 and sha256[1]


def get(url, path):
    """Makes sure that a checked shard is at path."""
    if os.path.exists(path):
        problem = shard_problem(path)
        if problem:
            die(f"{path} {problem}; delete it and run this again")
        print(f"{path} is already there, {os.path.getsize(path) / 1e6:.1f} MB, format checked")
        return
    part = path + ".part"
    size, sha256 = fetch(url, part)
    problem = shard_problem(part)
    if size is not None and os.path.getsize(part) != size:
        problem = f"has {os.path.getsize(part)} bytes, and the server says {size}"
    elif sha256:
        digest = hashlib.sha256()
        with open(part, "rb") as f:
            while block := f.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != sha256:
            problem = "does not have the sha256 the server says"
    if problem:
        os.remove(part)  # continuing it would keep the damage
        die(f"{os.path.basename(path)} as downloaded {problem}; it was deleted, run this again")
    os.replace(part, path)
    checks = "sha256 and format checked" if sha256 else "format checked; the server gave no sha256"
    print(f"wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB, {checks}")


def write_table(out, vocab):
    """Makes sure that the tokenizer's table is in the folder out; returns what to say if it is not."""
    table = os.path.join(out, "gpt2_tokenizer.bin")
    if os.path.exists(table):
        print(f"{table} is already there")
        return None
    # As a command of its own, tokenize.py may end where something is missing, and the shards stay.
    command = [sys.executable, os.path.join(HERE, "tokenize.py"), "--out", out, "--tokenizer-only", *vocab]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        print(done.stdout, end="")
        return None
    reason = (done.stderr.splitlines() or [f"tokenize.py ended with {done.returncode}"])[-1]
    return f"no {table} yet ({reason}); to write it later: {shlex.join(command)}"


def main():
    p = Parser(description="Fetch ready-made shards of GPT-2 tokens of FineWeb's 10-billion-token sample.")
    p.add_argument("--version", choices=sorted(VERSIONS), default="classic",
                   help="classic: all pages; edu: educational pages (default %(default)s)")
    p.add_argument("--shards", type=int, default=1, metavar="N",
                   help="train shards, 200 MB each, next to the one val shard (default %(default)s)")
    p.add_argument("--out", metavar="DIR", help="folder for the shards (default: fineweb10B or finewebedu10B "
                                                "next to this script)")
    p.add_argument("--vocab", metavar="vocab.bpe", help="OpenAI's merges, to write the table without "
                                                        "downloading them")
    p.add_argument("--encoder", metavar="encoder.json", help="OpenAI's token ids, goes with --vocab")
    p.add_argument("--base-url", default="https://huggingface.co", help=argparse.SUPPRESS)  # for the tests
    args = p.parse_args()
    dataset, name, available, folder = VERSIONS[args.version]
    if not 0 <= args.shards <= available:
        die(f"--shards {args.shards}: {args.version} has 0 to {available}")
    if bool(args.vocab) != bool(args.encoder):
        die("--vocab and --encoder go together: give both or neither")
    out = args.out or os.path.join(HERE, folder)
    if os.path.exists(out) and not os.path.isdir(out):
        die(f"--out {out}: is a file, and has to be a folder")
    os.makedirs(out, exist_ok=True)

    names = [f"{name}_val_000000.bin"] + [f"{name}_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    print(f"{len(names)} shards of about 200 MB: {len(names) * 200} MB in {out}")
    for file in names:
        get(f"{args.base_url}/datasets/{dataset}/resolve/main/{file}", os.path.join(out, file))
    problem = write_table(out, ["--vocab", args.vocab, "--encoder", args.encoder] if args.vocab else [])
    if problem and args.vocab:  # the table was asked for
        die(problem)
    elif problem:
        print(f"note: {problem}")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        die(f"{e.filename or 'cannot read or write'}: {e.strerror or e}")
    except KeyboardInterrupt:
        die("interrupted; the same command continues the download")
