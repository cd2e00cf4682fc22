// In place of zipvl_kernels/_cuda/mma.cuh on the CPU: the same functions, with the same numbers in the same lanes.

static void load(u32 (&x)[4], u32 row, bool transposed) {
    auto rows = exchange(row);
    int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) {
        u32 both[2];
        for (int i = 0; i < 2; ++i) {
            int line = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            both[i] = *(u16*)(raw + rows[8 * m + line] + 2 * column);
        }
        x[m] = both[0] | both[1] << 16;
    }
}

static void load_matrices(u32 (&x)[4], u32 row) { load(x, row, false); }
static void load_transposed(u32 (&x)[4], u32 row) { load(x, row, true); }

static void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    float A[2][16], B[16][2];  // the rows and columns of this lane
    int lane = threadIdx.x % 32;
    for (int part = 0; part < 4; ++part) {
        auto lanes = exchange(a[part]) + lane / 4 * 4;
        for (int t = 0; t < 4; ++t)
            for (int i = 0; i < 2; ++i) A[part % 2][part / 2 * 8 + t * 2 + i] = number(lanes[t] >> 16 * i);
    }
    for (int half = 0; half < 2; ++half) {
        auto lanes = exchange(half ? b1 : b0);
        for (int n = 0; n < 2; ++n)
            for (int t = 0; t < 4; ++t)
                for (int i = 0; i < 2; ++i) B[half * 8 + t * 2 + i][n] = number(lanes[(lane % 4 * 2 + n) * 4 + t] >> 16 * i);
    }
    for (int x = 0; x < 4; ++x)
        for (int k = 0; k < 16; ++k) c[x] += A[x / 2][k] * B[k][x % 2];
}
