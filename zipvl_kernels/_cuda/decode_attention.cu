// Attention of up to 16 rows that share a KV head over a ragged cache, for Hopper (sm_90a): `attend_splits` gives every
// split of the cache its own softmax, `merge_splits` puts the splits of a row together in their order.
//
// In `attend_splits`, the thread of a fifth warp copies tiles of K and V into a ring of shared memory (TMA). Each of
// four warps takes 16 rows of every tile, with a maximum and a sum of its own, so that no warp waits for another before
// the end. Splits have the same rows whatever the batch holds, hence the same bits for a sequence alone or in a batch.
//
// A cache in pages of a pool is read by the same code in smaller boxes; each lane of the fifth warp holds a page's number.
//
// Given from outside: HEAD_DIM 64 or 128, HALF 1 for fp16 and 0 for bf16, SPLIT rows of the cache, and PAGE rows of a
// page, 0 where the cache is one buffer.

#include "dependent.cuh"
#include "hopper.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, WORKERS = 32 * WARPS;
constexpr int SLICE = 16, KEYS = SLICE * WARPS;  // rows of a warp, and of a tile
constexpr int BOX = PAGE && PAGE < KEYS ? PAGE : KEYS;  // rows of a copy
constexpr int STAGES = 3;
constexpr int STEPS = D / 16;
constexpr u32 KEYS_BAND = KEYS * 128, KEYS_BYTES = BANDS * KEYS_BAND;  // of a tile of K or of V
constexpr u32 RING_BYTES = STAGES * 2 * KEYS_BYTES;
constexpr int GROUPS = 4;  // of the threads of `merge_splits`, which share the splits
constexpr int AHEAD = 8;  // splits that a thread reads at a time
constexpr float LOWEST = -3e38f;  // stands for a maximum over nothing
static_assert(SPLIT % KEYS == 0);
static_assert(PAGE == 0 || (PAGE & PAGE - 1) == 0 && BOX >= 8 && SPLIT % PAGE == 0 && SPLIT / PAGE <= 32);

struct Params {
    TensorMap k, v;   // [B, Hkv, N, D] or [num_blocks, Hkv, PAGE, D], boxes of BOX rows and BAND columns
    const u16* q;     // [B, Hq, M, D]
    u16* out;         // [B, Hq, M, D], dense
    float* lse;       // [B, Hq, M] or null
    float* partial;   // [B, Hkv, splits, rows, D]: weighted values of a split
    float* found;     // [B, Hkv, 2, splits, rows]: largest scores, in powers of two, and sums of weights
    const int* used;  // [B] or [B, Hkv]
    const int* table; // [B, N / PAGE], pages
    i64 q_b, q_h, q_m, used_b, used_h, table_b, table_n;
    int num_blocks;
    int Hkv, M, N;
    int rows;    // that share a KV head: (query head, query row)
    int splits;  // that cover N
    float scale;  // in powers of two
};

static_assert(sizeof(Params) == 448, "the launcher packs so much");

struct Shared {
    u64 full[STAGES], empty[STAGES];
    float largest[WARPS][SLICE], total[WARPS][SLICE];
};

static_assert(sizeof(Shared) <= 1024 && RING_BYTES >= WARPS * SLICE * D * 4, "the launcher allows for so much");

__device__ __forceinline__ int used_rows(const Params& p, int b, int kv) {
    return min(max(p.used[b * p.used_b + kv * p.used_h], 0), p.N);
}

// Where 16 bytes of a tile are: row, and which of the row's pieces.
__device__ __forceinline__ u32 piece(u32 tile, int row, int chunk) {
    return tile + (chunk / 8) * KEYS_BAND + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

// Rows g and g + 8 of the queries, g = lane / 4, as operands of the products; zeros past the last.
__device__ __forceinline__ void load_queries(const Params& p, u32 (&q)[STEPS][4], int b, int kv, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int r = lane / 4 + 8 * h;
        i64 head = (i64)kv * (p.rows / p.M) + r / p.M;
        const u16* row = p.q + b * p.q_b + head * p.q_h + r % p.M * p.q_m + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            q[i][h] = r < p.rows ? *(const u32*)(row + 16 * i) : 0;
            q[i][h + 2] = r < p.rows ? *(const u32*)(row + 16 * i + 8) : 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 2) attend_splits(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    u32 base = shared_address(raw), pad = (1024 - base % 1024) % 1024;
    base += pad;
    Shared& sh = *(Shared*)(raw + pad + RING_BYTES);
    int thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
    if (thread == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(sh.full[i], 1);
            barrier_init(sh.empty[i], WARPS);
        }
        barriers_ready();
    } else if (thread == WORKERS) {
        prefetch_map(p.k), prefetch_map(p.v);
    }
    __syncthreads();
    after_previous_kernel();
    next_kernel_may_start();

    int split = blockIdx.x % p.splits, kv = blockIdx.x / p.splits % p.Hkv, b = blockIdx.x / p.splits / p.Hkv;
    int begin = split * SPLIT, page = b;
#if PAGE
    if (warp == WARPS && lane * PAGE < min(SPLIT, p.N - begin))  // before it is known which are in use
        page = p.table[b * p.table_b + (begin / PAGE + lane) * p.table_n];
    page = min(max(page, 0), p.num_blocks - 1);
#endif
    int used = used_rows(p, b, kv), end = min(begin + SPLIT, used);
    if (begin >= end) return;
    int tiles = (end - begin + KEYS - 1) / KEYS;
    if (warp == WARPS) {
        for (int i = 0; i < tiles; ++i) {
            int stage = i % STAGES, at = i * KEYS + lane * BOX;  // in the split
            int boxes = (min(KEYS, end - begin - i * KEYS) + BOX - 1) / BOX;  // with rows in use
            if (lane == 0) {
                wait(sh.empty[stage], i / STAGES & 1 ^ 1);
                arrive_expecting(sh.full[stage], boxes * 2 * BANDS * BOX * 128);
            }
            __syncwarp();
#if PAGE
            int row = at % PAGE, from = __shfl_sync(~0u, page, at / PAGE);
#else
            int row = begin + at, from = page;
#endif
            if (lane < boxes) {
                u32 to = base + stage * 2 * KEYS_BYTES + lane * BOX * 128;
                load_bands<KEYS_BAND>(to, p.k, sh.full[stage], row, kv, from);
                load_bands<KEYS_BAND>(to + KEYS_BYTES, p.v, sh.full[stage], row, kv, from);
            }
        }
        return;
    }

    u32 q[STEPS][4];
    load_queries(p, q, b, kv, lane);
    float o[2 * STEPS][4] = {}, largest[2] = {LOWEST, LOWEST}, total[2] = {0, 0};  // of rows g and g + 8
    int reach[2];  // the last row of the cache that each sees
#pragma unroll
    for (int h = 0; h < 2; ++h) reach[h] = min(used - p.M + (lane / 4 + 8 * h) % p.M, used - 1);

    for (int i = 0; i < tiles; ++i) {
        int stage = i % STAGES, first = begin + i * KEYS + warp * SLICE;  // row of the cache
        u32 keys = base + stage * 2 * KEYS_BYTES, values = keys + KEYS_BYTES;
        wait(sh.full[stage], i / STAGES & 1);
        float s[2][4] = {};  // [16, 2 * 8]
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            u32 x[4];  // keys 0-7 and 8-15, each in two halves of 16 columns
            load_matrices(x, piece(keys, warp * SLICE + lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2));
            multiply_add(s[0], q[j], x[0], x[1]);
            multiply_add(s[1], q[j], x[2], x[3]);
        }
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float above = LOWEST;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& x = s[j / 2][2 * h + j % 2];
                x = first + j / 2 * 8 + lane % 4 * 2 + j % 2 <= reach[h] ? x * p.scale : -infinity();
                above = fmaxf(above, x);
            }
            above = fmaxf(largest[h], max_of_four_lanes(above));
            shrink[h] = exp2_fast(largest[h] - above);
            largest[h] = above;
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& x = s[j / 2][2 * h + j % 2];
                x = exp2_fast(x - above);
                sum += x;
            }
            total[h] = fmaf(total[h], shrink[h], sum);
        }
        if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
            for (int j = 0; j < 2 * STEPS; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) o[j][c] *= shrink[c / 2];
        }
        u32 weights[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
        // Rows that are not in use may hold anything, and 0 * NaN is NaN.
        u32 keep[2];
        int rest = used - first - lane % 4 * 2;  // of rows 2 t and 2 t + 1, t = lane % 4
#pragma unroll
        for (int h = 0; h < 2; ++h) keep[h] = (rest > 8 * h ? 0xFFFFu : 0) | (rest > 8 * h + 1 ? 0xFFFF0000u : 0);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            u32 x[4];  // rows 0-7 and 8-15, of two times 8 columns
            load_transposed(x, piece(values, warp * SLICE + lane % 16, 2 * j + lane / 16));
            multiply_add(o[2 * j], weights, x[0] & keep[0], x[1] & keep[1]);
            multiply_add(o[2 * j + 1], weights, x[2] & keep[0], x[3] & keep[1]);
        }
        __syncwarp();
        if (lane == 0) arrive(sh.empty[stage]);
    }

    // The warps' shares of the split together, through the ring, in their order.
    sync_threads<WORKERS>(1);
    float* all = (float*)(raw + pad);  // [WARPS, SLICE, D]
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int r = lane / 4 + 8 * h;
        float sum = sum_of_four_lanes(total[h]);
        if (lane % 4 == 0) sh.largest[warp][r] = largest[h], sh.total[warp][r] = sum;
#pragma unroll
        for (int j = 0; j < 2 * STEPS; ++j)
            *(float2*)(all + (warp * SLICE + r) * D + 8 * j + lane % 4 * 2) = make_float2(o[j][2 * h], o[j][2 * h + 1]);
    }
    sync_threads<WORKERS>(1);
    i64 slot = (i64)(b * p.Hkv + kv) * p.splits;
    for (int i = thread; i < p.rows * D; i += WORKERS) {
        int r = i / D, d = i % D;
        float above = LOWEST, sum = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) above = fmaxf(above, sh.largest[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            float weight = exp2_fast(sh.largest[w][r] - above);
            sum = fmaf(sh.total[w][r], weight, sum);
            value = fmaf(all[(w * SLICE + r) * D + d], weight, value);
        }
        p.partial[((slot + split) * p.rows + r) * D + d] = value;
        if (d == 0) {
            float* at = p.found + (2 * slot + split) * p.rows + r;
            at[0] = above;
            at[p.splits * p.rows] = sum;
        }
    }
}

// One row of the result a block. The splits are shared by GROUPS of threads, each in order, and their sums added in order.
extern "C" __global__ void __launch_bounds__(GROUPS* D) merge_splits(const __grid_constant__ Params p) {
    __shared__ float values[GROUPS][D], sums[GROUPS], largest[GROUPS * D / 32];
    int r = blockIdx.x % p.rows, kv = blockIdx.x / p.rows % p.Hkv, b = blockIdx.x / p.rows / p.Hkv;
    int splits = (used_rows(p, b, kv) + SPLIT - 1) / SPLIT;  // lengths are older than `attend_splits`
    after_previous_kernel();
    next_kernel_may_start();
    int group = threadIdx.x / D, d = threadIdx.x % D;
    i64 slot = (i64)(b * p.Hkv + kv) * p.splits;
    const float* tops = p.found + 2 * slot * p.rows + r;
    const float* partial = p.partial + (slot * p.rows + r) * D + d;

    // Asked for before the largest score is known.
    float top[AHEAD], sum_of[AHEAD], value_of[AHEAD];
    auto ask = [&](int first) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            int i = first + j * GROUPS;
            top[j] = i < splits ? tops[i * p.rows] : LOWEST;
            sum_of[j] = i < splits ? tops[(p.splits + i) * p.rows] : 0;
            value_of[j] = i < splits ? partial[(i64)i * p.rows * D] : 0;
        }
    };
    ask(group);

    // Every thread needs the largest score of all splits, and would wait for each if it looked at all of them itself.
    float above = LOWEST, total = 0, value = 0;
    for (int i = threadIdx.x; i < splits; i += GROUPS * D) above = fmaxf(above, tops[i * p.rows]);
#pragma unroll
    for (int far = 16; far; far /= 2) above = fmaxf(above, __shfl_xor_sync(~0u, above, far));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = above;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < GROUPS * D / 32; ++i) above = fmaxf(above, largest[i]);
    for (int first = group; first < splits; first += AHEAD * GROUPS) {
        if (first > group) ask(first);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            float weight = exp2_fast(top[j] - above);
            total = fmaf(sum_of[j], weight, total);
            value = fmaf(value_of[j], weight, value);
        }
    }
    values[group][d] = value;
    if (d == 0) sums[group] = total;
    __syncthreads();
    if (group) return;
    total = value = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) total += sums[g], value += values[g][d];
    i64 row = (i64)(b * p.Hkv + kv) * p.rows + r;  // (query head, query row), as in `out`
    u32 both = pack(value / (total > 0 ? total : 1), 0);
    p.out[row * D + d] = (u16)both;
    if (p.lse && d == 0) p.lse[row] = total > 0 ? (above + log2f(total)) * 0.6931471805599453f : -infinity();
}
