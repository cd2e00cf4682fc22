// Column sums of the probes' softmax, for Hopper (sm_90a): two launches over K, and no P x N matrix.
//
// `row_sums`: the log-sum-exp of every probe's scores over a split of the columns. `column_sums` knows all of them,
// hence weights at once: a block walks a span of columns for a few heads, keys as rows of the product so that a
// column's sum stays within four lanes. The last block of a span to finish adds what the others found, in fixed order.
//
// In both, a block of a multiprocessor has two pairs of warpgroups, which share out the tiles of K, each warpgroup with
// 64 rows of the product, so that one pair's exponentials run under the other's products. (Nothing makes them alternate:
// that was measured, and slower.) Of the fifth warpgroup a warp copies tiles of K ahead of them (TMA), and three warps
// gather the queries of the next head.
//
// Given from outside: HEAD_DIM 64 or 128, HALF 1 for fp16 and 0 for bf16, and PACKED 1 for sequences one after the other:
// then they are a batch of 1 with M = N = T, and blocks have places (packed.cuh): `splits` in the first launch, `spans`, of
// which a sequence has one for each span and part, in the second. `parts` is the most that a sequence has. Each is shared
// out as it would be alone, hence the same bits. Or PAGE rows of a page, 0 where K is one buffer: tiles come in smaller
// boxes then, and N is what a sequence's pages have room for.

#include "dependent.cuh"
#include "hopper.cuh"
#include "packed.cuh"
#include "pages.cuh"

constexpr int PAIR = 256, WORKERS = 2 * PAIR;  // threads that multiply
constexpr int THREADS = WORKERS + 128, GATHERERS = 96;
constexpr int STAGES = 4;                      // tiles of K in shared memory
constexpr int MAX_PROBES = 512;
constexpr int MAX_ITEMS = 32;        // tiles of probes, over the heads of a block of `column_sums`
constexpr int MAX_SPAN = 16 * TILE;  // columns of such a block
static_assert(!PAGE || !PACKED);

struct Params {
    TensorMap k;           // [B, Hkv, N, D] or [num_blocks, Hkv, PAGE, D], boxes of BOX rows and BAND columns
    const u16* q;          // [B, Hq, M, D]
    const int* rows;       // [P] or [B, P]
    const int* q_start;    // [B] or null
    const int* leftpad_k;  // [B] or null
    const int* seqused_k;  // [B] or null
    float* lse;            // [B, Hq, splits, P]: log2 of the sum of exp2 of a probe's scores over a split
    float* partial;        // [B, G, parts - 2, N]: sums over the heads of a part; the first two are in the outputs
    int* arrived;          // [B, G, spans]: blocks of a span that are done; cleared by the first launch for the second
    float* accumulated;    // [B, G, N]
    float* normalized;     // [B, G, N]
    const int* cu_seqlens; // if PACKED: [B + 1]
    const int* table;      // if PAGE: [B, N / PAGE]
    const int* shares;     // if PACKED, by the tiles of a sequence: columns of a block of `row_sums`, and parts
    i64 q_b, q_h, q_m, rows_b, rows_p, table_b, table_n;
    int B, Hq, G, M, N, P;
    int shared;         // query heads of a KV head
    int split, splits;  // columns of a block of `row_sums`, whole tiles, and how many cover N
    int span, spans;    // the same of `column_sums`
    int parts;          // shares of a group's heads
    float scale;        // in powers of two, positive
    int sequences, most;  // if PACKED: how many, and the longest
    Places in_rows, in_columns;
    int num_blocks;
};

static_assert(sizeof(Params) == 384, "the launcher packs so much");

struct Shared {
    u64 full[STAGES], empty[STAGES], q_full[2], q_empty[2];
    alignas(16) int at[MAX_PROBES];           // the last column that a probe sees, -1: none
    int last[THREADS / 32];                   // the largest of them, by warp
    int finishes;                             // this block is the last of its span
    alignas(16) float less[MAX_ITEMS][TILE];  // minus the log-sum-exp of each probe
    float sums[MAX_SPAN];                     // of the columns, over this block's heads
};

// Shared memory: two tiles of queries, the ring of K, then the rest.
constexpr u32 Q_AT = 0, K_AT = 2 * TILE_BYTES, SHARED_AT = K_AT + STAGES * TILE_BYTES;
static_assert(sizeof(Shared) <= 28672, "the launcher allows for so much");

// --- sequences -----------------------------------------------------------------------------------------------------

// What a block works for.
struct Sequence {
    int b, first, rows;        // its rows are all from 0 on, or some of many
    int split, splits, parts;  // as in Params, but of this sequence
    int lse;                   // where its log-sum-exps start among the splits
};

// Of the block at a place, which becomes one of this sequence.
__device__ __forceinline__ Sequence sequence_of(const Params& p, int b, const Places& places, int& place) {
    if (!PACKED) return {b, 0, p.N, p.split, p.splits, p.parts, 0};
    Packing all = {p.cu_seqlens, p.sequences, p.N, p.most};
    b = sequence_at(all, places, place);
    place -= first_place(all, places, b);
    Span span = span_of(all, b);
    const int* share = p.shares + (span.rows + TILE - 1) / TILE * 2;
    int split = share[0], splits = (span.rows + split - 1) / split;
    return {b, span.first, span.rows, split, splits, share[1], first_place(all, p.in_rows, b)};
}

// --- probes --------------------------------------------------------------------------------------------------------

// At most N, so that what is counted on from here does not wrap around.
__device__ __forceinline__ int first_column(const Params& p, int b) {
    return p.leftpad_k ? min(max(p.leftpad_k[b], 0), p.N) : 0;
}

__device__ __forceinline__ int start_of(const Params& p, int b) {
    if (p.q_start) return p.q_start[b];
    return (PAGE ? min(max(p.seqused_k[b], 0), p.N) : p.N) - p.M;
}

// Barriers, and the last column that each of `count` probes from `from` on sees. Returns the largest; by all threads.
__device__ int prepare(const Params& p, Shared& sh, const Sequence& x, int from, int count) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(sh.full[i], 1);
            barrier_init(sh.empty[i], PAIR / 32);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(sh.q_full[i], GATHERERS);
            barrier_init(sh.q_empty[i], WORKERS / 32);
        }
        barriers_ready();
    }
    int b = x.b, first = first_column(p, b), start = start_of(p, b), last = -1;
    int end = p.seqused_k ? min(p.seqused_k[b], x.rows) : x.rows;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int row = from + i < p.P ? p.rows[b * p.rows_b + (from + i) * p.rows_p] : -1, at = row + start;
        at = row >= 0 && row < p.M && at >= first && at < end ? at : -1;
        sh.at[i] = at;
        last = max(last, at);
    }
    last = __reduce_max_sync(~0u, last);
    if (threadIdx.x % 32 == 0) sh.last[threadIdx.x / 32] = last;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) last = max(last, sh.last[i]);
    return __shfl_sync(~0u, last, 0);  // lets the compiler know that it is the same in all lanes
}

// Three warps: the queries of item `i` into their swizzled buffer, zeros for a probe that sees nothing.
__device__ __forceinline__ void serve_queries(const Params& p, Shared& sh, const int* at, const Sequence& x, int head, u32 q_at, int i) {
    wait(sh.q_empty[i % 2], i / 2 & 1 ^ 1);
    const u16* q = p.q + x.b * p.q_b + head * p.q_h + x.first * p.q_m;
    int start = start_of(p, x.b), thread = threadIdx.x - (THREADS - GATHERERS), chunk = thread % CHUNKS;
    u32 to = q_at + i % 2 * TILE_BYTES + (chunk / 8) * TILE_BAND;
#pragma unroll 8
    for (int r = thread / CHUNKS; r < TILE; r += GATHERERS / CHUNKS) {
        int column = at[r];
        const u16* from = q + (column < 0 ? 0 : column - start) * p.q_m + chunk * 8;
        copy_16_async(to + r * 128 + ((chunk % 8 ^ r % 8) << 4), from, column < 0 ? 0 : 16);
    }
    wait_for_copies();
    publish_to_async_proxy();
    arrive(sh.q_full[i % 2]);
}

// One thread, or with pages one warp: tiles of K from row `begin` on into the ring, `loaded` of which have gone there before.
__device__ __forceinline__ void serve_keys(const Params& p, Shared& sh, u32 k_at, int begin, int end, int kv, const Sequence& x, u32& loaded) {
    int next = page_of(p, x.b, begin, end);
    for (int j = begin; j < end; j += TILE, ++loaded) {
        u32 stage = loaded % STAGES;
        int page = next;
        next = page_of(p, x.b, j + TILE, end);  // on its way while this one waits for a place
        wait(sh.empty[stage], loaded / STAGES & 1 ^ 1);
        if (PAGE) load_boxes(p, k_at + stage * TILE_BYTES, p.k, sh.full[stage], j, end, kv, page);
        else load_tile(k_at + stage * TILE_BYTES, p.k, sh.full[stage], x.first + j, kv, PACKED ? 0 : x.b);
    }
}

// S [64, 128] of the ring's tile `n`: this half of its rows with the queries, or this half of the queries with it.
__device__ __forceinline__ void multiply_tile(float (&s)[64], Shared& sh, u32 k_at, u32 q_at, int half, bool keys_as_rows, u32 n) {
    u32 stage = n % STAGES, k = k_at + stage * TILE_BYTES, below = half * ROWS * 128;
    wait(sh.full[stage], n / STAGES & 1);
    pin(s);
    wgmma_fence();
    // The same in all lanes, and so that the compiler knows it: descriptors then stay in uniform registers.
    k = __shfl_sync(~0u, k, 0), q_at = __shfl_sync(~0u, q_at, 0), below = __shfl_sync(~0u, below, 0);
    issue_scores<TILE_BAND>(s, (keys_as_rows ? k : q_at) + below, keys_as_rows ? q_at : k);
    wgmma_wait<0>();
    pin(s);
    if (threadIdx.x % 32 == 0) arrive(sh.empty[stage]);
}

// --- log-sum-exps of the rows --------------------------------------------------------------------------------------

// Scores of a tile into the running maximum and sum of a thread's two rows; `reach`: the last column that a row sees.
__device__ __forceinline__ void add_scores(float (&s)[64], const int (&reach)[2], float (&largest)[2], float (&total)[2], float scale) {
    if (__all_sync(~0u, reach[0] < 0 && reach[1] < 0)) return;
    bool cut = (reach[0] >= 0 && reach[0] < TILE - 1) || (reach[1] >= 0 && reach[1] < TILE - 1);
    if (__any_sync(~0u, cut)) {  // seldom: a row that sees none of the columns need not be masked
        int lane = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (i / 4 * 8 + i % 2 + lane > reach[i / 2 % 2]) s[i] = -infinity();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float above = s[2 * h], also = s[2 * h + 1];  // two chains, of even and odd columns
#pragma unroll
        for (int j = 1; j < 16; ++j) above = fmaxf(above, s[4 * j + 2 * h]), also = fmaxf(also, s[4 * j + 2 * h + 1]);
        bool sees = reach[h] >= 0;
        above = sees ? fmaxf(largest[h], fmaxf(above, also) * scale) : largest[h];
        float sum = 0, rest = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            sum += exp2_fast(fmaf(s[4 * j + 2 * h], scale, -above));
            rest += exp2_fast(fmaf(s[4 * j + 2 * h + 1], scale, -above));
        }
        total[h] = sees ? fmaf(total[h], exp2_fast(largest[h] - above), sum + rest) : total[h];
        largest[h] = above;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) row_sums(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    u32 base = shared_address(raw), pad = (1024 - base % 1024) % 1024;
    base += pad;
    Shared& sh = *(Shared*)(raw + pad + SHARED_AT);
    after_previous_kernel();
    next_kernel_may_start();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.B * p.G * p.spans; i += gridDim.x * blockDim.x) p.arrived[i] = 0;

    // Query heads that read the same keys side by side, so that the keys come from L2 for all but one.
    int blocks = (p.P + TILE - 1) / TILE, Hkv = p.Hq / p.shared, t = blockIdx.x;
    int block = t % blocks, place = t / blocks / p.shared, kv = place / p.splits % Hkv, b = place / p.splits / Hkv;
    int split = PACKED ? place / Hkv : place % p.splits;
    Sequence x = sequence_of(p, b, p.in_rows, split);
    if (PACKED) {  // splits of a head side by side, and heads of a sequence, as alone
        if (split < 0 || x.splits == 0) return;
        place = split * Hkv + place % Hkv, kv = place / x.splits, split = place % x.splits;
        if (kv >= Hkv) return;
    }
    int head = kv * p.shared + t / blocks % p.shared;
    int last = prepare(p, sh, x, block * TILE, TILE);
    int begin = max(split * x.split, first_column(p, x.b)), end = min((split + 1) * x.split, last + 1);

    int thread = threadIdx.x, lane = thread % 32;
    if (thread >= THREADS - GATHERERS) return serve_queries(p, sh, sh.at, x, head, base + Q_AT, 0);
    if (thread >= WORKERS) {
        u32 loaded = 0;
        if (PAGE || lane == 0) serve_keys(p, sh, base + K_AT, begin, end, kv, x, loaded);
        return;
    }
    int group = __shfl_sync(~0u, thread / 128, 0), pair = group / 2, half = group % 2, r = thread % PAIR / 32 * 16 + lane / 4;
    int limit[2] = {min(sh.at[r], end - 1), min(sh.at[r + 8], end - 1)};
    float s[64], largest[2] = {-3e38f, -3e38f}, total[2] = {0, 0};  // of a thread's own columns; finite where none is seen
    wait(sh.q_full[0], 0);
    u32 n = pair;
    for (int j = begin + pair * TILE; j < end; j += 2 * TILE, n += 2) {
        multiply_tile(s, sh, base + K_AT, base + Q_AT, half, false, n);
        int reach[2] = {limit[0] - j, limit[1] - j};
        add_scores(s, reach, largest, total, p.scale);
        __syncwarp();
    }
    float above[2], sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        above[h] = max_of_four_lanes(largest[h]);
        sum[h] = sum_of_four_lanes(total[h] * exp2_fast(largest[h] - above[h]));
        if (pair == 1 && lane % 4 == 0) sh.less[0][r + 8 * h] = above[h], sh.less[1][r + 8 * h] = sum[h];
    }
    sync_threads<WORKERS>(3);
    if (pair == 1 || lane % 4) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float other = sh.less[0][r + 8 * h], both = fmaxf(above[h], other);
        float all = sum[h] * exp2_fast(above[h] - both) + sh.less[1][r + 8 * h] * exp2_fast(other - both);
        int probe = block * TILE + r + 8 * h;
        if (probe < p.P)
            p.lse[((i64)(b * p.Hq + head) * p.splits + x.lse + split) * p.P + probe] = all > 0 ? both + log2f(all) : -infinity();
    }
}

// --- sums of the columns -------------------------------------------------------------------------------------------

// Minus the log-sum-exp of a probe of a head, over all splits; minus infinity, hence weights of 0, where none is.
__device__ __forceinline__ float merge_splits(const Params& p, const Sequence& x, int b, int head, int probe) {
    if (probe >= p.P) return -infinity();
    const float* lse = p.lse + ((i64)(b * p.Hq + head) * p.splits + x.lse) * p.P + probe;
    float above = -3e38f, total = 0;
    for (int i = 0; i < x.splits; i += 8) {
        float some[8], largest = above;  // all on their way at a time
#pragma unroll
        for (int j = 0; j < 8; ++j) some[j] = i + j < x.splits ? lse[(i64)(i + j) * p.P] : -infinity();
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, some[j]);
        total *= exp2_fast(above - largest);
#pragma unroll
        for (int j = 0; j < 8; ++j) total += exp2_fast(some[j] - largest);
        above = largest;
    }
    return total > 0 ? -above - log2f(total) : -infinity();
}

// Sums of a thread's two rows (keys, the first at `column`) over the probes that see them, added to `sums` by the first
// of its four lanes.
__device__ __forceinline__ void add_weights(const float (&s)[64], const float* less, const int* at, int column, float scale, float* sums) {
    int lane = threadIdx.x % 32, quad = lane % 4, first = column - lane / 4;  // of the warp's 16 keys
    float even[2] = {0, 0}, odd[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        // Of 32 probes, which see the first of these keys, and which the last. Few lie between. (A probe that is NaN is
        // so for keys that it does not see, too: its own row of attention is NaN anyway.)
        int last = at[32 * c + lane];
        u32 some = __ballot_sync(~0u, last >= first), all = __ballot_sync(~0u, last >= first + 15);
        if (!some) continue;
        if (some == all) {
#pragma unroll
            for (int j = 4 * c; j < 4 * c + 4; ++j) {
                float2 offset = *(const float2*)(less + 8 * j + 2 * quad);
                u32 seen = all >> 8 * (j % 4) + 2 * quad;
                if (!(seen & 1)) offset.x = -infinity();
                if (!(seen & 2)) offset.y = -infinity();
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    even[h] += exp2_fast(fmaf(s[4 * j + 2 * h], scale, offset.x));
                    odd[h] += exp2_fast(fmaf(s[4 * j + 2 * h + 1], scale, offset.y));
                }
            }
        } else {
#pragma unroll
            for (int j = 4 * c; j < 4 * c + 4; ++j) {
                float2 offset = *(const float2*)(less + 8 * j + 2 * quad);
                int2 seen = *(const int2*)(at + 8 * j + 2 * quad);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float x = exp2_fast(fmaf(s[4 * j + 2 * h], scale, offset.x));
                    float y = exp2_fast(fmaf(s[4 * j + 2 * h + 1], scale, offset.y));
                    even[h] += column + 8 * h <= seen.x ? x : 0;
                    odd[h] += column + 8 * h <= seen.y ? y : 0;
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float sum = sum_of_four_lanes(even[h] + odd[h]);
        if (quad == 0) sums[8 * h] += sum;
    }
}

// Where a part's sums are, [N].
__device__ __forceinline__ float* sums_of(const Params& p, int set, int part) {
    if (part < 2) return (part ? p.normalized : p.accumulated) + (i64)set * p.N;
    return p.partial + ((i64)set * (p.parts - 2) + part - 2) * p.N;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) column_sums(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    u32 base = shared_address(raw), pad = (1024 - base % 1024) % 1024;
    base += pad;
    Shared& sh = *(Shared*)(raw + pad + SHARED_AT);

    int t = gridDim.x - 1 - blockIdx.x;  // backwards: what the first launch read last is still in L2
    int place = t % p.spans, parts = PACKED ? 1 : p.parts;
    int part = t / p.spans % parts, g = t / p.spans / parts % p.G, b = t / p.spans / parts / p.G;
    int blocks = (p.P + TILE - 1) / TILE, heads = p.Hq / p.G, set = b * p.G + g;
    int* arrived = p.arrived + set * p.spans + place;
    Sequence x = sequence_of(p, b, p.in_columns, place);
    if (PACKED) {
        int spans = (x.rows + p.span - 1) / p.span;
        if (place < 0 || place >= spans * x.parts) {
            if (blockIdx.x == 0) after_previous_kernel();  // one has to, or this kernel might end before that one
            return;
        }
        part = place / spans, place %= spans, arrived -= part * spans;
    }
    int from = g * heads + part * heads / x.parts, to = g * heads + (part + 1) * heads / x.parts;
    int last = prepare(p, sh, x, 0, blocks * TILE);
    int begin = max(place * p.span, first_column(p, x.b)), end = min((place + 1) * p.span, last + 1);
    int items = begin < end ? (to - from) * blocks : 0, tiles = (end - begin + TILE - 1) / TILE;

    int thread = threadIdx.x, lane = thread % 32;
    if (thread >= THREADS - GATHERERS) {
        for (int i = 0; i < items; ++i) serve_queries(p, sh, sh.at + i % blocks * TILE, x, from + i / blocks, base + Q_AT, i);
    } else if (thread >= WORKERS) {
        u32 loaded = 0;
        if (PAGE || lane == 0)
            for (int i = 0; i < items; ++i) serve_keys(p, sh, base + K_AT, begin, end, (from + i / blocks) / p.shared, x, loaded);
    } else if (items) {
        for (int i = thread; i < tiles * TILE; i += WORKERS) sh.sums[i] = 0;
        after_previous_kernel();  // that is `row_sums`: queries and keys are older
        for (int i = thread / TILE; i < items; i += WORKERS / TILE)
            sh.less[i][thread % TILE] = merge_splits(p, x, b, from + i / blocks, i % blocks * TILE + thread % TILE);
        sync_threads<WORKERS>(3);
        int group = __shfl_sync(~0u, thread / 128, 0), pair = group / 2, half = group % 2, r = thread % PAIR / 32 * 16 + lane / 4;
        float s[64];
        for (int i = 0; i < items; ++i) {
            wait(sh.q_full[i % 2], i / 2 & 1);
            for (int tile = pair; tile < tiles; tile += 2) {  // always the same pair's: its sums have one writer
                multiply_tile(s, sh, base + K_AT, base + Q_AT + i % 2 * TILE_BYTES, half, true, i * tiles + tile);
                int row = tile * TILE + r;
                add_weights(s, sh.less[i], sh.at + i % blocks * TILE, begin + row, p.scale, sh.sums + row);
                __syncwarp();
            }
            if (lane == 0) arrive(sh.q_empty[i % 2]);
        }
    }
    __syncthreads();
    after_previous_kernel();
    next_kernel_may_start();
    float* mine = sums_of(p, set, part) + x.first;
    for (int i = begin + thread; i < end; i += blockDim.x) mine[i] = sh.sums[i - begin];

    __threadfence();
    __syncthreads();
    if (thread == 0) sh.finishes = atomicAdd(arrived, 1) == x.parts - 1;
    __syncthreads();
    if (!sh.finishes) return;
    __threadfence();
    for (int column = place * p.span + thread; column < min((place + 1) * p.span, x.rows); column += blockDim.x) {
        float total = 0;
        int seen = 0;  // how many probes see this column
        if (column >= begin && column < end) {
            for (int i = 0; i < x.parts; i += 8) {
                float sums[8];  // all on their way at a time
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[j] = i + j < x.parts ? __ldcg(sums_of(p, set, i + j) + x.first + column) : 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) total += sums[j];
            }
#pragma unroll 8
            for (int i = 0; i < blocks * TILE; i += 4) {
                int4 at = *(const int4*)(sh.at + i);
                seen += (column <= at.x) + (column <= at.y) + (column <= at.z) + (column <= at.w);
            }
        }
        p.accumulated[(i64)set * p.N + x.first + column] = total;
        p.normalized[(i64)set * p.N + x.first + column] = total / (float)(max(seen, 1) * heads);
    }
}
