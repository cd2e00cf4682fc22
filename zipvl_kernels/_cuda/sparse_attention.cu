// Causal attention among the kept tokens, for Hopper (sm_90a). K and V are compacted: rows [0, count) hold the set.
//
// One persistent block a multiprocessor, three warpgroups. Of the first, warp 0 copies tiles of K and V into a ring of
// shared memory (TMA), warp 1 draws the work and gathers the first 64 queries by row, warp 2 the other 64, warp 3
// clears the rows that are not in the set. Warpgroups 1 and 2 multiply, 64 queries each, and take turns to issue so
// that one's exponentials run under the other's products.
//
// A work item is a query head and TILE consecutive members of its set. Keys are walked from the diagonal down, so only
// the first tile is masked. Items are drawn by ticket, heaviest first within a section of heads whose K and V fit in
// L2; an item's arithmetic never depends on who draws it, hence the same bits at every run.
//
// Given from outside: HEAD_DIM 64 or 128, HALF 1 for fp16 and 0 for bf16, STAGES of the ring, CONSUMER_REGISTERS and
// PRODUCER_REGISTERS, TAKE_TURNS 0 or 1, and PACKED 1 for sequences one after the other: then q, k, v are [T, H, D], `out`
// is dense in this order, indices are [G, T], strides of a batch 0, and M is the longest length. packed.cuh says more. Or
// PAGE rows of a page of a pool (pages.cuh).

#include "dependent.cuh"
#include "hopper.cuh"
#include "packed.cuh"
#include "pages.cuh"

static_assert(!PAGE || !PACKED);
constexpr int MAX_SETS = 512;
constexpr int ZERO_HEADS = 8;
constexpr u32 Q_BAND = ROWS * 128;      // bytes
constexpr u32 Q_HALF = BANDS * Q_BAND;  // of one consumer

struct Params {
    TensorMap k, v;  // [B, Hkv, N, D] or [num_blocks, Hkv, PAGE, D], boxes of BOX rows and BAND columns
    const u16* q;    // [B, Hq, M, D]
    u16* out;        // [B, Hq, M, D], dense
    const int* indices;  // [B, G, C]
    const int* counts;   // [B, G]
    const int* q_start;  // [B] or null
    int* ticket;         // 0 before and after
    const int* cu_seqlens;  // [B + 1] if PACKED
    const int *seqused_k, *table;  // [B] and [B, max_blocks] if PAGE
    i64 q_b, q_h, q_m, indices_b, indices_g, indices_n, counts_b, counts_g, table_b, table_n;
    int B, Hq, Hkv, G, M;
    int T;              // rows of all sequences if PACKED
    int most;           // members of a set at most
    int default_start;  // column of query row 0
    int whole;          // every member has a query row
    int section_bytes;  // of K and V that heads worked on at a time may take
    float scale;        // in powers of two, positive
    int num_blocks;
};

static_assert(sizeof(Params) == 512, "the launcher packs so much");

struct Item {
    int b, g, head, kv, tile, count, start;  // tile < 0: no more work
};

struct Shared {
    u64 item_full[2], q_full[2][2], q_empty[2];
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    Item item[2];
    int row[2][TILE];  // query row of each member, -1 without one
    int first_item[MAX_SETS], first_tile[MAX_SETS], tiles[MAX_SETS];
};

// Shared memory: two buffers of queries, the rings of K and V, then the rest.
constexpr u32 Q_AT = 0, K_AT = Q_AT + 2 * 2 * Q_HALF, V_AT = K_AT + STAGES * TILE_BYTES, SHARED_AT = V_AT + STAGES * TILE_BYTES;
static_assert(sizeof(Shared) <= 8192, "the launcher allows for so much");

__device__ __forceinline__ void issue_values(float (&o)[D / 2], const u32 (&p)[32], u32 v, int accumulate) {
    u64 b = operand(v, TILE_BAND);
#pragma unroll
    for (int i = 0; i < TILE / 16; ++i)  // 16 rows are 2048 bytes
        multiply(o, &p[4 * i], b + i * (2048 >> 4), i > 0 ? 1 : accumulate);
    wgmma_commit();
}

// --- arithmetic of a thread: rows r and r + 8 of a tile; x[4 j + 2 h + i] is row r + 8 h, column 8 j + 2 (lane % 4) + i --

// Scores become weights. `largest` and `total` cover the keys so far; `shrink` is what earlier weights are worth now.
template <bool FIRST>
__device__ __forceinline__ void soften(float (&s)[64], float (&largest)[2], float (&total)[2], float (&shrink)[2],
                                       float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float above = s[2 * h], also = s[2 * h + 1];  // two chains of even and odd columns
#pragma unroll
        for (int j = 1; j < 16; ++j) above = fmaxf(above, s[4 * j + 2 * h]), also = fmaxf(also, s[4 * j + 2 * h + 1]);
        above = max_of_four_lanes(fmaxf(above, also));
        if (!FIRST) above = fmaxf(above, largest[h]);
        float offset = -above * scale, sum = 0, rest = 0;
        if (!FIRST) shrink[h] = exp2_fast(fmaf(largest[h], scale, offset));
        largest[h] = above;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            float &x = s[4 * j + 2 * h], &y = s[4 * j + 2 * h + 1];
            x = exp2_fast(fmaf(x, scale, offset));
            y = exp2_fast(fmaf(y, scale, offset));
            sum += x, rest += y;
        }
        total[h] = FIRST ? sum + rest : fmaf(total[h], shrink[h], sum + rest);
    }
}

__device__ __forceinline__ void as_operand(u32 (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// --- roles ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Packing packing(const Params& p) { return {p.cu_seqlens, p.B, p.T, p.M}; }

__device__ __forceinline__ const int* columns_of(const Params& p, int b, int g) {
    return p.indices + b * p.indices_b + g * p.indices_g + span_of(packing(p), b).first * p.indices_n;
}

__device__ __forceinline__ int count_of(const Params& p, int b, int g) {
    int most = PACKED ? span_of(packing(p), b).rows : p.most;
    return min(max(p.counts[b * p.counts_b + g * p.counts_g], 0), most);
}

// The output of a head from row `row` of sequence `b` on, in 16 bytes, and how many of them lead to the next row.
__device__ __forceinline__ uint4* out_from(const Params& p, int b, int head, int row) {
    i64 at = PACKED ? (i64)(span_of(packing(p), b).first + row) * p.Hq + head : (i64)(b * p.Hq + head) * p.M + row;
    return (uint4*)(p.out + at * D);
}

__device__ __forceinline__ i64 out_stride(const Params& p) { return PACKED ? (i64)p.Hq * CHUNKS : CHUNKS; }

__device__ __forceinline__ int start_of(const Params& p, int b) {
    if (p.q_start) return p.q_start[b];
    return PAGE ? max(p.seqused_k[b], 0) - p.M : p.default_start;
}

// How many of the ascending columns are below `column`; 32 lanes each look at one of 32 places.
__device__ int lower_bound(const int* columns, i64 stride, int count, int column, int lane) {
    int low = 0, high = count;
    while (low < high) {
        int step = (high - low + 31) / 32, at = low + step * lane;
        int below = __popc(__ballot_sync(~0u, at < high && columns[at * stride] < column));
        high = min(low + step * below, high);
        if (below) low += step * (below - 1) + 1;
    }
    return low;
}

// Fill the table of sets: where the items of each begin, and which tiles have queries. Returns the number of items.
__device__ int tabulate(const Params& p, Shared& sh, int lane) {
    int total = 0, heads = p.Hq / p.G, sets = p.B * p.G;
    for (int base = 0; base < sets; base += 32) {
        int mine = min(base + lane, sets - 1), b = mine / p.G, g = mine % p.G;
        int count = count_of(p, b, g), begin = 0, end = count;
        if (!p.whole) {  // queries of a chunk: those from `start` to `start + M`
            const int* columns = columns_of(p, b, g);
            int start = start_of(p, b), early = count && columns[0] < start;
            int late = count && columns[(count - 1) * p.indices_n] - start >= p.M;
            for (u32 left = __ballot_sync(~0u, base + lane < sets && (early || late)); left; left &= left - 1) {
                int from = __ffs(left) - 1, set = base + from, c = __shfl_sync(~0u, count, from);
                int column = __shfl_sync(~0u, start, from);
                columns = columns_of(p, set / p.G, set % p.G);
                int low = lower_bound(columns, p.indices_n, c, column, lane);
                int high = lower_bound(columns, p.indices_n, c, column + p.M, lane);
                if (lane == from) begin = low, end = high;
            }
        }
        int first = begin / TILE, tiles = base + lane < sets && begin < end ? (end + TILE - 1) / TILE - first : 0;
        int sum = tiles * heads;  // of this lane and those before it
        for (int far = 1; far < 32; far *= 2) {
            int before = __shfl_up_sync(~0u, sum, far);
            if (lane >= far) sum += before;
        }
        if (base + lane < sets) {
            sh.first_item[mine] = total + sum - tiles * heads;
            sh.first_tile[mine] = first;
            sh.tiles[mine] = tiles;
        }
        total += __shfl_sync(~0u, sum, 31);
    }
    __syncwarp();
    return total;
}

// Item `t`: sections of KV heads one after the other, in them tiles from the last to the first, in these heads.
__device__ Item item_of(const Params& p, const Shared& sh, int t) {
    int low = 0, high = p.B * p.G - 1;  // the last set that begins at or before t
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (sh.first_item[middle] <= t) low = middle;
        else high = middle - 1;
    }
    Item x;
    x.b = low / p.G, x.g = low % p.G;
    x.count = count_of(p, x.b, x.g), x.start = start_of(p, x.b);
    int group = p.Hq / p.Hkv, kv_heads = p.Hkv / p.G, tiles = sh.tiles[low];
    int wide = (int)min((i64)kv_heads, max((i64)1, p.section_bytes / ((i64)x.count * D * 4)));
    t -= sh.first_item[low];
    int section = t / (tiles * wide * group);
    t -= section * tiles * wide * group;
    int heads = min(wide, kv_heads - section * wide) * group;
    x.tile = sh.first_tile[low] + tiles - 1 - t / heads;
    x.head = (x.g * kv_heads + section * wide) * group + t % heads;
    x.kv = x.head / group;
    return x;
}

// 64 query rows into the swizzled buffer of one consumer, by one warp.
__device__ void gather_queries(const Params& p, const Item& x, int half, int* row, u32 to, int lane) {
    const int* columns = columns_of(p, x.b, x.g);
    Span span = span_of(packing(p), x.b);
#pragma unroll
    for (int r = lane; r < ROWS; r += 32) {
        int i = x.tile * TILE + half * ROWS + r, at = -1;
        if (i < x.count) at = columns[i * p.indices_n] - x.start;
        row[r] = at < span.rows ? at : -1;
        if (at < 0) row[r] = -1;
    }
    __syncwarp();
    const u16* q = p.q + x.b * p.q_b + x.head * p.q_h + span.first * p.q_m;
    int chunk = lane % CHUNKS;
#pragma unroll 4
    for (int r = lane / CHUNKS; r < ROWS; r += 32 / CHUNKS) {
        int at = row[r];
        const u16* from = q + (at < 0 ? 0 : at) * p.q_m + chunk * 8;
        u32 place = to + (chunk / 8) * Q_BAND + r * 128 + ((chunk % 8 ^ r % 8) << 4);
        copy_16_async(place, from, at < 0 ? 0 : 16);
    }
    wait_for_copies();
    publish_to_async_proxy();
}

// Draw work and gather queries. Warp 1 of the producers for consumer 0, which also announces items; warp 2 for 1.
__device__ void serve_queries(const Params& p, Shared& sh, u32 q_at, int half, int lane) {
    int total = half == 0 ? tabulate(p, sh, lane) : 0, t = blockIdx.x;
    for (int n = 0;; ++n) {
        int slot = n & 1, parity = n >> 1 & 1;
        if (half == 0) {
            Item x = {};
            x.tile = -1;
            if (t < total) x = item_of(p, sh, t);
            wait(sh.q_empty[slot], parity ^ 1);
            if (lane == 0) {
                sh.item[slot] = x;
                arrive(sh.item_full[slot]);
                if (t < total) {
                    // `total` tickets are drawn in all, the last of which puts the counter back.
                    int drawn = atomicAdd(p.ticket, 1);
                    if (drawn == total - 1) atomicExch(p.ticket, 0);
                    t = gridDim.x + drawn;
                }
            }
            t = __shfl_sync(~0u, t, 0);
        }
        wait(sh.item_full[slot], parity);
        Item x = sh.item[slot];
        if (x.tile >= 0) gather_queries(p, x, half, sh.row[slot] + half * ROWS, q_at + (slot * 2 + half) * Q_HALF, lane);
        __syncwarp();
        if (half == 1 && lane == 0) arrive(sh.q_empty[slot]);  // the item has been read
        arrive(sh.q_full[slot][half]);
        if (x.tile < 0) return;
    }
}

// One thread, or with pages one warp: tiles of K and V in the order of their use, scores of a tile before values of the tile above it.
__device__ void serve_keys(const Params& p, Shared& sh, u32 k_at, u32 v_at, int lane) {
    u32 k_loaded = 0, v_loaded = 0;
    for (int n = 0;; ++n) {
        int slot = n & 1, parity = n >> 1 & 1;
        wait(sh.item_full[slot], parity);
        Item x = sh.item[slot];
        if (PAGE) __syncwarp();
        if (!PAGE || lane == 0) arrive(sh.q_empty[slot]);
        if (x.tile < 0) return;
        int first = span_of(packing(p), x.b).first, b = PACKED ? 0 : x.b;
        int above = 0, page = 0, next = page_of(p, x.b, x.tile * TILE, x.count);  // pages of three tiles
        auto load = [&](u32 to, const TensorMap& map, u64& full, int tile, int page) {
            if (PAGE) load_boxes(p, to, map, full, tile * TILE, x.count, x.kv, page);
            else load_tile(to, map, full, first + tile * TILE, x.kv, b);
        };
#pragma unroll 1
        for (int tile = x.tile; tile >= -1; --tile) {
            above = page, page = next, next = page_of(p, x.b, max(tile - 1, 0) * TILE, x.count);
            if (tile >= 0) {
                u32 stage = k_loaded % STAGES, round = k_loaded / STAGES & 1;
                wait(sh.k_empty[stage], round ^ 1);
                load(k_at + stage * TILE_BYTES, p.k, sh.k_full[stage], tile, page);
                ++k_loaded;
            }
            if (tile < x.tile) {
                u32 stage = v_loaded % STAGES, round = v_loaded / STAGES & 1;
                wait(sh.v_empty[stage], round ^ 1);
                load(v_at + stage * TILE_BYTES, p.v, sh.v_full[stage], tile + 1, above);
                ++v_loaded;
            }
        }
    }
}

// One warp of each block: rows that are not in the set become 0, 32 rows of some or all heads at a time.
__device__ void clear_rows(const Params& p, int lane) {
    Packing all = packing(p);
    Places places = {32, 1};
    int blocks = PACKED ? p.T / places.every + p.B * places.apart : (p.M + 31) / 32;  // of all sequences, or of one
    // With many rows all heads of some at a time: to find which are kept takes longer than to clear a few heads of them.
    int heads = p.Hq / p.G, most = (i64)(PACKED ? 1 : p.B) * blocks >= 4 * gridDim.x ? heads : ZERO_HEADS;
    int shares = (heads + most - 1) / most;
    i64 jobs = (i64)(PACKED ? 1 : p.B) * p.G * blocks * shares;
    for (i64 t = blockIdx.x; t < jobs; t += gridDim.x) {
        int share = t % shares, set = t / shares / blocks, b = set / p.G, g = set % p.G, block = t / shares % blocks;
        if (PACKED) b = sequence_at(all, places, block), block -= first_place(all, places, b);
        int first = block * 32, rows = span_of(all, b).rows;
        if (PACKED && (first < 0 || first >= rows)) continue;
        int column = first + start_of(p, b), count = count_of(p, b, g);
        const int* columns = columns_of(p, b, g);
        int at = lower_bound(columns, p.indices_n, count, column, lane) + lane;
        u32 offset = at < count ? (u32)(columns[at * p.indices_n] - column) : 32;
        u32 kept = __reduce_or_sync(~0u, offset < 32 ? 1u << offset : 0);
        int head = g * heads + share * most, end = min(head + most, (g + 1) * heads);
        if (PACKED) {  // heads side by side
            uint4* out = out_from(p, b, head, first);
            for (int r = 0; r < 32; ++r)
                if (first + r < rows && !(kept >> r & 1))
#pragma unroll 4
                    for (int i = lane; i < (end - head) * CHUNKS; i += 32) __stcs(out + r * out_stride(p) + i, make_uint4(0, 0, 0, 0));
        } else {
            for (; head < end; ++head) {
                uint4* out = out_from(p, b, head, first) + lane % CHUNKS;
#pragma unroll 4
                for (int r = lane / CHUNKS; r < 32; r += 32 / CHUNKS)
                    if (first + r < rows && !(kept >> r & 1)) __stcs(out + r * out_stride(p), make_uint4(0, 0, 0, 0));
            }
        }
    }
}

// 128 threads: attention of 64 queries of each item.
__device__ void consume(const Params& p, Shared& sh, u32 q_at, u32 k_at, u32 v_at, int half, int thread) {
    const int TURN = 1 + half, OTHERS_TURN = 2 - half, MINE = 3 + half;  // named barriers
    int lane = thread % 32, warp = thread / 32, r = warp * 16 + lane / 4;
    float s[64], o[D / 2], largest[2], total[2], shrink[2];
    u32 weights[32], used = 0;  // key tiles used so far
    if (TAKE_TURNS && half == 1) pass_turn<256>(OTHERS_TURN);

    for (int n = 0;; ++n) {
        int slot = n & 1, parity = n >> 1 & 1;
        wait(sh.q_full[slot][half], parity);
        int tile = sh.item[slot].tile;
        if (tile < 0) return;
        u32 q = q_at + (slot * 2 + half) * Q_HALF;

        // The tile on the diagonal.
        u32 stage = used % STAGES, round = used / STAGES & 1;
        wait(sh.k_full[stage], round);
        pin(s);
        wgmma_fence();
        issue_scores<Q_BAND>(s, q, k_at + stage * TILE_BYTES);
        wgmma_wait<0>();
        pin(s);
        if (lane == 0) arrive(sh.k_empty[stage]);
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 > half * ROWS + r + i / 2 % 2 * 8) s[i] = -infinity();
        soften<true>(s, largest, total, shrink, p.scale);
        as_operand(weights, s);
        int held = sh.item[slot].count - tile * TILE;
        if (held < TILE) {  // what lies behind the set may be NaN, and 0 * NaN too: both consumers write the same zeros
            wait(sh.v_full[stage], round);
            for (int i = held * 8 + thread; i < TILE * 8; i += 128)
#pragma unroll
                for (int band = 0; band < BANDS; ++band)
                    store_16(v_at + stage * TILE_BYTES + band * TILE_BAND + i * 16, make_uint4(0, 0, 0, 0));
            publish_to_async_proxy();
            sync_threads<128>(MINE);
        }

        // Below it: scores of this tile run while the tile above is still being weighed, and its values follow.
        int accumulate = 0;
        for (int below = tile; below > 0; --below) {
            u32 next = (used + 1) % STAGES;
            wait(sh.k_full[next], (used + 1) / STAGES & 1);
            if (TAKE_TURNS) sync_threads<256>(TURN);
            pin(s);
            wgmma_fence();
            issue_scores<Q_BAND>(s, q, k_at + next * TILE_BYTES);
            wait(sh.v_full[stage], round);
            pin(o);
            wgmma_fence();
            issue_values(o, weights, v_at + stage * TILE_BYTES, accumulate);
            if (TAKE_TURNS) pass_turn<256>(OTHERS_TURN);
            wgmma_wait<1>();
            pin(s);
            if (lane == 0) arrive(sh.k_empty[next]);
            soften<false>(s, largest, total, shrink, p.scale);
            pin(s);
            wait(sh.v_full[stage], round);  // long done: its branch keeps the exponentials above, under the product
            wgmma_wait<0>();
            pin(o);
            if (lane == 0) arrive(sh.v_empty[stage]);
            as_operand(weights, s);
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= shrink[i / 2 % 2];
            ++used, stage = next, round = used / STAGES & 1, accumulate = 1;
        }
        wait(sh.v_full[stage], round);
        pin(o);
        wgmma_fence();
        issue_values(o, weights, v_at + stage * TILE_BYTES, accumulate);
        wgmma_wait<0>();
        pin(o);
        if (lane == 0) arrive(sh.v_empty[stage]);
        ++used;

        // Through the queries' own buffer, so that rows leave in whole lines.
        sync_threads<128>(MINE);  // nobody reads the queries any more
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float share = __frcp_rn(sum_of_four_lanes(total[h]));
#pragma unroll
            for (int j = 0; j < CHUNKS; ++j) {
                u32 place = q + (j / 8) * Q_BAND + (r + 8 * h) * 128 + ((j % 8 ^ r % 8) << 4) + lane % 4 * 4;
                store_4(place, pack(o[4 * j + 2 * h] * share, o[4 * j + 2 * h + 1] * share));
            }
        }
        __syncwarp();
        Item x = sh.item[slot];
        uint4* out = out_from(p, x.b, x.head, 0) + lane % CHUNKS;
#pragma unroll
        for (int i = lane / CHUNKS; i < 16; i += 32 / CHUNKS) {
            int row = sh.row[slot][half * ROWS + warp * 16 + i], chunk = lane % CHUNKS;
            u32 place = q + (chunk / 8) * Q_BAND + (warp * 16 + i) * 128 + ((chunk % 8 ^ i % 8) << 4);
            uint4 values = load_16(place);
            if (row >= 0) out[row * out_stride(p)] = values;
        }
        __syncwarp();
        if (lane == 0) arrive(sh.q_empty[slot]);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) sparse_attention(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    u32 base = shared_address(raw), pad = (1024 - base % 1024) % 1024;
    base += pad;
    Shared& sh = *(Shared*)(raw + pad + SHARED_AT);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(sh.item_full[i], 1);
            barrier_init(sh.q_full[i][0], 32);
            barrier_init(sh.q_full[i][1], 32);
            barrier_init(sh.q_empty[i], 8 + 2);  // warps of consumers; warp 0 and warp 2
        }
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(sh.k_full[i], 1);
            barrier_init(sh.v_full[i], 1);
            barrier_init(sh.k_empty[i], 8);
            barrier_init(sh.v_empty[i], 8);
        }
        barriers_ready();
    }
    __syncthreads();
    after_previous_kernel();
    next_kernel_may_start();

    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp < 4) {
        give_registers<PRODUCER_REGISTERS>();
        if (warp == 0) {
            if (PAGE || lane == 0) serve_keys(p, sh, base + K_AT, base + V_AT, lane);
        } else if (warp < 3) {
            serve_queries(p, sh, base + Q_AT, warp - 1, lane);
        } else {
            clear_rows(p, lane);
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, sh, base + Q_AT, base + K_AT, base + V_AT, warp / 4 - 1, threadIdx.x % 128);
    }
}
