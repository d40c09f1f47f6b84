#!/usr/bin/env python3
"""Breaks train_us.c or train_us.cu by rule and runs the tests on a sample of the mutants; dev/mutants.sh has those
chosen by hand, dev/mutants.md what survived. A survivor is as good as the source, or shows that a test is missing.

  dev/mutate.py train_us.c --list              the name of every mutant: file:line:column:rule:from->to
  dev/mutate.py train_us.c 100 --seed 1        the tests on 100 of them, the same ones for everybody
  dev/mutate.py train_us.c 400 --after 100     on 400 others: with the 100 before they are the first 500
  dev/mutate.py train_us.c --only WORD         on those whose name contains WORD; --print prints their sources instead
  dev/mutate.py train_us.c --again FILE        on those that are named in FILE, which may be what a run printed
  dev/mutate.py train_us.c 40 --minutes 5      on as many as that allows; --least 60 fails with a lower score (of 20)

JOBS (2) run at a time. Not counted: what does not compile, and what compiles to the same object code (as a branch for
another machine does). Caught is a mutant whose tests fail, crash, or take ten times as long; those of up to a second
run first, then those of up to fifteen. TESTS names the tests: all are the default for train_us.c, GPU_TESTS (below) for
train_us.cu, where TESTS= means all. train_us.c is built twice, the second time with the model of Intel's matrix unit;
train_us.cu runs on the emulator (make out/emu.o first), step_by_step with both orders of threads; then, where MPI is
there, as three ranks.
"""
import argparse, contextlib, os, random, re, shutil, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = "train_us.c", "train_us.cu", "test_us.c", "README.md", "LICENSE", "dev/debug_state.safetensors"
AMX_MODEL = "dev/cpu/amx_model.h"
RANKS = """OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 EMU_NCCL_SECONDS=20 OMP_NUM_THREADS=1 \
    mpirun --oversubscribe -np 3 """
GPU_TESTS = "large step_by_step same_bits next kept_rows not_finite overlay head_in_pieces validation gpu_"
TOKEN = re.compile(r"""(?P<skip>^[ \t]*\#(?:\\\n|[^\n])*|\n|[^\S\n]+|//[^\n]*|/\*.*?\*/)
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>(?:0[xX][\da-fA-F]+(?:\.[\da-fA-F]*)?(?:[pP][+-]?\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?)[uUlLfF]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<op><<<|>>>|<<=|>>=|->|\+\+|--|&&|\|\||[-+*/%&|^<>=!]=|<<|>>|::|.)""", re.X | re.S | re.M)
BINARY = {"+": "-*", "-": "+", "*": "/+", "/": "*", "%": "/", "&": "|", "|": "&", "^": "|", "<": ("<=", ">="),
          "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",), "<<": (">>",),
          ">>": ("<<",), "&&": ("||",), "||": ("&&",), "+=": ("-=", "="), "-=": ("+=",), "*=": ("/=", "="),
          "/=": ("*=",), "|=": ("=",), "^=": ("=",)}
COMPARE = {"<", "<=", ">", ">=", "==", "!="}
CONTROL = {"if", "while", "for", "switch", "sizeof", "return", "else", "do", "case", "default", "__attribute__"}
DECLARATION = re.compile(  # how one begins
    r"(static|const|extern|struct|enum|union|typedef|template|using|goto)\b|"
    r"(unsigned |signed )?(?!return)[A-Za-z_]\w*(<[\w, ]*>)?(\s+|\s*[*&]+\s*(const\s+)?)[A-Za-z_]\w*\s*[=;,\[({:]")


def read(file):
    with open(f"{ROOT}/{file}", encoding="utf-8") as f: return f.read()

def mutants(name, source):
    """All of them: (name, begin, end, replacement)."""
    tokens = [m for m in TOKEN.finditer(source) if m.lastgroup != "skip"]
    text, last = [m.group() for m in tokens] + [""], len(tokens)
    close, opened, found, declared, void, heads = {}, [], [], set(), set(), set()
    depth = [0] * (last + 1)  # braces around
    for i, t in enumerate(text):
        if t in ("(", "[", "{", "<<<"): opened.append(i)
        if t in (")", "]", "}", ">>>") and opened: close[opened.pop()] = i
    for i, end in ((i, end) for i, end in close.items() if text[i] == "{"):
        for k in range(i, end): depth[k] += 1
        if {"enum", "struct", "union"} & set(text[i - 2:i]): declared.update(range(i, end))
    for i, end in close.items():  # heads of functions and of control statements
        if text[i] == "(" and not depth[i] and re.match(r"\w", text[i - 1]) and text[end + 1] in ("{", ";"):
            declared.update(range(i, end))
            k = i - 2  # before a kernel's name: __launch_bounds__(...)
            if text[k] == ")": k = next(b for b in range(k, 0, -1) if close.get(b) == k) - 2
            if text[k] == "void" and text[end + 1] == "{": void.update(range(end + 1, close[end + 1]))
        if text[i] == "(" and text[i - 1] in ("if", "constexpr", "for", "while"): heads.update(range(i, end))
    def add(rule, begin, end, to):
        was, line = source[begin:end], source.count("\n", 0, begin) + 1
        a, b = (re.sub(r"\s+", " ", s if len(s) < 60 else s[:45] + "..." + s[-12:]) for s in (was, to))
        column = begin - source.rfind("\n", 0, begin)
        to += "\n" * (was.count("\n") - to.count("\n"))  # __LINE__ stays
        if was != to: found.append((f"{name}:{line}:{column}:{rule}:{a}->{b}", begin, end, to))
    def parts(i, end, separator=","):  # tokens i to end - 1, separated: the first and last one of each
        begins, k = [i], i
        while k < end:
            k = close.get(k, k) + 1
            if text[k - 1] == separator: begins.append(k)
        return list(zip(begins, [k - 2 for k in begins[1:]] + [end - 1]))
    def until(k, *stops):  # the next of them that is not in parentheses, or of an inner ?:
        inner = 0
        while k < last and (text[k] not in stops or inner and text[k] == ":") and text[k] not in (")", "]", "}"):
            inner += (text[k] == "?") - (text[k] == ":")
            k = close.get(k, k) + 1
        return k
    at, upto = [m.start() for m in tokens].__getitem__, [m.end() for m in tokens].__getitem__
    def words(i, end): return source[at(i):upto(end)]
    for i, t in enumerate(text[:-1]):
        if i in declared: continue
        kind, before, after, end = tokens[i].lastgroup, text[i - 1] if i else "", text[i + 1], close.get(i, i)
        spaced = source[at(i) - 1].isspace() and source[upto(i)].isspace()  # as clang-format leaves what is binary
        if kind == "op" and spaced and before != "template":
            rule = "logical" if t in ("&&", "||") else "compare" if t in COMPARE else "operator"
            for to in BINARY.get(t, ()): add(rule, at(i), upto(i), to)
        if t == "!" or t == "-" and not spaced: add("dropped", at(i), upto(i), "")
        if t in ("++", "--"): add("step", at(i), upto(i), "--" if t == "++" else "++")
        if kind == "number" and before != "case":
            hexadecimal = t[:2] in ("0x", "0X")
            body = t.rstrip("uUlL" if hexadecimal and "p" not in t else "uUlLfF")
            statement = source[max(source.rfind(c, 0, at(i)) for c in ";{}") + 1:at(i)].lstrip()
            if re.search("[.p]" if hexadecimal else "[.e]", body):
                zero = not (float.fromhex if hexadecimal else float)(body)
                add("constant", at(i), upto(i), t.replace("0", "1", 1) if zero else f"(2 * {t})")
            elif not (before == "[" and after == "]" and "=" not in statement and DECLARATION.match(statement)):
                n = int(body, 0 if hexadecimal or body[0] != "0" else 8)
                for to in {0: (1,), 1: (0, 2)}.get(n, (n + 1,)):
                    add("constant", at(i), upto(i), (hex(to) if hexadecimal else str(to)) + t[len(body):])
        if t == "[" and depth[i] and re.match(r"[\w\])]", before) and end > i + 1 + after[0].isdigit():
            for by in "+-": add("index", at(i), upto(end), f"[({source[upto(i):at(end)]}) {by} 1]")
        if t == "(" and depth[i] and end > i + 1:
            for to in {"if": "01", "constexpr": "01", "while": "0"}.get(before, ""):
                add("condition", upto(i), at(end), to)
            if before == "for":
                for a, b in parts(i + 1, end, ";")[1:2]: add("condition", at(a), max(at(a), upto(b)), "0")
            elif re.match(r"\w", before) and before not in CONTROL:
                p = parts(i + 1, end)
                for (a, b), (c, d) in zip(p, p[1:]):
                    add("swap", at(a), upto(d), words(c, d) + source[upto(b):at(c)] + words(a, b))
        if t == "?" and depth[i]:
            k = until(i + 1, ":")
            e = until(k + 1, ":", ",", ";")
            add("branch", at(i + 1), upto(k - 1), f"({words(k + 1, e - 1)})")
            add("branch", at(k + 1), upto(e - 1), f"({words(i + 1, k - 1)})")
        # What begins a statement: a word or * behind another, a brace, or the head of a control statement.
        head, block = before == ")" and i - 2 in heads and i - 1 not in heads, before in (";", "{", "}")
        if not depth[i] or i in heads or not (block or head or before in ("else", "do")): continue
        end = until(i, ";")
        if not (kind == "name" or t in ("*", "(", "++", "--")) or t == "else": continue
        if text[end] != ";" and t not in CONTROL: continue
        if i in void and block: add("return", at(i), at(i), "return; ")
        if t in CONTROL and (t != "return" or end > i + 1) or DECLARATION.match(words(i, end)): continue
        add("deleted", at(i), upto(end - 1), "")
        for (_, a), (_, b) in zip(parts(i, end), parts(i, end)[1:]): add("deleted", upto(a), upto(b), "")
        for _, (a, _) in zip("1", parts(i, end)[1:]): add("deleted", at(i), at(a), "")
    return found

RUNNING = set()  # groups of processes

def stop(directory):
    for group in list(RUNNING):
        with contextlib.suppress(ProcessLookupError): os.killpg(group, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)

def call(command, where, seconds):
    """Exit status (None: it took too long) and output; nothing that it started stays."""
    with open(where + "/log.txt", "w+b") as log:
        p = subprocess.Popen("ulimit -v 16000000; ulimit -f 400000; " + command, shell=True, cwd=where, stdout=log,
                             stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                             env=dict(os.environ, TMPDIR=where))
        RUNNING.add(p.pid)
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired): status = p.wait(seconds)
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        RUNNING.discard(p.pid)
        p.wait(), log.seek(0)
        return status, log.read().decode(errors="replace")

class Trainer:
    """The unbroken one, built in each way that counts: command, object code, its tests in stages, fast ones first."""
    def __init__(self, file, source, directory):
        self.file, self.source, self.directory, self.builds = file, source, directory, []
        self.copy = directory + "/copy"  # who edits the tree meanwhile changes nothing here
        for f in FILES + ("out/emu.o" if file.endswith(".cu") else AMX_MODEL,):
            os.makedirs(os.path.dirname(f"{self.copy}/{f}"), exist_ok=True)
            shutil.copy(f"{ROOT}/{f}", f"{self.copy}/{f}")
        shutil.copytree(f"{ROOT}/dev/emu", self.copy + "/dev/emu")
        emu, gpu = self.copy + "/dev/emu", file.endswith(".cu")
        tests = os.environ.get("TESTS", GPU_TESTS if gpu else "")
        if gpu:
            compiles = f"""sed -E -f {emu}/cuda.sed train_us.cu >cuda.cpp && g++ -std=gnu++17 -O1 -march=native \
                -w -I{emu} -I. '-DUS_SOURCE="cuda.cpp"' %s -x c++ -c test_us.c"""
            links = f"g++ test_us.o {self.copy}/out/emu.o -fopenmp "
            self.add(compiles % "", links, tests)
            if not shutil.which("mpirun"): return
            flags = subprocess.run(["mpicc", "-show"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            heads, libraries = (" ".join(f for f in flags if f[:2] in some) for some in (("-I",), ("-L", "-l")))
            self.add(compiles % ("-DUS_MPI " + heads), links + libraries, "ranks_agree ranks_follow", RANKS)
        else:
            compiles, links = "gcc -std=gnu11 -O1 -w %s -c test_us.c", "gcc test_us.o -lm"
            ran = self.add(compiles % "", links, tests)
            some = " ".join(t for t in ("matmul", "gradients", "oracle") if t in ran)
            if some: self.add(compiles % f"-include {self.copy}/{AMX_MODEL}", links, some)

    def add(self, compiles, links, tests, starts="OMP_NUM_THREADS=1 "):
        where, test, stages = f"{self.directory}/unbroken{len(self.builds)}", starts + "./test_us -x ", []
        command = f"{compiles} && {links} -o test_us && objcopy -x test_us.o"
        built = self.build(where, command, self.source)
        def run(command):
            status, log = call(command, where, 3600)
            if status != 0: sys.exit("the unbroken trainer fails its tests:\n" + log[-2000:])
            return {n: float(t) for n, t in re.findall(r"^(\w+) +\d+ passed, 0 failed +([\d.]+) s$", log, re.M)}
        times = run(test + tests)
        for low, high in (-1, 1), (1, 15), (15, 1e9):
            some = {n: t for n, t in times.items() if low < t <= high}
            if some: stages.append((test + " ".join(some), 10 * sum(some.values()) + 10))
        again = f"EMU_SEED=1 {test} step_by_step"
        if "step_by_step" in times: stages.append((again, 10 * sum(run(again).values()) + 10))
        self.builds.append((command, built, stages))
        print(f"unbroken: {len(times)} tests, {sum(times.values()):.0f} s", flush=True)
        return times

    def build(self, where, command, source):
        """The object code, or None."""
        os.makedirs(where + "/dev")
        for f in FILES: shutil.copy(f"{self.copy}/{f}", f"{where}/{f}")
        with open(f"{where}/{self.file}", "w", encoding="utf-8") as f: f.write(source)
        if call(command, where, 300)[0] != 0: return None
        with open(where + "/test_us.o", "rb") as f: return f.read()

    def run(self, number, mutant, until):
        start, says = time.time(), "same object"
        if start > until: return "late"
        for k, (command, unbroken, stages) in enumerate(self.builds):
            where = f"{self.directory}/{number}.{k}"
            built = self.build(where, command, self.source[:mutant[1]] + mutant[3] + self.source[mutant[2]:])
            if built is None: says = "no build"
            elif built != unbroken: says = self.test(where, stages, until)
            shutil.rmtree(where, ignore_errors=True)
            if says[0] in "ncl": break
        print(f"{says:24} {time.time() - start:5.1f} s  {mutant[0]}", flush=True)
        return says.split()[0]

    def test(self, where, stages, until):
        for command, seconds in stages:
            left = max(1, until + 60 - time.time())
            status, log = call(command, where, min(seconds, left))
            if status == 0: continue
            if status is None and left < seconds: return "late"
            by = re.findall(r"^(\w+) +\d+ passed, [1-9]\d* failed", log, re.M)
            before = (re.findall(r"^(\w+) +\d+ passed, 0", log, re.M) or ["the start"])[-1]
            return f"caught by {by[0] if by else ('time' if status is None else 'crash') + ' after ' + before}"
        return "SURVIVED"

def main():
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=FILES[:2]), parser.add_argument("number", type=int, nargs="?")
    for name, default in ("seed", 1), ("after", 0), ("only", ""), ("again", ""):
        parser.add_argument("--" + name, default=default, type=type(default))
    parser.add_argument("--minutes", type=float, default=1e6), parser.add_argument("--least", type=float, default=0)
    for name in "list", "print": parser.add_argument("--" + name, action="store_true")
    a = parser.parse_args()
    source = read(a.file)
    some = [m for m in mutants(a.file, source) if a.only in m[0]]
    if a.again:
        with open(a.again, encoding="utf-8") as f: named = f.read()
        some = [m for m in some if m[0] in named]
    if not some: sys.exit(f"no mutant of {a.file} has such a name (names have line numbers: those of another version?)")
    if a.number:  # by the words and their line, not by its number: most of a sample survives a change of the source
        lines, seen = source.splitlines(), {}
        def draw(m):
            words = lines[source.count("\n", 0, m[1])].strip() + m[0].split(":", 3)[3]
            seen[words] = seen.get(words, 0) + 1
            return random.Random(f"{a.seed} {words} {seen[words]}").random()
        some.sort(key=draw)
    some = some[a.after:a.after + (a.number or len(some))]
    if a.list or a.print:
        return print("\n".join(m[0] if a.list else source[:m[1]] + m[3] + source[m[2]:] for m in some))
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        for end in signal.SIGINT, signal.SIGTERM: signal.signal(end, lambda *_: stop(directory))
        until, trainer = time.time() + 60 * a.minutes, Trainer(a.file, source, directory)
        says = list(pool.map(trainer.run, range(len(some)), some, [until] * len(some)))
    for m in (m for m, how in zip(some, says) if how == "SURVIVED"):
        print(f"{m[0]}\n    {source.splitlines()[source.count(chr(10), 0, m[1])].strip()}")
    caught, survived, same, none, late = (says.count(k) for k in ("caught", "SURVIVED", "same", "no", "late"))
    score = 100 * caught / max(1, caught + survived)
    print(f"{caught} caught, {survived} survived, {same} same, {none} no build, {late} not run: score {score:.1f} %")
    return caught + survived >= 20 and score < a.least  # of fewer a score says little

if __name__ == "__main__": sys.exit(main())
