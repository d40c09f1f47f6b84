// peak.h: what no product can pass on this machine; for programs that have included train_us.c.
//
// Operations a second of all threads: nothing but FMAs, or products of pairs, of numbers in registers, enough
// of them side by side.
static double peak(int pairs) {
    enum { CHAINS = MR * NV < 12 ? 3 : MR * NV / 4 };
    double operations = 0, start = seconds();
    #pragma omp parallel reduction(+ : operations)
    {
        const long n = 300000;
        float x[1024] __attribute__((aligned(64)));
        for (int i = 0; i < 1024; i++) x[i] = pair_of(0.5f, 0.5f);
        __asm__ volatile("" ::"r"(x) : "memory");  // for all that a compiler knows, they now differ
        Vec c[CHAINS][4], y = *(const Vec*)x;
        memcpy(c, x, sizeof c);
        for (long t = 0; t < n && !pairs; t++, operations += 8 * LANES * CHAINS)
            for (int i = 0; i < CHAINS; i++) for (int j = 0; j < 4; j++) c[i][j] = c[i][j] * y + y;
#if defined(__AMX_BF16__) || defined(__AMXBF16__)
        if (pairs) tile_pairs(x, x, x, WK);  // sets up the registers, with what is multiplied
        for (long t = 0; t < n && pairs; t += 64, operations += 4 * 16 * 16 * 64) {
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
#elif defined(__AVX512BF16__)
        for (long t = 0; t < n && pairs; t++, operations += 16 * LANES * CHAINS)
            for (int i = 0; i < CHAINS; i++) for (int j = 0; j < 4; j++)
                c[i][j] = (Vec)_mm512_dpbf16_ps((__m512)c[i][j], (__m512bh)y, (__m512bh)y);
#endif
        memcpy(x, c, sizeof c);
        __asm__ volatile("" ::"r"(x) : "memory");
    }
    return operations / (seconds() - start);
}
