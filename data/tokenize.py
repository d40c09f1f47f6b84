"""
Turns text into the two kinds of files the trainer reads: shards of GPT-2 tokens, and the tokenizer's table.

    python data/tokenize.py data/tinyshakespeare.txt --out data/tinyshakespeare
    python data/tokenize.py wiki.jsonl books.txt --out data/mix --name mix --val-fraction 0.01
    python data/tokenize.py --decode data/tinyshakespeare/tinyshakespeare_val_000000.bin --tokens 100
    python data/tokenize.py --encode "Once upon a time"                  # numbers, for the trainer's --prompt
    python data/tokenize.py --out data/fineweb10B --tokenizer-only

A .jsonl file holds one document a line, {"text": "..."}; any other file is one document of UTF-8 text. The
files are joined in the order given, with the end-of-text token (50256) before each document. The first
--val-fraction of the text becomes NAME_val_*.bin and the rest NAME_train_*.bin, numbered through:

    DIR/NAME_val_000000.bin  DIR/NAME_train_000001.bin  DIR/NAME_train_000002.bin ...  DIR/gpt2_tokenizer.bin

These are the formats of llm.c, so the same files serve both programs (all numbers little-endian):

    shard      int32[256] header: 20240520, version 1, number of tokens, zeros; then one uint16 per token
    tokenizer  uint32[256] header: 20240328, version 2, number of tokens, end-of-text id, zeros;
               then for each token one byte with its length, and its bytes

Needs tiktoken (pip install tiktoken), which fetches GPT-2's vocabulary on first use. Without a network, give
OpenAI's two original files: --vocab vocab.bpe --encoder encoder.json
"""

import os
import sys

# This file has the name of a module of Python's own library, which other modules import. Python looks in the
# script's folder first, so that folder has to leave the path before anything else is imported.
sys.path = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import array
import glob
import json
import re
import struct

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
GPT2_VOCAB, END_OF_TEXT = 50257, "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes; the same splits as OpenAI's original expression.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def die(message):
    sys.exit(f"tokenize.py: {message}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message} (--help shows the usage)")


# ----------------------------------------------------------------------------------------------------------
# The vocabulary

def load_encoding(vocab, encoder):
    try:
        import tiktoken
    except ImportError:
        die("the package tiktoken is missing; install it with: pip install tiktoken")
    if vocab:
        ranks = read_openai_files(vocab, encoder)
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no network, or a download that is not what tiktoken expects
        die("tiktoken could not download GPT-2's vocabulary; without a network, get OpenAI's vocab.bpe and "
            "encoder.json by other means and give --vocab vocab.bpe --encoder encoder.json")


def read_openai_files(vocab, encoder):
    """The merges of vocab.bpe as {bytes: id}, checked against encoder.json."""
    # tiktoken can read this pair too, but it caches by path, so a file that has changed would go unnoticed.
    # Both files spell a byte as one visible character: itself where it is visible, else chr(256 + n).
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}

    def spell(symbols):
        return bytes(byte_of[c] for c in symbols)

    try:
        ranks = {bytes([b]): i for i, b in enumerate(visible + hidden)}
        with open(vocab, encoding="utf-8", newline="\n") as f:
            merges = [line for line in f.read().split("\n") if line and not line.startswith("#version")]
        for merge in merges:
            left, right = merge.split(" ")
            ranks[spell(left) + spell(right)] = len(ranks)
    except (ValueError, KeyError):  # ValueError covers bytes that are not UTF-8
        die(f"{vocab} is not a GPT-2 vocab.bpe (two symbols a line)")
    try:
        with open(encoder, encoding="utf-8") as f:
            ids = json.load(f)
        end_of_text = ids.pop(END_OF_TEXT)
        ids = {spell(symbols): i for symbols, i in ids.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        die(f"{encoder} is not a GPT-2 encoder.json (one object of symbols and ids, with {END_OF_TEXT})")
    # Ids are merge order: a mismatch here would give tokens that mean something else to every other program.
    if ids != ranks or end_of_text != len(ranks):
        die(f"{vocab} and {encoder} do not belong together (they give different ids)")
    if len(ranks) + 1 != GPT2_VOCAB:
        print(f"note: this vocabulary has {len(ranks) + 1} tokens, GPT-2's has {GPT2_VOCAB}")
    if len(ranks) >= 1 << 16:
        die(f"{vocab} has {len(ranks) + 1} tokens, and a shard stores 16 bits for each")
    return ranks


def read_tokenizer(path):
    """The bytes of every token, from a gpt2_tokenizer.bin."""
    with open(path, "rb") as f:
        data = f.read()
    if len(data) < 1024 or struct.unpack("<2I", data[:8]) != (TOKENIZER_MAGIC, TOKENIZER_VERSION):
        die(f"{path} is not a tokenizer file; delete it, and --tokenizer-only writes a new one")
    table, at = [], 1024
    for _ in range(struct.unpack_from("<I", data, 8)[0]):
        length = data[at] if at < len(data) else 0
        table.append(data[at + 1:at + 1 + length])
        at += 1 + length
    if at != len(data) or not all(table):
        die(f"{path} is damaged; delete it, and --tokenizer-only writes a new one")
    return table


def token_table(encoding):
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


def write_tokenizer(path, encoding):
    header = [TOKENIZER_MAGIC, TOKENIZER_VERSION, encoding.n_vocab, encoding.eot_token]
    with open(path + ".tmp", "wb") as f:
        f.write(struct.pack("<256I", *header, *[0] * 252))
        for token in token_table(encoding):
            f.write(bytes([len(token)]) + token)
    os.replace(path + ".tmp", path)


# ----------------------------------------------------------------------------------------------------------
# Text in

def pieces(path, size):
    """Yields (text, bytes of the file behind it, whether a document starts here) for all of one file."""
    with open(path, "rb") as f:
        if path.endswith(".jsonl"):
            for number, line in enumerate(f, 1):
                text = ""
                if line.strip():
                    try:
                        text = json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        die(f'{path}, line {number}: is not an object with a text, like {{"text": "..."}}')
                    if not isinstance(text, str):
                        die(f'{path}, line {number}: the "text" is not a string')
                yield text, len(line), text != ""  # an empty document would be a lone end-of-text token
            return
        done, rest = 0, b""
        while True:
            block = f.read(size)
            rest += block
            # All of the text has to come out as the tokens it has as a whole. No GPT-2 word reaches from a
            # visible character into a newline, and none looks back, so a piece may end between those two.
            # Other places can change the result: a run of spaces, say, splits by what comes after it. A file
            # without such a place is read whole.
            cut = len(rest)
            if block:
                cut = rest.rfind(b"\n")
                while cut > 0 and not 0x21 <= rest[cut - 1] <= 0x7e:
                    cut = rest.rfind(b"\n", 0, cut)
            if cut > 0:
                try:
                    text = rest[:cut].decode("utf-8")
                except UnicodeDecodeError as e:
                    die(f"{path} is not UTF-8 text (see byte {done + e.start})")
                yield text, cut, done == 0
                done, rest = done + cut, rest[cut:]
            if not block:
                return


# ----------------------------------------------------------------------------------------------------------
# Shards out

class Shards:
    """Writes tokens to .tmp files as they come; commit() gives all of them their names at once."""

    def __init__(self, out, name, limit):
        self.prefix, self.limit = os.path.join(out, name), limit
        self.paths, self.file, self.split, self.count = [], None, None, 0
        self.tokens = {"val": 0, "train": 0}

    def add(self, split, tokens):
        while tokens:
            if self.file is None or self.split != split or self.count == self.limit:
                self.close()
                self.split, self.count = split, 0
                self.paths.append(f"{self.prefix}_{split}_{len(self.paths):06d}.bin")
                self.file = open(self.paths[-1] + ".tmp", "wb")
                self.file.write(bytes(1024))
            take = array.array("H", tokens[:self.limit - self.count])
            tokens = tokens[len(take):]
            self.count += len(take)
            self.tokens[split] += len(take)
            if sys.byteorder == "big":
                take.byteswap()
            take.tofile(self.file)

    def close(self):
        if self.file is not None:
            self.file.seek(0)  # only now is the count known
            self.file.write(struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, self.count))
            self.file.close()
            self.file = None

    def commit(self):
        for path in self.paths:
            os.replace(path + ".tmp", path)
        # Shards of an earlier, longer run under this name would be trained on along with the new ones.
        ours = re.compile(re.escape(os.path.basename(self.prefix)) + r"_(val|train)_\d{6}\.bin")
        for path in glob.glob(glob.escape(self.prefix) + "_*.bin"):
            if path not in self.paths and ours.fullmatch(os.path.basename(path)):
                os.remove(path)
                print(f"removed {path}, which was left from an earlier run")

    def discard(self):
        if self.file is not None:
            self.file.close()
        for path in self.paths:
            if os.path.exists(path + ".tmp"):
                os.remove(path + ".tmp")


def tokenize(args, encoding, shards):
    sizes = [os.path.getsize(path) for path in args.files]
    val_bytes = args.val_fraction * sum(sizes)
    done = text_bytes = 0
    for path in args.files:
        for text, size, new_document in pieces(path, args.piece_bytes):
            tokens = encoding.encode_ordinary(text)
            if new_document:
                tokens.insert(0, encoding.eot_token)
            # The share is measured in bytes of input: the number of tokens is only known at the end.
            val = round(len(tokens) * min(1, max(0, (val_bytes - done) / size)))
            shards.add("val", tokens[:val])
            shards.add("train", tokens[val:])
            done += size
            text_bytes += len(text.encode("utf-8", "surrogatepass"))
            if sys.stderr.isatty():
                print(f"\r{100 * done // sum(sizes)} %\033[K", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    shards.close()
    if not shards.tokens["train"] or (args.val_fraction and not shards.tokens["val"]):
        die("too little text to fill both val and train; add text or change --val-fraction")
    return text_bytes


# ----------------------------------------------------------------------------------------------------------
# Shards back to text

def read_shard(path, limit):
    """The first tokens of a shard, and how many it has."""
    with open(path, "rb") as f:
        header = f.read(1024)
        if len(header) < 1024 or struct.unpack("<i", header[:4])[0] != SHARD_MAGIC:
            die(f"{path} is not a token shard (it does not start with the number {SHARD_MAGIC})")
        version, count = struct.unpack("<2i", header[4:12])
        if version != SHARD_VERSION:
            die(f"{path} has version {version}, and only version {SHARD_VERSION} is known")
        expected, actual = 1024 + 2 * count, os.path.getsize(path)
        if actual != expected:
            die(f"{path} is damaged: its {count} tokens would make {expected} bytes, and it has {actual}")
        tokens = array.array("H")
        tokens.frombytes(f.read(2 * min(limit, count)))
        if sys.byteorder == "big":
            tokens.byteswap()
        return tokens, count


def decode(args):
    tokens, count = read_shard(args.decode, args.tokens)
    # The table next to the shard is what the trainer uses, so it is the one to check.
    beside = os.path.join(os.path.dirname(args.decode), "gpt2_tokenizer.bin")
    if os.path.exists(beside) and not args.vocab:
        table = read_tokenizer(beside)
    else:
        table = token_table(load_encoding(args.vocab, args.encoder))
    if tokens and max(tokens) >= len(table):
        die(f"{args.decode} has the token {max(tokens)}, and the vocabulary ends at {len(table) - 1}")
    # The last token can end inside a character.
    text = b"".join(table[t] for t in tokens).decode("utf-8", "replace")
    sys.stdout.buffer.write(text.encode("utf-8") + b"\n")
    sys.stdout.buffer.flush()
    print(f"[{len(tokens)} of {count} tokens]", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------

def main():
    p = Parser(description="Turn text into shards of GPT-2 tokens in llm.c's format, and write the table of "
                           "the tokenizer next to them.")
    p.add_argument("files", nargs="*", metavar="FILE", help="text, or .jsonl with a text in each line")
    p.add_argument("--out", metavar="DIR", help="folder for the results; made if missing")
    p.add_argument("--name", help="first part of the shards' names (default: the first FILE's name)")
    p.add_argument("--val-fraction", type=float, default=0.1, metavar="F",
                   help="share of the text, from its start, for validation; 0 for none (default %(default)s)")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                   help="most tokens in one shard (default %(default)s, 200 MB)")
    p.add_argument("--vocab", metavar="vocab.bpe", help="OpenAI's merges, to work without a network")
    p.add_argument("--encoder", metavar="encoder.json", help="OpenAI's token ids, goes with --vocab")
    p.add_argument("--tokenizer-only", action="store_true", help="write only DIR/gpt2_tokenizer.bin")
    p.add_argument("--decode", metavar="SHARD", help="print the text of a shard's first tokens, and stop")
    p.add_argument("--encode", metavar="TEXT", help="print the numbers of a text's tokens, and stop")
    p.add_argument("--tokens", type=int, default=200, metavar="N",
                   help="how many, for --decode (default %(default)s)")
    p.add_argument("--piece-bytes", type=int, default=1 << 20, help=argparse.SUPPRESS)  # for the tests
    args = p.parse_args()

    if bool(args.vocab) != bool(args.encoder):
        die("--vocab and --encoder go together: give both or neither")
    if args.decode:
        if args.files or args.tokens < 1:
            die("--decode takes one shard, no other files, and --tokens of at least 1")
        return decode(args)
    if args.encode is not None:
        print(*load_encoding(args.vocab, args.encoder).encode_ordinary(args.encode))
        return
    if not args.out:
        die("no --out: name the folder for the results")
    if bool(args.files) == args.tokenizer_only:
        die("no FILE: name the text to tokenize" if not args.files else "--tokenizer-only takes no FILE")
    if not 0 <= args.val_fraction < 1:
        die(f"--val-fraction {args.val_fraction:g}: must be at least 0 and less than 1")
    if not 1 <= args.shard_tokens < 1 << 31:
        die(f"--shard-tokens {args.shard_tokens}: must be at least 1 and less than 2147483648")
    name = args.name or os.path.splitext(os.path.basename(args.files[0] if args.files else ""))[0]
    if "/" in name:
        die(f"--name {name}: must not have a / in it; --out names the folder")
    for path in args.files:  # before the work starts, and not hours into it
        if os.path.getsize(path) == 0:
            die(f"{path} is empty (or a pipe; give a file)")
        open(path, "rb").close()
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        die(f"--out {args.out}: is a file, and has to be a folder")

    encoding = load_encoding(args.vocab, args.encoder)
    os.makedirs(args.out, exist_ok=True)
    table = os.path.join(args.out, "gpt2_tokenizer.bin")
    if args.tokenizer_only:
        write_tokenizer(table, encoding)
        print(f"wrote {table}, {encoding.n_vocab} tokens")
        return
    shards = Shards(args.out, name, args.shard_tokens)
    try:
        text_bytes = tokenize(args, encoding, shards)
        write_tokenizer(table, encoding)
        shards.commit()
    finally:
        shards.discard()
    for path in shards.paths:
        print(f"wrote {path}, {(os.path.getsize(path) - 1024) // 2} tokens")
    count = sum(shards.tokens.values())
    print(f"{count} tokens ({shards.tokens['val']} val, {shards.tokens['train']} train), {text_bytes} bytes, "
          f"{text_bytes / count:.3f} bytes per token, {len(shards.paths) + 1} files in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left, as in | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        die(f"{e.filename or 'cannot read or write'}: {e.strerror or e}")
    except KeyboardInterrupt:
        die("interrupted; no shard was written")
