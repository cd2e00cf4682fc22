// In place of zipvl_kernels/_cuda/hopper.cuh on the CPU: the same functions. Copies and products are done at once; tiles lie
// in shared memory as there, swizzled, and sums and fragments are spread over the lanes in the same way.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int D = HEAD_DIM;
constexpr int TILE = 128;
constexpr int ROWS = TILE / 2;
constexpr int BAND = 64;
constexpr int BANDS = D / BAND;
constexpr int CHUNKS = D / 8;
constexpr u32 TILE_BAND = TILE * 128;
constexpr u32 TILE_BYTES = BANDS * TILE_BAND;

struct alignas(64) TensorMap {
    const u16* data;
    u64 sizes[4], strides[3];  // D, N, H, B; in bytes
    u64 rows;                  // of a box
    u64 rest[7];
};
static_assert(sizeof(TensorMap) == 128);

static float number(u16 x) {
#if HALF
    return from_bits<_Float16>(x);
#else
    return from_bits<float>((u64)x << 16);
#endif
}

static u16 rounded(float x) {
#if HALF
    return as_bits((_Float16)x);
#else
    u32 bits = as_bits(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
}

static u32 pack(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
static float infinity() { return INFINITY; }
static float exp2_fast(float x) { return exp2f(x); }

// --- barriers and copies -------------------------------------------------------------------------------------------

struct Barrier {
    u16 expected, pending;
    int bytes_and_phase;
};

static Barrier& of(u64& barrier) { return (Barrier&)barrier; }

static void complete(Barrier& x) {
    if (x.pending == 0 && x.bytes_and_phase >> 1 == 0) x.pending = x.expected, x.bytes_and_phase ^= 1;
}

static u32 shared_address(const void* p) { return (const char*)p - raw; }
static void barrier_init(u64& barrier, u32 arrivals) { of(barrier) = {(u16)arrivals, (u16)arrivals, 0}; }
static void arrive(u64& barrier) { --of(barrier).pending, complete(of(barrier)); }
static void arrive_expecting(u64& barrier, u32 bytes) { of(barrier).bytes_and_phase += 2 * bytes, arrive(barrier); }
static void wait(u64& barrier, u32 parity) {
    wait_until([&] { return (of(barrier).bytes_and_phase & 1) != (int)parity; });
}

template <int COUNT>
static void sync_threads(int barrier) {
    sync_at(barriers[barrier], COUNT);
}
template <int COUNT>
static void pass_turn(int barrier) {
    arrive_at(barriers[barrier]);
}

static void publish_to_async_proxy() {}
static void barriers_ready() {}
static void prefetch_map(const TensorMap&) {}
static void copy_16_async(u32 to, const void* from, int bytes) { memset(raw + to, 0, 16), memcpy(raw + to, from, bytes); }
static void wait_for_copies() {}
static void store_4(u32 to, u32 x) { memcpy(raw + to, &x, 4); }
static void store_16(u32 to, uint4 x) { memcpy(raw + to, &x, 16); }
static uint4 load_16(u32 from) { return *(uint4*)(raw + from); }
template <int>
static void give_registers() {}
template <int>
static void take_registers() {}

// Where a number of a tile lies, in bands of so many bytes.
static u16& at(u32 tile, u32 band_bytes, int row, int column) {
    u32 place = tile + column / BAND * band_bytes + row * 128;
    return *(u16*)(raw + place + ((column % BAND / 8 ^ row % 8) << 4) + column % 8 * 2);
}

template <u32 BYTES>
static void load_bands(u32 to, const TensorMap& map, u64& full, int row, int head, int b) {
    for (int r = 0; r < (int)map.rows; ++r)
        for (int c = 0; c < D; ++c) {
            i64 n = row + r;
            bool inside = n >= 0 && n < (i64)map.sizes[1] && head >= 0 && head < (int)map.sizes[2] && b < (int)map.sizes[3];
            i64 offset = n * map.strides[0] + head * map.strides[1] + b * map.strides[2];
            at(to, BYTES, r, c) = inside ? *(const u16*)((const char*)map.data + offset + 2 * c) : 0;
        }
    of(full).bytes_and_phase -= 2 * (map.rows * D * 2), complete(of(full));
}

static void load_tile(u32 to, const TensorMap& map, u64& full, int row, int head, int b) {
    arrive_expecting(full, TILE_BYTES);
    load_bands<TILE_BAND>(to, map, full, row, head, b);
}

// --- tensor cores --------------------------------------------------------------------------------------------------

static u64 operand(u32 address, u32) { return (address & 0x3FFFF) >> 4; }
static void wgmma_fence() {}
static void wgmma_commit() {}
template <int>
static void wgmma_wait() {}
template <int N>
static void pin(float (&)[N]) {}

// O [64, D] (+)= A [64, 16] B [16, D], A in the registers of four lanes.
static void multiply(float (&o)[D / 2], const u32* a, u64 b, int accumulate) {
    float rows[2][16];
    for (int part = 0; part < 4; ++part) {
        auto lanes = exchange(a[part]) + threadIdx.x % 32 / 4 * 4;
        for (int lane = 0; lane < 4; ++lane)
            for (int i = 0; i < 2; ++i) rows[part % 2][part / 2 * 8 + lane * 2 + i] = number(lanes[lane] >> 16 * i);
    }
    for (int n = 0; n < D / 2; ++n) {
        int column = n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2;
        float sum = accumulate ? o[n] : 0;
        for (int k = 0; k < 16; ++k) sum += rows[n / 2 % 2][k] * number(at((u32)b << 4, TILE_BAND, k, column));
        o[n] = sum;
    }
}

// S [64, 128] = A [64, D] B [128, D]^T, both in shared memory.
template <u32 A_BAND>
static void issue_scores(float (&s)[64], u32 at_a, u32 at_b) {
    int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    for (int n = 0; n < 64; ++n) {
        float sum = 0;
        for (int c = 0; c < D; ++c)
            sum += number(at(at_a, A_BAND, row + n / 2 % 2 * 8, c)) *
                   number(at(at_b, TILE_BAND, n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2, c));
        s[n] = sum;
    }
}

static float max_of_four_lanes(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

static float sum_of_four_lanes(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
