"""The tables of dev/scaling.md, from the constants below: python dev/scaling.py"""
import random
import struct

# Hidden parameters, wte and wpe, head, gains and biases; blocks; tokens/s of one H100, predicted and at best
MODELS = {name: (12 * L * C * C, (V + T) * C, V * C, 4 * L * C + 2 * C, L, rate, floor)
          for name, L, C, T, V, rate, floor in (("124M", 12, 768, 1024, 50304, 480e3, 850e3),
                                                ("1558M", 48, 1600, 1024, 50304, 47e3, 90e3))}
NODE = 8                            # GPUs of a node
NVLINK = 370e9                      # bytes/s of bus bandwidth in a node: NVIDIA's word for long messages
NIC = 46e9                          # bytes/s of a GPU's 400 Gb/s port, the lower end of NVIDIA's 46 to 48; line rate 50
CAUTIOUS = 200e9                    # bus bandwidth across nodes on a bad day
STARTS = {"Simple": (8.4, 3.4, 14), "LL": (6.6, 1.0, 2.7)}  # us: once, a step by NVLink, a step by network (NCCL's)
SHARE = 0.05                        # of a step that communication may take
STEPS, MICRO = (524288, 1048576), 16384  # tokens of all GPUs' step; of a micro-batch, where there are as many
HBM = 3e12                          # bytes/s of a GPU's memory, assumed

def busbw(R): return NVLINK if R <= NODE else min(NVLINK, NODE * NIC)
def transfer(size, R, bw=0): return size * (R - 1) / R / (bw or busbw(R))
def start(R, protocol="Simple"):
    once, near, far = STARTS[protocol]
    nodes = -(-R // NODE)
    return 1e-6 * (once + (R - nodes) * near + (nodes - 1) * far)
def sizes(name, gather, grad=4):    # bytes of the reduce-scatter, and of the gathers: codes, BF16, FP32
    (hidden, emb, head, norm), fp8 = MODELS[name][:4], gather == "FP8"
    return grad * (hidden + emb + head + norm), [hidden * fp8, 2 * (emb + head + hidden * (not fp8)), 4 * norm]
def starts(R): return 2 * start(R) + start(R, "LL")  # two groups of three calls, and one of 24 bytes
def all_of_it(name, R, gather="FP8", grad=4, bw=0):
    scatter, gathers = sizes(name, gather, grad)
    return transfer(scatter + sum(gathers), R, bw) + starts(R)
def exposed(name, R, tokens, grad=4):  # by block: wte and wpe wait, the rest if longer than its pass of a micro-batch
    (_, emb, _, _, L, rate, _), (scatter, gathers) = MODELS[name], sizes(name, "FP8", grad)
    over = [max(0, transfer(size, R) + L * start(R) - part * min(tokens, MICRO) / rate)
            for size, part in ((scatter - grad * emb, 2 / 3), (sum(gathers) - 2 * emb, 1 / 3))]
    return transfer((grad + 2) * emb, R) + 2 * start(R) + sum(over)
def share(seconds, tokens, rate): return seconds / (seconds + tokens / rate)
def enough(seconds, rate): return (1 / SHARE - 1) * seconds * rate
def most(name, cost, step):         # GPUs, a power of two, up to which communication stays under SHARE
    return max(R for R in (1, 8, 16, 32, 64, 128, 256, 512) if R == 1
               or share(cost(name, R, step / R), step / R, MODELS[name][5]) < SHARE)
def bf16(x):
    u, = struct.unpack("<I", struct.pack("<f", x))
    return struct.unpack("<f", struct.pack("<I", (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000))[0]
def ring_error(R, common, n=4000):  # RMS of a BF16 ring's error over the sum's RMS; common: what ranks share
    random.seed(1)
    error = total = 0
    for _ in range(n):
        shared, exact, ring = common * random.gauss(0, 1), 0, 0
        for _ in range(R):
            g = shared + random.gauss(0, 1)
            exact, ring = exact + g, bf16(ring + bf16(g))
        error, total = error + (ring - exact) ** 2, total + exact ** 2
    return (error / total) ** 0.5

print("| | gather | scatter, MB | gather, MB | 8 GPUs, ms | 64 GPUs, ms |\n" + "|---" * 6 + "|")
for name in MODELS:
    for gather in "BF16", "FP8":
        scatter, parts = sizes(name, gather)
        cells = " + ".join(f"{p / 1e6:.{int(p < 1e6)}f}" for p in parts if p)
        print(f"| {name} | {gather} | {scatter / 1e6:.0f} | {cells} |", " | ".join(
            f"{1e3 * transfer(scatter, R):.2f} + {1e3 * transfer(sum(parts), R):.2f} + {1e3 * starts(R):.2f} = "
            f"{1e3 * all_of_it(name, R, gather):.1f}" for R in (8, 64)), "|")
print("\n| | GPUs | bus, GB/s | 5 %: BF16 gather | FP8 gather | FP8, at best |",
      " | ".join(f"share of {s:,}" for s in STEPS), "|\n" + "|---" * 8 + "|")
for name in MODELS:
    for R, bw in (8, NVLINK), (64, busbw(64)), (64, CAUTIOUS):
        rate, best = MODELS[name][5:]
        need = [enough(all_of_it(name, R, g, 4, bw), r) for g, r in (("BF16", rate), ("FP8", rate), ("FP8", best))]
        print(f"| {name} | {R} | {bw / 1e9:.0f} |", " | ".join(f"{-(-n // 1024):.0f}" for n in need), "|", " | ".join(
            f"{100 * share(all_of_it(name, R, 'FP8', 4, bw), s / R, rate):.1f} %" for s in STEPS), "|")
held = [lambda m, R=R: (6 + 12 / R) * sum(m[:4]) for R in (1, 8, 64)]
print("\n| | one GPU | R = 8 | R = 64 |\n" + "|---" * 4 + "|\n| bytes a parameter |",
      " | ".join(f"{6 + 12 / R:.2f}" for R in (1, 8, 64)), "|")
for name, m in MODELS.items(): print(f"| {name} |", " | ".join(f"{of(m) / 1e9:.2f} GB" for of in held), "|")
print("\n| most GPUs (a power of two) under 5 % |", " | ".join(f"{n}, {s:,}" for n in MODELS for s in STEPS),
      "|\n" + "|---" * 5 + "|")
for text, cost in (("as it is", lambda n, R, t: all_of_it(n, R)), ("overlap by block", exposed),
                   ("BF16 gradients", lambda n, R, t: all_of_it(n, R, "FP8", 2))):
    print(f"| {text} |", " | ".join(str(most(n, cost, s)) for n in MODELS for s in STEPS), "|")
for name, m in MODELS.items():
    P = sum(m[:4])
    print(f"\n{name}: {P / 1e6:.1f} M parameters; a block's gradients {4e-6 * m[0] / m[4]:.0f} MB; optimizer "
          f"{28e3 * P / HBM:.1f} ms, transposing {2e3 * m[0] / HBM:.2f} ms; stage 2 at 8: {3.5e-9 * P:.1f} GB less, "
          f"{100 * share(transfer(4 * P, 8), MICRO, m[5]):.1f} % of every micro-batch")
slower = 7 / 8 / NVLINK + 7 / 64 / NIC - 63 / 64 / busbw(64)
saved = start(64) - start(8) - 1e-6 * (STARTS["Simple"][0] + 7 * STARTS["Simple"][2])
print(f"start: {1e6 * start(8):.0f} us at 8, {1e6 * start(64):.0f} at 64 ({1e6 * start(64, 'LL'):.0f}: LL); two levels "
      f"save {1e6 * saved:.0f}, lose {slower * 1e15:.0f} us a GB, even at {saved / slower / 1e6:.0f} MB")
print("a BF16 ring's error, ranks unrelated and alike:",
      ", ".join(f"R = {R}: {100 * ring_error(R, 0):.1f} % and {100 * ring_error(R, 1):.1f} %" for R in (8, 64)))
