# make              the CPU trainer                  make test     all tests, of what this machine has
# make train        train on this project's sources  make bench    speed on the CPU, and where the time goes
# make train_us_cuda    the GPU trainer (needs the CUDA Toolkit); make gpu: all there is to try and time on a GPU
# make train_us_emu     the GPU trainer on a CPU (dev/emu); make -C dev/cuda check: its kernels, version by version
# make paper        the claims of the papers, measured: dev/paper (an hour; python dev/paper/run.py --list)
# make train_us_cuda MPI=1, make train_us_emu MPI=1    for several GPUs, or emulated ones: mpirun -np 2 ./train_us_emu
# make CC=clang   another compiler; make OMP= builds without OpenMP
CC ?= gcc
ifeq ($(origin CC),default)
CC := gcc
endif
# The C++ compiler of the same make, for the emulator.
CXX := $(if $(findstring clang,$(CC)),clang++,g++)

# The machine's own instructions; vectors as wide as its registers (matmul's tile counts on it).
NATIVE := $(if $(filter arm64 aarch64,$(shell uname -m)),-mcpu=native,-march=native)
WIDE   := $(if $(filter x86_64,$(shell uname -m)),-mprefer-vector-width=512)
# Two of -ffast-math's members that change no result here: nobody reads floating-point exceptions or errno.
# The rest of it stays off: it would let NaN pass the tests.
FLOATS := -fno-trapping-math -fno-math-errno -ffp-contract=fast
WARN    = -Wall -Wextra -Wno-unknown-pragmas -Wno-missing-field-initializers $(if $(findstring clang,$(CC)),-Wno-pass-failed) $(WERROR)

# OpenMP where it is there: gcc has it, clang may lack its library, Apple's clang finds it with Homebrew's libomp.
BREW   := $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp)
TRY     = $(shell echo 'int main(void){return 0;}' | $(CC) -x c - $(1) -o /dev/null 2>/dev/null && echo '$(1)')
OMP    ?= $(or $(call TRY,-fopenmp),$(and $(BREW),$(call TRY,-Xclang -fopenmp -I$(firstword $(BREW))/include -L$(firstword $(BREW))/lib -lomp)))

CFLAGS ?= -O3 $(NATIVE) $(WIDE)
BUILD   = $(CC) -std=gnu11 $(CFLAGS) $(FLOATS) $(WARN) $(OMP)

all: train_us

# Another compiler or other flags than last time: build again.
.flags:      WITH = $(BUILD)
.flags_cuda: WITH = $(CUDA)
.flags_emu:  WITH = $(CPP) $(EMU_O) $(LAB_O)
.flags .flags_cuda .flags_emu: FORCE
	@echo '$(WITH)' | cmp -s - $@ || echo '$(WITH)' >$@

train_us: train_us.c .flags
	$(BUILD) train_us.c -o $@ -lm

test_us: test_us.c train_us.c .flags
	$(BUILD) test_us.c -o $@ -lm

# The same with Intel's matrix unit in plain C, for machines without one.
test_us_amx: test_us.c train_us.c dev/cpu/amx_model.h .flags
	$(BUILD) -include dev/cpu/amx_model.h test_us.c -o $@ -lm

dev/cpu/matmul: dev/cpu/matmul.c dev/cpu/peak.h train_us.c .flags
	$(BUILD) $< -o $@ -lm

bench_us: dev/bench.c dev/cpu/peak.h train_us.c .flags
	$(BUILD) dev/bench.c -o $@ -lm

# ---- MPI=1: a process a GPU. What mpicc would add is added; NCCL's header lies with the CUDA Toolkit's, or the system's.
ifeq ($(MPI),1)
ifeq ($(shell command -v mpicc),)
$(error MPI=1 needs an MPI: mpicc is not found (Debian: apt install libopenmpi-dev openmpi-bin))
endif
RANKS := -DUS_MPI $(filter -I%,$(shell mpicc -show))
MPI_LIBS := $(filter -L% -l%,$(shell mpicc -show))
endif

# ---- The GPU trainer. ARCH: the card in this machine, or sm_80, sm_90, ... for another.
NVCC  ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc),nvcc)
ARCH  ?= native
comma := ,
space := $(subst ,, )
# (nvcc hands its host compiler other text than ours: parentheses gone, lifetimes hidden.)
HOST   = -O3 $(NATIVE) $(FLOATS) $(WARN) -Wno-unused-function -Wno-parentheses -Wno-dangling-pointer -fopenmp
NO_NCCL = MPI=1 needs NCCL: nccl.h is not found (from the CUDA repository: apt install libnccl2 libnccl-dev)
CUDA_LIBS = -lcublasLt $(if $(RANKS),$(MPI_LIBS) -lnccl)
CUDA   = $(NVCC) -std=c++17 -O3 -arch=$(ARCH) $(if $(WERROR),-Werror all-warnings) $(RANKS) -Xcompiler $(subst $(space),$(comma),$(strip $(HOST)))
GPU    = train_us.cu train_us.c .flags_cuda

train_us_cuda: $(GPU)
	@$(if $(RANKS),echo '#include <nccl.h>' | $(NVCC) -x cu -E - >/dev/null 2>&1 || { echo '$(NO_NCCL)'; exit 1; })
	$(CUDA) train_us.cu -o $@ $(CUDA_LIBS)

test_us_cuda: test_us.c $(GPU)
	$(CUDA) -x cu -DUS_SOURCE=\"train_us.cu\" test_us.c -o $@ $(CUDA_LIBS)

bench_gpu: dev/bench_gpu.cu dev/cuda/bench.h dev/sizes.h $(GPU)
	$(CUDA) dev/bench_gpu.cu -o $@ $(CUDA_LIBS)

# The names of cuBLASLt's tiles and stages are in its header only (where that is not found, numbers do).
LT_HEADER = $(dir $(NVCC))../include/cublasLt.h
probe_gpu: dev/probe_gpu.cu dev/sizes.h $(GPU)
	@mkdir -p out
	-sed -n 's/.*_TILE_\([0-9]*x[0-9]*\) *= *\([0-9]*\),.*/{\2, "\1"},/p' $(LT_HEADER) >out/tiles.h
	-sed -n 's/.*_STAGES_\([0-9]*x[0-9A-Z]*\) *= *\([0-9]*\),.*/{\2, "\1"},/p' $(LT_HEADER) >out/stages.h
	$(CUDA) dev/probe_gpu.cu -o $@ -lcublasLt

gpu:
	dev/gpu.sh
gpu_probe gpu_test gpu_bench gpu_ranks:
	dev/gpu.sh $(@:gpu_%=%)

# ---- The same source on a CPU: sed makes C++ of it, dev/emu has what the CUDA Toolkit has.
EMU   := $(wildcard dev/emu/*.cpp dev/emu/*.h) .flags_emu
CPP    = $(CXX) -std=gnu++17 -g $(NATIVE) $(FLOATS) $(WARN) -Wno-unused-function $(OMP) -Idev/emu -I. $(RANKS)
EMU_O ?= -O2

out/%.cpp: %.cu dev/emu/cuda.sed
	@mkdir -p $(@D)
	(echo '#line 1 "$<"'; sed -E -f dev/emu/cuda.sed $<) >$@

out/emu.o: dev/emu/emu.cpp $(EMU)
	@mkdir -p $(@D)
	$(CPP) -O2 -c dev/emu/emu.cpp -o $@

train_us_emu: out/train_us.cpp out/emu.o train_us.c $(EMU)
	$(CPP) $(EMU_O) out/train_us.cpp out/emu.o -o $@ $(MPI_LIBS)

test_us_emu: test_us.c out/train_us.cpp out/emu.o train_us.c $(EMU)
	$(CPP) $(EMU_O) -x c++ '-DUS_SOURCE="out/train_us.cpp"' test_us.c -x none out/emu.o -o $@ $(MPI_LIBS)

# What `make gpu` measures with, on a model so small that the emulator shows in seconds that it works.
out/bench_gpu_emu: out/dev/bench_gpu.cpp out/dev/cuda/bench.h out/dev/sizes.h out/train_us.cpp out/emu.o train_us.c $(EMU)
	$(CPP) -O1 '-DUS_SOURCE="out/train_us.cpp"' $< out/emu.o -o $@ $(MPI_LIBS)
bench_gpu_emu: out/bench_gpu_emu
	OMP_NUM_THREADS=1 out/bench_gpu_emu tiny
out/probe_gpu_emu: out/dev/probe_gpu.cpp out/dev/sizes.h out/train_us.cpp out/emu.o train_us.c $(EMU)
	$(CPP) -O1 '-DUS_SOURCE="out/train_us.cpp"' $< out/emu.o -o $@
probe_gpu_emu: out/probe_gpu_emu
	out/probe_gpu_emu

# Builds in which a mistake shows: out-of-bounds accesses and undefined behaviour; races between threads. Only what
# comes from CUDA is compiled for the race checker, which takes the place of the thread sanitizer's library.
CHECK  = -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
EMU_TEST = -x c++ '-DUS_SOURCE="out/train_us.cpp"' test_us.c -x none
test_us_emu_asan: test_us.c out/train_us.cpp train_us.c $(EMU)
	$(CPP) -O1 $(CHECK) $(EMU_TEST) dev/emu/emu.cpp -o $@
test_us_emu_race: test_us.c out/train_us.cpp out/emu.o train_us.c $(EMU)
	$(CPP) -fno-openmp -O2 -fsanitize=thread -c $(EMU_TEST) -o out/race.o
	$(CPP) -O2 out/race.o out/emu.o dev/emu/race.cpp -o $@

# The emulator's own tests, with bugs planted for each kind of check.
out/test_emu%: out/dev/emu/test_emu.cpp out/emu.o train_us.c $(EMU)
	$(CPP) -O2 $< out/emu.o -o out/test_emu
	$(CPP) -O1 $(CHECK) $< dev/emu/emu.cpp -o out/test_emu_asan
	$(CPP) -fno-openmp -O2 -fsanitize=thread -c $< -o out/test_emu_race.o
	$(CPP) -O2 out/test_emu_race.o out/emu.o dev/emu/race.cpp -o out/test_emu_race
test_emu: out/test_emu_race
	out/test_emu && out/test_emu_asan && out/test_emu_race
	EMU_SEED=1 out/test_emu none >out/test_emu.txt 2>&1 || { cat out/test_emu.txt; exit 1; }

# Several ranks: NCCL's stand-in, then the trainer as a user starts it, and test_us.c's tests of many.
out/test_nccl: out/dev/emu/test_nccl.cpp out/emu.o $(EMU)
	$(CPP) -O2 $< out/emu.o -o $@ $(MPI_LIBS)
test_nccl: out/test_nccl
	dev/emu/test_nccl.sh
test_ranks:
	dev/ranks.sh

# ---- The kernel lab: dev/cuda/Makefile is its front. Kernels alone build three times as fast.
LAB  := $(wildcard dev/cuda/*.h)
dev/cuda/%: dev/cuda/%.cu $(LAB) $(GPU)
	$(CUDA) -DUS_KERNELS_ONLY $< -o $@ -lcublasLt

out/%.h: %.h dev/emu/cuda.sed
	@mkdir -p $(@D)
	(echo '#line 1 "$<"'; sed -E -f dev/emu/cuda.sed $<) >$@
LAB_O ?= -O1
LAB_EMU = $(CPP) $(LAB_O) -DUS_KERNELS_ONLY '-DUS_SOURCE="out/train_us.cpp"'
out/cuda/%: out/dev/cuda/%.cpp $(LAB:%=out/%) out/train_us.cpp train_us.c $(EMU)
	@mkdir -p $(@D)
	$(LAB_EMU) $(CHECK) $< dev/emu/emu.cpp -o $@
out/cuda/race/%: out/dev/cuda/%.cpp $(LAB:%=out/%) out/train_us.cpp out/emu.o train_us.c $(EMU)
	@mkdir -p $(@D)
	$(LAB_EMU) -fno-openmp -fsanitize=thread -c $< -o $@.o
	$(CPP) $@.o out/emu.o dev/emu/race.cpp -o $@

# ---- Tests
test: test_us test_us_amx test_us_emu
	@dev/test.sh

# The text of `make train` is this project itself: no download. It is written once, so that a run that was interrupted
# goes on with the same text; `make clean` deletes both.
out/self.txt: | train_us.c test_us.c README.md Makefile dev/reference.py
	@mkdir -p out
	cat $| >$@.new && mv $@.new $@

train: train_us out/self.txt
	./train_us --input out/self.txt --out out/train --stats-every 1500 --resume

# Then the same shapes in turns with PyTorch, where PYTHON has it, and with llm.c, where LLMC is a checkout of it.
PYTHON ?= python3
bench: bench_us $(if $(LLMC),out/bench_llmc)
	./bench_us
	@if command -v $(PYTHON) >/dev/null; then $(PYTHON) dev/bench_torch.py $(if $(LLMC),--llmc out/bench_llmc); \
	else echo '$(PYTHON) is not there: `make bench PYTHON=` one with PyTorch compares with it'; fi

# By make's own rule for a program, but in llm.c's folder and with its Makefile's flags.
out/bench_llmc: dev/bench_llmc.c FORCE
	@mkdir -p out
	cp $< $@.c
	MAKEFLAGS= $(MAKE) -s -C $(LLMC) CC='$(CC)' CPPFLAGS=-I. $(CURDIR)/$@ >/dev/null

# Needs the text of data/tinyshakespeare.sh, and matplotlib for the pictures. What is done already is not done again.
paper: train_us
	python3 dev/paper/run.py all

# Breaks the trainers in named ways, one at a time, and shows that the tests catch each; then by rule: dev/mutants.md.
mutants: test_us out/emu.o
	dev/mutants.sh
	dev/mutate.py train_us.c 400
	dev/mutate.py train_us.cu 200

# The tests under the address and undefined-behaviour sanitizers, and the CUDA source's under the race checker too. (Of
# leaks one is let pass: a checkpoint's setting that a flag replaces stays in memory, a few bytes, until the end.)
sanitize: export LSAN_OPTIONS = suppressions=$(CURDIR)/out/leaks:print_suppressions=0
sanitize:
	@mkdir -p out
	echo leak:copied >out/leaks
	$(CC) -std=gnu11 -O2 $(NATIVE) $(FLOATS) $(WARN) $(OMP) $(CHECK) test_us.c -o test_us_sanitized -lm
	./test_us_sanitized $(SANITIZED)
	$(CC) -std=gnu11 -O2 $(NATIVE) $(FLOATS) $(WARN) $(OMP) $(CHECK) -include dev/cpu/amx_model.h test_us.c -o test_us_sanitized -lm
	./test_us_sanitized matmul gradients
sanitize_emu: test_us_emu_asan test_us_emu_race
	OMP_NUM_THREADS=1 ./test_us_emu_asan step_by_step next not_finite oracle
	./test_us_emu_race next not_finite

# What reads files from elsewhere, under clang's coverage-guided fuzzer: SECONDS for each reader.
SECONDS ?= 30
fuzz_us: dev/fuzz.c train_us.c
	clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all dev/fuzz.c -o $@ -lm
fuzz: fuzz_us
	for r in safetensors:5120 shards:1100 tokenizer:1600 settings:512; do mkdir -p out/fuzz/$${r%:*} && \
	FUZZ=$${r%:*} ./fuzz_us out/fuzz/$${r%:*} -max_len=$${r#*:} -max_total_time=$(SECONDS) -verbosity=0 \
	  -artifact_prefix=out/fuzz/$${r%:*}- -print_final_stats=1 || exit 1; done

clean:
	rm -rf train_us fuzz_us train_us_emu train_us_cuda test_us test_us_amx test_us_sanitized test_us_emu test_us_emu_asan \
	  test_us_emu_race test_us_cuda test_us_plain bench_us bench_gpu probe_gpu out .flags .flags_cuda .flags_emu \
	  dev/cpu/matmul $(basename $(wildcard dev/cuda/*.cu))

.PHONY: all test test_emu test_nccl test_ranks train bench paper mutants fuzz sanitize sanitize_emu gpu gpu_probe gpu_test gpu_bench gpu_ranks bench_gpu_emu probe_gpu_emu clean FORCE
.SECONDARY:
