"""
Turns HellaSwag's validation set, 10042 questions with four endings each, into a file the trainer can ask.

    python data/hellaswag.py                         # fetches it, 12 MB; writes data/hellaswag/hellaswag_val.bin
    python data/hellaswag.py mine.jsonl --out DIR    # these questions; writes DIR/mine.bin

Then, with a model of GPT-2 tokens:

    ./train_us --load FILE --evaluate --hellaswag data/hellaswag/hellaswag_val.bin

Each line of a .jsonl file is a question, {"ctx": "...", "endings": ["...", 3 more], "label": 0 to 3}; what else
it has is not read. The result is in llm.c's format, so one file serves both programs (all little-endian):

    int32[256] header: 20240522, version 1, number of questions, most bytes of a question, zeros; then uint16s:
    65535, bytes of this question (all of it), its index, its label, number of endings (4),
    number of tokens of the context, and these; for each ending the number of its tokens, and these

The context becomes tokens by itself, and so does each ending, with a space before it.

HellaSwag is https://github.com/rowanz/hellaswag. Its authors publish no checksum; the sha256 here is the one
in two lists that others keep, and the two agree: TensorFlow Datasets' url_checksums/hellaswag.txt, and
hellaswag/dataset_infos.json in Hugging Face's datasets. A file of yours is taken with any sha256.

Needs tiktoken (pip install tiktoken), which fetches GPT-2's vocabulary on first use; --vocab and --encoder
replace that download, as in data/tokenize.py.
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
import importlib.util
import json
import shlex
import struct
import urllib.error
import urllib.request

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
MAGIC, VERSION, START, ENDINGS = 20240522, 1, 65535, 4


def die(message):
    sys.exit(f"hellaswag.py: {message}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message} (--help shows the usage)")


def load_encoding(vocab, encoder):
    """The same as in tokenize.py, which can only be had by its path: its name is taken."""
    spec = importlib.util.spec_from_file_location("us_tokenize", os.path.join(HERE, "tokenize.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.die = die  # so that what it says begins with this script's name
    return module.load_encoding(vocab, encoder)


def put(path, data):
    """A file is there as a whole or not at all."""
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(data)
        os.replace(path + ".tmp", path)
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


def get(path):
    """Makes sure that HellaSwag's own file is at path."""
    if os.path.exists(path):
        with open(path, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        if digest != SHA256:
            die(f"{path} is there, but is not HellaSwag's (its sha256 is {digest}); move it away, or name it "
                "as FILE to use it all the same")
        return
    by_hand = f"get it by other means, put it at {path}, and this works: {shlex.join(['python', *sys.argv])}"
    print(f"fetching {URL}, 12 MB", flush=True)
    try:
        request = urllib.request.Request(URL, headers={"User-Agent": "us.c/hellaswag.py"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
    except urllib.error.HTTPError as e:
        die(f"{URL}: the server answers {e.code} {e.reason}; try again later, or {by_hand}")
    except http.client.IncompleteRead as e:
        die(f"the connection broke off after {len(e.partial)} bytes of {URL}; run this again, or {by_hand}")
    except (OSError, http.client.HTTPException) as e:
        die(f"could not reach {URL} ({getattr(e, 'reason', e)}); is there a network? Or {by_hand}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        die(f"what came from {URL} is not the expected file (its sha256 is {digest}); try again later")
    put(path, data)
    print(f"wrote {path}, {len(data)} bytes, sha256 checked")


def read_questions(path):
    """[(line's number, context, endings, label)] of a .jsonl file, all of them checked, and its sha256."""
    with open(path, "rb") as f:
        data = f.read()
    questions = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            question = json.loads(line)
        except (ValueError, RecursionError) as e:  # ValueError covers bytes that are not UTF-8
            die(f"{at}: is not JSON ({e})")
        if not isinstance(question, dict):
            die(f"{at}: is not an object with a ctx, endings and a label")
        for key in ("ctx", "endings", "label"):
            if key not in question:
                die(f'{at}: has no "{key}"')
        ctx, endings, label = question["ctx"], question["endings"], question["label"]
        if not isinstance(ctx, str) or not ctx:  # an ending's first token needs one before it
            die(f'{at}: its "ctx" is not a text, or is empty')
        if not isinstance(endings, list) or len(endings) != ENDINGS or not all(
                isinstance(ending, str) for ending in endings):
            die(f'{at}: its "endings" are not a list of {ENDINGS} texts')
        if type(label) is not int or not 0 <= label < ENDINGS:
            die(f'{at}: its "label" is {json.dumps(label)[:40]}, and not one of 0 to {ENDINGS - 1}')
        questions.append((number, ctx, endings, label))
    if not questions:
        die(f"{path} has no questions")
    if len(questions) > START:
        die(f"{path} has {len(questions)} questions, and the format holds {START}")
    return questions, hashlib.sha256(data).hexdigest()


def pack(path, questions, encoding):
    """The bytes of the result, and the most tokens that a context and one of its endings have together."""
    stream, most_bytes, most_tokens = array.array("H"), 0, 0
    for index, (number, ctx, endings, label) in enumerate(questions):
        context = encoding.encode_ordinary(ctx)
        completions = [encoding.encode_ordinary(" " + ending) for ending in endings]
        size = 2 * (5 + sum(1 + len(tokens) for tokens in (context, *completions)))
        if size >= 1 << 16:
            die(f"{path}, line {number}: makes {size} bytes of tokens, and the format holds {(1 << 16) - 1}")
        stream.extend([START, size, index, label, len(completions)])
        for tokens in (context, *completions):
            stream.append(len(tokens))
            stream.extend(tokens)
        most_bytes = max(most_bytes, size)
        most_tokens = max(most_tokens, len(context) + max(map(len, completions)))
    if sys.byteorder == "big":
        stream.byteswap()
    header = struct.pack("<256i", MAGIC, VERSION, len(questions), most_bytes, *[0] * 252)
    return header + stream.tobytes(), most_tokens


def main():
    p = Parser(description="Write HellaSwag's validation set, or questions like it, as GPT-2 tokens in llm.c's "
                           "format.")
    p.add_argument("file", nargs="?", metavar="FILE", help="a .jsonl file of questions (default: HellaSwag's, "
                                                           "which is fetched into DIR)")
    p.add_argument("--out", metavar="DIR", default=os.path.join(HERE, "hellaswag"),
                   help="folder for the result; made if missing (default: hellaswag next to this script)")
    p.add_argument("--vocab", metavar="vocab.bpe", help="OpenAI's merges, to work without a network")
    p.add_argument("--encoder", metavar="encoder.json", help="OpenAI's token ids, goes with --vocab")
    args = p.parse_args()
    if bool(args.vocab) != bool(args.encoder):
        die("--vocab and --encoder go together: give both or neither")
    if args.file and not args.file.endswith(".jsonl"):
        die(f"{args.file}: has to be a .jsonl file, with a question in each line")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        die(f"--out {args.out}: is a file, and has to be a folder")

    source = args.file or os.path.join(args.out, "hellaswag_val.jsonl")
    if not args.file:
        os.makedirs(args.out, exist_ok=True)
        get(source)
    questions, digest = read_questions(source)
    data, most_tokens = pack(source, questions, load_encoding(args.vocab, args.encoder))
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, os.path.basename(source)[:-len(".jsonl")] + ".bin")
    there = False
    if os.path.exists(path):
        with open(path, "rb") as f:
            there = f.read() == data
    if not there:
        put(path, data)
    print(f"{source}: sha256 {digest}, " + ("HellaSwag's validation set" if digest == SHA256
                                            else "which is not that of HellaSwag's validation set"))
    print(f"{path} is already there and correct," if there else f"wrote {path},",
          f"{len(questions)} questions, {len(data)} bytes; the longest, with one ending, has "
          f"{most_tokens} tokens")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        die(f"{e.filename or 'cannot read or write'}: {e.strerror or e}")
    except KeyboardInterrupt:
        die("interrupted; nothing was written in part, and the same command starts over")
