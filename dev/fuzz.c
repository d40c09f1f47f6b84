/*
fuzz.c: files from elsewhere, made up by clang's libFuzzer, which goes on with those that reach new code.

  clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all dev/fuzz.c -o fuzz_us -lm
  FUZZ=READER ./fuzz_us DIR -max_len=N -max_total_time=SECONDS   DIR has the files; the first are made here
  FUZZ=READER ./fuzz_us FILE                                     one of them again, as a crash leaves it

READER and N: safetensors 5120 (a checkpoint, until its tensors are in a model), shards 1100 (or any text),
tokenizer 1600 (and a prompt, in unused bytes of its header), settings 512 (a checkpoint's, a line each: a
byte that picks the option, its value; and flags, --NAME=VALUE). Besides what the sanitizers see: what is
written and read again is the same, a prompt's tokens are known ones, and no output can steer a terminal.
*/
#define _GNU_SOURCE
#include <fcntl.h>
#include <glob.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// In place of the file system: each file is the input, and what is written stays in memory. No system call
// slows it, and a map is a copy as long as the file: a read behind its end is seen. Three files match '*';
// the second is the input's first 1024 bytes with 0 in place of a shard's count: a shard without tokens.
static struct { const char* data; char* out; size_t size, out_size; void* maps[3]; int num_maps; } file;
static char* three[] = {"1.bin", "2.bin", "3.bin"};
static void* map(size_t size, int fd) {
    char* copy = file.maps[file.num_maps++] = memcpy(malloc(size), file.data, size);
    if (fd && size >= 12) memset(copy + 8, 0, 4);
    return copy;
}
static int no_open(const char* path, int flags) { return (void)flags, *path == '2'; }
static int no_close(int fd) { return fd & 0; }
#define open no_open
#define close no_close
#define fsync(fd) no_close(fd)
#define fstat(fd, st) ((st)->st_mode = S_IFREG, (st)->st_size = min_l(file.size, fd ? 1024 : file.size), 0)
#define mmap(at, size, protection, flags, fd, offset) map(size, fd)
#define fopen(path, mode) ((void)(path), open_memstream(&file.out, &file.out_size))
#define rename(from, to) 0
#define strcpy(to, s) kept_copy(to, s)
#define access(path, mode) (*(path) == '*' ? -1 : 0)
#define glob(pattern, flags, error, found) ((found)->gl_pathc = 3, (found)->gl_pathv = three, flags)
#define globfree(found) ((void)0)
static char* copies[256];  // freed together
static int num_copies;
static char* kept_copy(char* to, const char* s) {
    if (num_copies == 256) abort();
    return copies[num_copies++] = memcpy(to, s, strlen(s) + 1);
}
static jmp_buf refused;
#define exit(status) longjmp(refused, status)  // what is refused ends the program
#define US_NO_MAIN
#include "../train_us.c"

static enum { SAFETENSORS, SHARDS, TOKENIZER, SETTINGS, READERS } reader;
static const char* const NAMES[] = {"safetensors", "shards", "tokenizer", "settings"};
static Archive archive, again;
static Writer writer;
static Model model;
static Tokens tokens;
static Text text;
static int must;  // to refuse what is read now is a mistake
static char* printed;
static size_t num_printed;

static void demand(int good, const char* what) {
    if (!good) dprintf(2, "fuzz: %s\n", what), abort();  // stderr is the trainer's
}

static void read_safetensors(void) {
    char* none = "";
    Config c;
    archive_read(&archive, "input");
    config_parse(&c, 1, &none, &archive, 0);
    c.vocab = (int)checkpoint_number(&archive, "vocab", 65536);
    config_defaults(&c);
    model_layout(&model, &c);
    if (model.num_params > 1 << 14) return;  // no such model is in a file of this size
    model_alloc_params(&model, c.steps & 1);
    checkpoint_load(&model, &CPU, &archive, c.steps & 2 ? lasting(&model) : 1);
    must = 1;
    demand(checkpoint_save(&model, &CPU, "output") == 0, "a model that was read cannot be written");
    file.data = file.out, file.size = file.out_size;
    archive_read(&again, "output");
    for (const Tensor* t = model.tensors; t < model.tensors + model.num_tensors; t++) {
        const float *x = model.params + t->offset, *y = archive_find(&again, t->name, t->rows, t->cols);
        for (long i = 0; i < t->rows * t->cols; i++)
            demand(y[i] == (model.training ? x[i] : round_to(x[i], t->precision.weight)), "another value");
    }
    must = 0;
}

static void read_shards(void) {
    const uint64_t pick = mix64(file.size + (file.size ? (uint64_t)file.data[file.size / 2] : 0));
    tokens_open(&tokens, pick & 1 ? "*" : pick & 2 ? "a.txt" : "a.bin");
    tokens_hash(&tokens, 0);
    if (tokens.count == 0) return;  // too few for any run
    const Split s = {&tokens, tokens.count / 3, tokens.count - tokens.count / 3};
    const long start = (long)(pick >> 8) % s.count, T = s.count - start - 1;
    int inputs[T + !T], targets[T + !T];
    tokens_read(&s, start, T, inputs, targets);
    for (long i = 0; i < T; i++) {
        const Shard* shard = tokens.shards;
        long at = s.start + start + i;
        while (at >= shard->count) at -= shard++->count;
        const uint8_t* p = shard->p + at * tokens.bytes_per_token;
        demand(inputs[i] == (tokens.bytes_per_token == 1 ? *p : p[0] | p[1] << 8) &&
               inputs[i] < tokens_vocab(&tokens) && (i == 0 || targets[i - 1] == inputs[i]), "another token");
    }
}

static void read_tokenizer(void) {
    char prompt[65] = "";
    int ids[64];
    text_open(&text, "input");
    demand(text.end < text.vocab, "no such end");
    for (int i = 0; i < text.vocab; i++) text_print(&text, i);
    memcpy(prompt, file.data + 16, 64);
    for (int i = 0, n = text_tokens(&text, prompt, ids); i < n; i++)
        demand(ids[i] >= 0 && ids[i] < text.vocab, "no such token");
}

static void read_settings(void) {
    char lines[file.size + 1], *rest = lines, *line, *flags[64] = {""};
    int num_flags = 1;
    Config c;
    lines[file.size] = 0;
    archive.path = copied("input");
    archive_begin(&writer, "vocab", "256");
    if (file.size) memcpy(lines, file.data, file.size);
    while ((line = strsep(&rest, "\n")) != NULL) {
        const Option* o = OPTIONS + (uint8_t)*line % (OPTIONS_END - OPTIONS);
        if (*line == '-' && num_flags < 62) {
            flags[num_flags++] = strsep(&line, "=");
            if (line) flags[num_flags++] = line;
        } else if (*line && o->name) archive_meta(&writer, o->name, line + 1);
    }
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++)
        if (o->name) archive_meta(&writer, o->name, o->value);  // counts where there was no line
    fclose(writer.header), archive.header = writer.text;
    config_parse(&model.c, num_flags, flags, &archive, 0);
    config_defaults(&model.c);
    archive_config(&writer, &model);
    fclose(writer.header), again.header = writer.text;
    again.path = copied("output");
    must = 1, config_parse(&c, 1, flags, &again, 0), must = 0;
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        if (!o->stored) continue;
        const char *x = (char*)&model.c + o->offset, *y = (char*)&c + o->offset;
        char* plain = (char*)shown(o->type == TEXT ? *(char**)x : "");
        for (char* p = plain; (p = strpbrk(p, "\"\\")) != NULL; ) *p = '?';
        demand(o->type == TEXT ? strcmp(plain, *(char**)y) == 0
                               : memcmp(x, y, o->type == UINT64 ? 8 : 4) == 0,
               "another setting is read again");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static void (*const READ[])(void) = {read_safetensors, read_shards, read_tokenizer, read_settings};
    file.data = (const char*)data, file.size = size;
    rewind(stdout);
    if (!setjmp(refused)) READ[reader]();
    else demand(!must, "what the trainer writes it refuses");
    text_print(&text, -1);
    fflush(stdout);
    for (long i = 0, n = (long)num_printed, length; i < n; i += length)
        demand((length = character((uint8_t*)printed + i, n - i)) > 0, "output that may steer a terminal");
    free((char*)archive.header), free((char*)again.header), model_free(&model);
    memset(&archive, 0, sizeof archive), memset(&again, 0, sizeof again);
    while (num_copies) free(copies[--num_copies]);
    while (file.num_maps) free(file.maps[--file.num_maps]);
    free(tokens.shards), free(file.out);
    memset(&tokens, 0, sizeof tokens), memset(&file, 0, sizeof file);
    return 0;
}

// Changes one part of a file, and then the length or count in its header: without that it is refused at once.
size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
    const int llmc = (reader == SHARDS || reader == TOKENIZER) && size > 1024, head = llmc && seed % 2;
    const size_t json = reader == SAFETENSORS && size > 8 ? read_u32(data) : size;
    const size_t from = head ? 0 : llmc ? 1024 : 8, n = head ? 80 : llmc ? size - 1024 : json;
    const size_t room = head ? n : most - size + n;
    if (seed / 2 % 8 == 0 || from + n > size || room == 0) return LLVMFuzzerMutate(data, size, most);
    uint8_t part[room];
    memcpy(part, data + from, n);
    const size_t now = LLVMFuzzerMutate(part, n, room) & ~(size_t)llmc;
    const uint32_t count = (uint32_t)(reader == SHARDS ? now / 2 : now);
    if (!head) memmove(data + from + now, data + from + n, size - from - n), size += now - n;
    memcpy(data + from, part, now);
    if (!head && reader != TOKENIZER) memcpy(data + (reader == SHARDS ? 8 : 0), &count, 4);
    return size;
}

static void write_seed(const char* path, const void* data, size_t size) {
    if (write(creat(path, 0666), data, size) < 0) {}  // where DIR is one file
}
int LLVMFuzzerInitialize(int* argc, char*** argv) {
    static const uint32_t heads[][4] = {{SHARD_MAGIC, 1, 11}, {TOKENIZER_MAGIC, 2, 7, 6}};
    static const char table[] = "\1a\1b\1 \2ab\3 ab\2\xc3\xa9\2'sabc";
    char* tiny[] = {"", "--layers", "1", "--width", "1", "--heads", "1", "--seq", "1", "--optimizer", "lion"};
    const char *name = getenv("FUZZ"), *dir = *argc > 1 ? (*argv)[1] : "";
    while (reader < READERS && strcmp(name ? name : "", NAMES[reader]) != 0) reader++;
    if (reader == READERS) puts("FUZZ is safetensors, shards, tokenizer or settings"), (exit)(1);
    stdout = stderr = open_memstream(&printed, &num_printed);  // libFuzzer has its own
    if (reader == SAFETENSORS) {
        Config c;
        config_parse(&c, 11, tiny, NULL, 0);
        c.vocab = 1;
        config_defaults(&c);
        model_layout(&model, &c);
        model_alloc_params(&model, 1);
        model_init(&model, &CPU);
        model.training = 0, checkpoint_save(&model, &CPU, "");
        write_seed(form("%s/exported", dir), file.out, file.out_size), free(file.out);
        model.training = 1, checkpoint_save(&model, &CPU, "");
        write_seed(form("%s/empty", dir), "\2\0\0\0\0\0\0\0{}", 10);
    } else {
        FILE* f = fopen("", "");
        for (const Option* o = OPTIONS; o < OPTIONS_END && reader == SETTINGS; o++)
            fprintf(f, "%c%s\n", (int)(o - OPTIONS + 2 * (OPTIONS_END - OPTIONS)), o->value);
        if (reader == SETTINGS) fputs("--resume\n--width\n64\n--lr\n0.1", f);
        else fwrite(heads[reader - SHARDS], 16, 1, f), fprintf(f, "%-1008s%s", "6 0 5", table);
        fclose(f);
    }
    write_seed(form("%s/first", dir), file.out, file.out_size);
    free(file.out), file.out = NULL, model_free(&model);
    return 0;
}
