// Which tokens are kept: radix selection, no sort. A cluster of blocks a set (sm_90 on), or one block.
//
// A mass is the floor of an fp32 times 2**32, hence itself an fp32 that orders as its bits do: 30-bit keys, of which a
// digit of 10 bits leaves one exponent a bin. A bin then sums 24-bit significands exactly, in pieces of 10 bits that
// native 32-bit atomics add; shifted by the exponent they saturate as the contract says. From the top digit down, the
// threshold is in the bin where the sum from above reaches what is needed. Membership goes the same way by count, over
// 32-bit keys of the normalised scores.
//
// The blocks of a cluster have a histogram each. Each block adds up its share of the bins over all of them and tells
// all the totals (distributed shared memory); then every block scans the same totals and finds the same threshold.
// Few columns are read once and stay in registers; more are read again for every digit, from L1. Integers make every
// order of the additions give the same bits.
//
// Given from outside: THREADS of a block, CLUSTER blocks a set, HELD columns a thread has in registers, 0 for more than
// that, BY_RATIO 0 or 1, and PACKED 1 for sequences one after the other: then scores and indices are [G, T], strides of a
// batch 0, and N is the longest length.

#include "dependent.cuh"
#include "packed.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr u32 ALL = 0xFFFFFFFF;
constexpr u64 MOST = 0x7FFFFFFFFFFFFFFF;  // where masses and sums saturate
constexpr u32 WARPS = THREADS / 32;
constexpr u32 MASS_BITS = 10, MASS_BINS = 1 << MASS_BITS;
constexpr u32 KEY_BINS = 1 << 11;
#if !HELD
constexpr u32 AT_ONCE = 4;  // loads in flight a thread
#endif

static_assert(THREADS % 32 == 0 && THREADS <= MASS_BINS && MASS_BINS % THREADS == 0);

struct Params {
    const float* accumulated;  // [B, G, N]
    const float* normalized;   // [B, G, N]
    const int* leftpad_k;      // [B] or null
    const int* seqused_k;      // [B] or null
    int* indices;              // [B, G, N], dense
    int* counts;               // [B, G], dense
    const int* cu_seqlens;     // [B + 1] if PACKED
    i64 a_b, a_g, a_n, n_b, n_g, n_n;
    double share;  // tau or the ratio
    int G, N;
    int keep_first, keep_recent;  // at most N
    int B, T;                     // sequences, and rows of all of them, if PACKED
};

static_assert(sizeof(Params) == 136, "the launcher packs so much");

struct Sum {
    u32 count;
    u64 mass;
};

struct Found {
    u32 digit, count;  // the bin, and how many are in it
    Sum above;         // of the bins above it
};

struct Shared {
    u32 count[MASS_BINS], middle[MASS_BINS], low[MASS_BINS], keys[KEY_BINS];  // this block's
    u32 total_count[MASS_BINS], total_keys[KEY_BINS];                         // the cluster's
    u64 total_mass[MASS_BINS];
    u64 warp_mass[WARPS];
    u32 warp_count[WARPS];
    Found found;
    u32 above[CLUSTER * WARPS], ties[CLUSTER * WARPS];  // in each warp's columns
};

// --- the machine ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 rank_in_cluster() {
    return blockIdx.x % CLUSTER;
}

// The same variable in another block of the cluster.
template <typename T>
__device__ __forceinline__ T* of_peer(T* mine, u32 rank) {
#if CLUSTER > 1
    T* theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
#else
    return mine;
#endif
}

__device__ __forceinline__ void sync_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// --- keys -----------------------------------------------------------------------------------------------------------

// floor(a * 2**32) as an fp32, less an exponent of 126: 0 for no mass, 64 << 23 where it saturates.
__device__ __forceinline__ u32 mass_key(float a) {
    if (!(a > 0) || a == __int_as_float(0x7F800000))
        return 0;
    float mass = fminf(floorf(a * 4294967296.0f), 9223372036854775808.0f);
    return mass > 0 ? __float_as_uint(mass) - (126u << 23) : 0;
}

// `significand` (24 bits, or a sum of such) times the power of two that masses of this key have, saturating.
__device__ __forceinline__ u64 scaled(u64 significand, u32 key) {
    u32 exponent = key >> 23;
    if (exponent == 0)
        return 0;
    if (exponent < 24)
        return significand >> (24 - exponent);
    u32 shift = exponent - 24;
    return significand > (MOST >> shift) ? MOST : significand << shift;
}

__device__ __forceinline__ u32 significand(u32 key) {
    return (key & 0x7FFFFF) | 0x800000;
}

// In the order of preference: 0 a NaN, then the numbers.
__device__ __forceinline__ u32 score_key(float x) {
    if (x != x)
        return 0;
    u32 bits = x == 0 ? 0 : __float_as_uint(x);  // -0.0 ties with 0.0
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// --- columns --------------------------------------------------------------------------------------------------------

// The valid columns of a set, and the run of them that this warp looks at.
struct Columns {
    const float *accumulated, *normalized;
    i64 a_n, n_n;
    u32 first, end;                 // valid
    u32 forced_below, forced_from;  // columns kept whatever their scores: [first, below), [from, end)
    u32 begin, stop;                // this warp's; all lanes go on together, beyond `stop` too
#if HELD
    u32 masses[HELD], keys[HELD];  // of this lane's columns, 32 apart

    __device__ __forceinline__ void read() {
        u32 lane = threadIdx.x % 32;
        float a[HELD], x[HELD];
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            a[i] = BY_RATIO ? 0 : mass_score(begin + 32 * i + lane);
            x[i] = score(begin + 32 * i + lane);
        }
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            masses[i] = mass_key(a[i]);
            keys[i] = key(begin + 32 * i + lane, x[i]);
        }
    }
#endif

    __device__ __forceinline__ float mass_score(u32 j) const {
        return j < stop ? __ldg(accumulated + j * a_n) : 0;
    }

    __device__ __forceinline__ float score(u32 j) const {
        return j < stop ? __ldg(normalized + j * n_n) : 0;
    }

    __device__ __forceinline__ u32 key(u32 j, float score) const {
        return j < forced_below || j >= forced_from ? ALL : score_key(score);
    }
};

// see(column, whether it is one, key of its mass, key of its score) for this warp's columns, a column a lane.
template <bool MASSES, bool KEYS, typename See>
__device__ __forceinline__ void visit(const Columns& c, See see) {
    u32 lane = threadIdx.x % 32;
#if HELD
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) {
        if (c.begin + 32 * i >= c.stop)
            return;
        u32 j = c.begin + 32 * i + lane;
        see(j, j < c.stop, c.masses[i], c.keys[i]);
    }
#else
    for (u32 start = c.begin; start < c.stop; start += 32 * AT_ONCE) {
        float a[AT_ONCE], x[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            a[i] = MASSES ? c.mass_score(start + 32 * i + lane) : 0;
            x[i] = KEYS ? c.score(start + 32 * i + lane) : 0;
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            u32 j = start + 32 * i + lane;
            see(j, j < c.stop, MASSES ? mass_key(a[i]) : 0, KEYS ? c.key(j, x[i]) : 0);
        }
    }
#endif
}

// --- histograms -----------------------------------------------------------------------------------------------------

// Adds every active lane's pieces to its bin. Scores crowd into few bins, where atomics would queue: the bins of the
// first lanes are summed over the warp before.
template <bool MASS>
__device__ __forceinline__ void tally(Shared& s, bool active, u32 bin, u32 rest) {
    u32 lane = threadIdx.x % 32;
    u32* counts = MASS ? s.count : s.keys;
    u32 left = __ballot_sync(ALL, active);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
        if (left == 0)
            break;
        int leader = __ffs(left) - 1;
        u32 crowded = __shfl_sync(ALL, bin, leader);
        bool member = active && bin == crowded;
        u32 members = __ballot_sync(ALL, member);
        if (__popc(members) > 4) {
            u32 middle = 0, low = 0;
            if (MASS) {
                middle = __reduce_add_sync(ALL, member ? rest >> 10 : 0);
                low = __reduce_add_sync(ALL, member ? rest & 1023 : 0);
            }
            if (lane == leader) {
                atomicAdd(counts + bin, __popc(members));
                if (MASS && middle)
                    atomicAdd(s.middle + bin, middle);
                if (MASS && low)
                    atomicAdd(s.low + bin, low);
            }
            active = active && !member;
        }
        left &= ~members;
    }
    if (active) {
        atomicAdd(counts + bin, 1);
        if (MASS && rest >> 10)
            atomicAdd(s.middle + bin, rest >> 10);
        if (MASS && (rest & 1023))
            atomicAdd(s.low + bin, rest & 1023);
    }
}

// Counts the digit at `shift` of the masses whose digits above it are `prefix`.
__device__ __forceinline__ void tally_mass(Shared& s, bool active, u32 key, u32 prefix, u32 shift) {
    tally<true>(s, active && key >> shift >> MASS_BITS == prefix, key >> shift & (MASS_BINS - 1),
                key & ((1u << shift) - 1));
}

// The same of the scores, `bits` wide.
__device__ __forceinline__ void tally_key(Shared& s, bool active, u32 key, u32 prefix, u32 shift, u32 bits) {
    tally<false>(s, active && u64(key) >> shift >> bits == prefix, key >> shift & ((1u << bits) - 1), 0);
}

// Adds the histograms up over the cluster, tells every block the totals, and clears what was added.
template <bool MASS, bool KEYS>
__device__ __forceinline__ void combine(Shared& s, u32 prefix, u32 shift) {
    u32 rank = rank_in_cluster();
    sync_cluster();
    if (MASS) {
        for (u32 bin = rank * (MASS_BINS / CLUSTER) + threadIdx.x; bin < (rank + 1) * (MASS_BINS / CLUSTER);
             bin += THREADS) {
            u32 count = 0;
            u64 middle = 0, low = 0;
#pragma unroll 2  // more take registers that 1024 threads do not have
            for (u32 r = 0; r < CLUSTER; ++r) {
                count += *of_peer(s.count + bin, r);
                middle += *of_peer(s.middle + bin, r);
                low += *of_peer(s.low + bin, r);
            }
            u32 key = (prefix << MASS_BITS | bin) << shift;
            u64 mass = scaled(u64(count) * significand(key) + (middle << 10) + low, key);
#pragma unroll
            for (u32 r = 0; r < CLUSTER; ++r) {
                *of_peer(s.total_count + bin, r) = count;
                *of_peer(s.total_mass + bin, r) = mass;
            }
        }
    }
    if (KEYS) {
        for (u32 bin = rank * (KEY_BINS / CLUSTER) + threadIdx.x; bin < (rank + 1) * (KEY_BINS / CLUSTER);
             bin += THREADS) {
            u32 count = 0;
#pragma unroll
            for (u32 r = 0; r < CLUSTER; ++r)
                count += *of_peer(s.keys + bin, r);
#pragma unroll
            for (u32 r = 0; r < CLUSTER; ++r)
                *of_peer(s.total_keys + bin, r) = count;
        }
    }
    sync_cluster();
    for (u32 bin = threadIdx.x; bin < MASS_BINS; bin += THREADS)
        if (MASS)
            s.count[bin] = s.middle[bin] = s.low[bin] = 0;
    for (u32 bin = threadIdx.x; bin < KEY_BINS; bin += THREADS)
        if (KEYS)
            s.keys[bin] = 0;
}

__device__ __forceinline__ Sum plus(Sum a, Sum b) {
    u64 mass = a.mass + b.mass;
    return {a.count + b.count, mass < MOST ? mass : MOST};
}

// The sum of `mine` over the threads before this one, and over all.
__device__ __forceinline__ Sum sum_before(Shared& s, Sum mine, Sum& total) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sum sum = mine;  // up to and with this lane
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        Sum other = {__shfl_up_sync(ALL, sum.count, step), __shfl_up_sync(ALL, sum.mass, step)};
        if (lane >= step)
            sum = plus(sum, other);
    }
    if (lane == 31) {
        s.warp_count[warp] = sum.count;
        s.warp_mass[warp] = sum.mass;
    }
    Sum before = {__shfl_up_sync(ALL, sum.count, 1), __shfl_up_sync(ALL, sum.mass, 1)};
    if (lane == 0)
        before = {0, 0};
    __syncthreads();
    Sum warps = {0, 0};
    if (lane < WARPS)
        warps = {s.warp_count[lane], s.warp_mass[lane]};
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        Sum other = {__shfl_up_sync(ALL, warps.count, step), __shfl_up_sync(ALL, warps.mass, step)};
        if (lane >= step)
            warps = plus(warps, other);
    }
    total = {__shfl_sync(ALL, warps.count, 31), __shfl_sync(ALL, warps.mass, 31)};
    u32 last = warp == 0 ? 0 : warp - 1;
    Sum earlier = {__shfl_sync(ALL, warps.count, last), __shfl_sync(ALL, warps.mass, last)};
    return warp == 0 ? before : plus(earlier, before);
}

// ceil(share * total), at most `total`.
__device__ __forceinline__ u64 needed(double share, u64 total) {
    double wanted = ceil(share * double(total));
    u64 need = wanted < 9223372036854775808.0 ? u64(wanted) : total;
    return need < total ? need : total;
}

// The bin from the top down where the mass reaches `need`; at the first digit, where `need` is still 0, the share of
// the total that this digit shows. False where there is no mass at all.
__device__ __forceinline__ bool find_mass(Shared& s, u64& need, double share, Found& found) {
    constexpr u32 OWN = MASS_BINS / THREADS;
    u32 top = MASS_BINS - 1 - threadIdx.x * OWN;
    Sum bins[OWN], mine = {0, 0}, total;
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        bins[i] = {s.total_count[top - i], s.total_mass[top - i]};
        mine = plus(mine, bins[i]);
    }
    Sum above = sum_before(s, mine, total);
    if (need == 0)
        need = needed(share, total.mass);
    if (total.mass == 0) {
        __syncthreads();  // all have read what the next scan writes
        return false;
    }
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        Sum reached = plus(above, bins[i]);
        if (above.mass < need && reached.mass >= need)
            s.found = {top - i, bins[i].count, above};
        above = reached;
    }
    __syncthreads();
    found = s.found;
    return true;
}

// The bin from the top down where the count reaches `need`.
__device__ __forceinline__ void find_key(Shared& s, u32 need, Found& found) {
    constexpr u32 OWN = KEY_BINS / THREADS;
    u32 top = KEY_BINS - 1 - threadIdx.x * OWN;
    u32 bins[OWN];
    Sum mine = {0, 0}, total;
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        bins[i] = s.total_keys[top - i];
        mine.count += bins[i];
    }
    Sum above = sum_before(s, mine, total);
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        if (above.count < need && above.count + bins[i] >= need)
            s.found = {top - i, bins[i], above};
        above.count += bins[i];
    }
    __syncthreads();
    found = s.found;
}

// --- the selection --------------------------------------------------------------------------------------------------

// The first digits of both, which need nothing of each other.
__device__ __forceinline__ void first_digits(Shared& s, const Columns& c) {
    visit<!BY_RATIO, true>(c, [&](u32, bool valid, u32 mass, u32 key) {
        if (!BY_RATIO)
            tally_mass(s, valid, mass, 0, 20);
        tally_key(s, valid, key, 0, 21, 11);
    });
    combine<!BY_RATIO, true>(s, 0, 20);
}

// The least number of largest masses whose sum reaches its share; all where there is no mass.
__device__ __forceinline__ u32 count_by_mass(Shared& s, const Columns& c, double share) {
    u64 need = 0;
    Found found;
    if (!find_mass(s, need, share, found))
        return c.end - c.first;
    u32 prefix = found.digit, more = found.above.count;
    need -= found.above.mass;
    for (u32 shift = 20; shift > 0 && found.count > 1;) {
        shift -= MASS_BITS;
        visit<true, false>(c, [&](u32, bool valid, u32 mass, u32) { tally_mass(s, valid, mass, prefix, shift); });
        combine<true, false>(s, prefix, shift);
        find_mass(s, need, share, found);
        prefix = prefix << MASS_BITS | found.digit;
        more += found.above.count;
        need -= found.above.mass;
    }
    if (found.count == 1)
        return more + 1;
    u64 mass = scaled(significand(prefix), prefix);  // the digits are all known
    return more + u32((need - 1) / mass) + 1;
}

// Keys above `prefix`, their low `shift` bits left out, are members, and the first `ties` columns at it.
struct Threshold {
    u32 prefix, shift, ties;
};

__device__ __forceinline__ Threshold threshold(Shared& s, const Columns& c, u32 p) {
    Found found;
    find_key(s, p, found);
    Threshold t = {found.digit, 21, p - found.above.count};
    while (t.shift > 0 && found.count > t.ties) {  // else all of the bin are members
        u32 bits = t.shift == 21 ? 11 : 10;
        t.shift -= bits;
        visit<false, true>(c, [&](u32, bool valid, u32, u32 key) {
            tally_key(s, valid, key, t.prefix, t.shift, bits);
        });
        combine<false, true>(s, 0, 0);
        find_key(s, t.ties, found);
        t.prefix = t.prefix << bits | found.digit;
        t.ties -= found.above.count;
    }
    return t;
}

// The members in ascending order.
__device__ __forceinline__ void emit(Shared& s, const Columns& c, Threshold t, int* out) {
    u32 lane = threadIdx.x % 32, warp = rank_in_cluster() * WARPS + threadIdx.x / 32;  // of the cluster
    u32 above = 0, ties = 0;
    visit<false, true>(c, [&](u32, bool valid, u32, u32 key) {
        key >>= t.shift;
        above += __popc(__ballot_sync(ALL, valid && key > t.prefix));
        ties += __popc(__ballot_sync(ALL, valid && key == t.prefix));
    });
    if (lane < CLUSTER) {
        *of_peer(s.above + warp, lane) = above;
        *of_peer(s.ties + warp, lane) = ties;
    }
    sync_cluster();
    above = ties = 0;  // in the warps before
    for (u32 other = lane; other < warp; other += 32) {
        above += s.above[other];
        ties += s.ties[other];
    }
    above = __reduce_add_sync(ALL, above);
    ties = __reduce_add_sync(ALL, ties);
    u32 taken = above + (ties < t.ties ? ties : t.ties), lower = (1u << lane) - 1;
    visit<false, true>(c, [&](u32 j, bool valid, u32, u32 key) {
        key >>= t.shift;
        bool tie = valid && key == t.prefix;
        u32 tied = __ballot_sync(ALL, tie);
        bool member = tie ? ties + __popc(tied & lower) < t.ties : valid && key > t.prefix;
        u32 members = __ballot_sync(ALL, member);
        if (member)
            out[taken + __popc(members & lower)] = j;
        ties += __popc(tied);
        taken += __popc(members);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
        select_tokens(const __grid_constant__ Params p) {
    __shared__ Shared s;
    for (u32 bin = threadIdx.x; bin < MASS_BINS; bin += THREADS)
        s.count[bin] = s.middle[bin] = s.low[bin] = 0;
    for (u32 bin = threadIdx.x; bin < KEY_BINS; bin += THREADS)
        s.keys[bin] = 0;
    after_previous_kernel();
    next_kernel_may_start();

    u32 set = blockIdx.x / CLUSTER, rank = rank_in_cluster();
    i64 b = set / p.G, g = set % p.G;
    i64 first = p.leftpad_k && p.leftpad_k[b] > 0 ? p.leftpad_k[b] : 0;
    Span span = span_of({p.cu_seqlens, p.B, p.T, p.N}, b);
    i64 end = p.seqused_k && p.seqused_k[b] < span.rows ? p.seqused_k[b] : span.rows;
    u32 n = end > first ? end - first : 0;
    __syncthreads();

    u32 kept = 0;
    int* out = p.indices + (PACKED ? g * p.T + span.first : i64(set) * p.N);
    if (n > 0) {
        Columns c;
        c.accumulated = p.accumulated + b * p.a_b + g * p.a_g + span.first * p.a_n;
        c.normalized = p.normalized + b * p.n_b + g * p.n_g + span.first * p.n_n;
        c.a_n = p.a_n;
        c.n_n = p.n_n;
        c.first = first;
        c.end = end;
        c.forced_below = first + p.keep_first;
        c.forced_from = end > p.keep_recent ? end - p.keep_recent : 0;
        constexpr u32 RUNS = 32 * CLUSTER * WARPS;
        u32 run = (n + RUNS - 1) / RUNS * 32;
        c.begin = c.first + (rank * WARPS + threadIdx.x / 32) * run;
        c.stop = c.begin + run < c.end ? c.begin + run : c.end;
#if HELD
        c.read();
#endif

        first_digits(s, c);
        kept = BY_RATIO ? u32(ceil(p.share * double(n))) : count_by_mass(s, c, p.share);
        u64 least = u64(p.keep_first) + p.keep_recent;
        least = least > 1 ? least : 1;
        least = least < n ? least : n;
        kept = kept > least ? kept : least;
        emit(s, c, threshold(s, c, kept), out);
    }
    for (i64 j = i64(kept) + rank * THREADS + threadIdx.x; j < span.rows; j += CLUSTER * THREADS)
        out[j] = -1;
    if (rank == 0 && threadIdx.x == 0)
        p.counts[set] = kept;
}
