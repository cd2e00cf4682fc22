// What the Hopper kernels share: barriers and copies, tensor cores, and how a tile lies in shared memory.
//
// Given from outside: HEAD_DIM 64 or 128, HALF 1 for fp16 and 0 for bf16.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int D = HEAD_DIM;
constexpr int TILE = 128;             // rows of a tile
constexpr int ROWS = TILE / 2;        // rows that a warpgroup multiplies
constexpr int BAND = 64;              // columns of 128 bytes, the width of the swizzle
constexpr int BANDS = D / BAND;
constexpr int CHUNKS = D / 8;         // 16-byte pieces of a row
constexpr u32 TILE_BAND = TILE * 128; // bytes
constexpr u32 TILE_BYTES = BANDS * TILE_BAND;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

// --- barriers and copies -------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64& barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u64& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Returns once the phase of this parity has completed; parity 1 of a fresh barrier counts as completed.
__device__ __forceinline__ void wait(u64& barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

template <int THREADS>
__device__ __forceinline__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

template <int THREADS>
__device__ __forceinline__ void pass_turn(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Ordinary writes to shared memory before this are seen by the tensor cores and TMA after the next barrier.
__device__ __forceinline__ void publish_to_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_to_async_proxy();
}

// 16 bytes into shared memory, zeros in place of `bytes` = 0 of them.
__device__ __forceinline__ void copy_16_async(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void store_4(u32 to, u32 x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_16(u32 to, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_16(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// A map's first use would wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The rows of one of the map's boxes, each band of them in so many bytes; `full` has to expect them.
template <u32 BYTES>
__device__ __forceinline__ void load_bands(u32 to, const TensorMap& map, u64& full, int row, int head, int b) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
            "[%6];" ::"r"(to + band * BYTES),
            "l"(&map), "r"(band * BAND), "r"(row), "r"(head), "r"(b), "r"(shared_address(&full))
            : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const TensorMap& map, u64& full, int row, int head, int b) {
    arrive_expecting(full, TILE_BYTES);
    load_bands<TILE_BAND>(to, map, full, row, head, b);
}

// --- tensor cores --------------------------------------------------------------------------------------------------

// Operand in shared memory, 128-byte swizzle, 8 rows of a band every 1024 bytes. `across` bytes lead to the next band
// where the bands are the operand's outer dimension (V); ignored where they are its depth (Q, K).
__device__ __forceinline__ u64 operand(u32 address, u32 across) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(across >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads of accumulators before a wait, or writes after an issue.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#if HALF
#define KIND "f32.f16.f16"
#else
#define KIND "f32.bf16.bf16"
#endif
#define R4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define R16(x, i) R4(x, i), R4(x, i + 4), R4(x, i + 8), R4(x, i + 12)
#define N32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define N64 \
    N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// S [64, 128] (+)= A [64, 16] B [128, 16]^T, both in shared memory.
__device__ __forceinline__ void multiply(float (&s)[64], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." KIND " {" N64 "}, %64, %65, p, 1, 1, 0, 0;\n"
        "}\n"
        : R16(s, 0), R16(s, 16), R16(s, 32), R16(s, 48)
        : "l"(a), "l"(b), "r"(accumulate));
}

// O [64, D] (+)= A [64, 16] B [16, D], A in registers.
__device__ __forceinline__ void multiply(float (&o)[64], const u32* a, u64 b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." KIND " {" N64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n"
        "}\n"
        : R16(o, 0), R16(o, 16), R16(o, 32), R16(o, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void multiply(float (&o)[32], const u32* a, u64 b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." KIND " {" N32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n"
        "}\n"
        : R16(o, 0), R16(o, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// S [64, 128] = A [64, D] B [128, D]^T, both in shared memory; B in bands of TILE rows, A in bands of so many bytes.
template <u32 A_BAND>
__device__ __forceinline__ void issue_scores(float (&s)[64], u32 at_a, u32 at_b) {
    u64 a = operand(at_a, 16), b = operand(at_b, 16);
#pragma unroll
    for (int i = 0; i < D / 16; ++i)  // 16 columns are 32 bytes of a band
        multiply(s, a + (i % 4) * 2 + (i / 4) * (A_BAND >> 4), b + (i % 4) * 2 + (i / 4) * (TILE_BAND >> 4), i > 0);
    wgmma_commit();
}

// --- lanes: a thread holds rows r and r + 8 of S; s[4 j + 2 h + i] is row r + 8 h, column 8 j + 2 (lane % 4) + i ----

__device__ __forceinline__ float max_of_four_lanes(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_four_lanes(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
