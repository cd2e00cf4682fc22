// Tiles whose rows lie in pages of a pool: boxes of a page or a part of one take the place of a whole tile. After
// hopper.cuh. Given from outside: PAGE, rows of a page, 0 where there are none.
//
// `Params` of a kernel have `table [B, max_blocks]`, its strides `table_b`, `table_n`, and `num_blocks`. What the table
// holds is not trusted: no copy leaves the pool.

#ifndef PAGE
#define PAGE 0
#endif

constexpr int BOX = PAGE && PAGE < TILE ? PAGE : TILE;  // rows of a copy
static_assert(PAGE == 0 || (PAGE & PAGE - 1) == 0 && BOX >= 8);

// Of a warp: what the table says of each lane's box in the tile that begins at row `first`; rows from `end` on are not
// read. Nothing waits for it before `load_boxes`.
template <class Params>
__device__ __forceinline__ int page_of(const Params& p, int b, int first, int end) {
#if PAGE
    int at = threadIdx.x % 32 * BOX;
    if (at < TILE && first + at < end) return p.table[b * p.table_b + (first + at) / PAGE * p.table_n];
#endif
    return 0;
}

// By a warp: the boxes of that tile that have rows before `end`.
template <class Params>
__device__ __forceinline__ void load_boxes(const Params& p, u32 to, const TensorMap& map, u64& full, int first, int end, int head, int page) {
#if PAGE
    int lane = threadIdx.x % 32, boxes = (min(TILE, end - first) + BOX - 1) / BOX;
    if (lane == 0) arrive_expecting(full, boxes * BANDS * BOX * 128);
    __syncwarp();
    page = min(max(page, 0), p.num_blocks - 1);
    if (lane < boxes) load_bands<TILE_BAND>(to + lane * BOX * 128, map, full, (first + lane * BOX) % PAGE, head, page);
#endif
}
