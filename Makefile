# make            the trainer                     make test    all tests
# make train      train on this project's sources  make bench   speed, and where the time goes
# make CC=clang   another compiler; make OMP= builds without OpenMP
CC ?= gcc
ifeq ($(origin CC),default)
CC := gcc
endif

# The machine's own instructions; vectors as wide as its registers (matmul's tile counts on it).
NATIVE := $(if $(filter arm64 aarch64,$(shell uname -m)),-mcpu=native,-march=native)
WIDE   := $(if $(filter x86_64,$(shell uname -m)),-mprefer-vector-width=512)
# Two of -ffast-math's members that change no result here: nobody reads floating-point exceptions or errno.
# The rest of it stays off: it would let NaN pass the tests.
FLOATS := -fno-trapping-math -fno-math-errno -ffp-contract=fast
WARN    = -Wall -Wextra -Wno-unknown-pragmas -Wno-pass-failed $(WERROR)

# OpenMP where it is there: gcc has it, clang may lack its library, Apple's clang finds it with Homebrew's libomp.
BREW   := $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp)
TRY     = $(shell echo 'int main(void){return 0;}' | $(CC) -x c - $(1) -o /dev/null 2>/dev/null && echo '$(1)')
OMP    ?= $(or $(call TRY,-fopenmp),$(and $(BREW),$(call TRY,-Xclang -fopenmp -I$(firstword $(BREW))/include -L$(firstword $(BREW))/lib -lomp)))

CFLAGS ?= -O3 $(NATIVE) $(WIDE)
BUILD   = $(CC) -std=gnu11 $(CFLAGS) $(FLOATS) $(WARN) $(OMP)

all: train_us

# Another compiler or other flags than last time: build again.
.flags: FORCE
	@echo '$(BUILD)' | cmp -s - $@ || echo '$(BUILD)' >$@

train_us: train_us.c .flags
	$(BUILD) train_us.c -o $@ -lm

test_us: test_us.c train_us.c .flags
	$(BUILD) test_us.c -o $@ -lm

bench_us: dev/bench.c train_us.c .flags
	$(BUILD) dev/bench.c -o $@ -lm

test: test_us
	./test_us

# The text of `make train` is this project itself: no download.
out/self.txt: train_us.c test_us.c README.md Makefile dev/reference.py
	@mkdir -p out
	cat $^ >$@

train: train_us out/self.txt
	rm -rf out/train
	./train_us --input out/self.txt --out out/train --stats-every 1500

bench: bench_us
	./bench_us

# Breaks the trainer in named ways, one at a time, and shows that the tests catch each.
mutants: test_us
	dev/mutants.sh

# The same tests under the address and undefined-behaviour sanitizers.
sanitize:
	$(CC) -std=gnu11 -O2 -g $(NATIVE) $(FLOATS) $(WARN) $(OMP) -fsanitize=address,undefined -fno-sanitize-recover=all \
	  test_us.c -o test_us_sanitized -lm
	./test_us_sanitized

clean:
	rm -rf train_us test_us test_us_sanitized bench_us out .flags

.PHONY: all test train bench mutants sanitize clean FORCE
