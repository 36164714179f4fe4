// Barriers, copies and products of `hopper.h`.
#include "hopper.h"

#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <vector>

namespace hopper {

namespace {

char* shared(uint32_t at) { return emulator::shared_base() + at; }

// An mbarrier in its 8 bytes.
struct Barrier {
    uint16_t arrivals, pending;
    int32_t bytes : 31;
    uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8, "as the GPU's");

Barrier& barrier(uint32_t at) { return *(Barrier*)shared(at); }

void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
        b.phase ^= 1;
        b.pending = b.arrivals;
    }
    emulator::happen();
}

void arrive(Barrier& b) {
    if (b.pending == 0) {
        fprintf(stderr, "emulator: more arrivals at an mbarrier than it was made for\n");
        abort();
    }
    b.pending--;
    settle(b);
}

void came(uint32_t bar, uint32_t bytes) {
    Barrier& b = barrier(bar);
    b.bytes -= (int32_t)bytes;
    settle(b);
}

}  // namespace

void mbar_init(uint32_t bar, uint32_t arrivals) {
    Barrier& b = barrier(bar);
    b.arrivals = b.pending = (uint16_t)arrivals;
    b.bytes = 0;
    b.phase = 0;
}

void mbar_expect(uint32_t bar, uint32_t bytes) {
    Barrier& b = barrier(bar);
    b.bytes += (int32_t)bytes;
    arrive(b);
}

void mbar_arrive(uint32_t bar) { arrive(barrier(bar)); }

bool mbar_try(uint32_t bar, uint32_t parity) {
    if (barrier(bar).phase != parity) return true;
    emulator::poll();
    return barrier(bar).phase != parity;
}

// Rows of 128 bytes, their units of 16 swizzled.
static void swizzled_box(uint32_t at, const CUtensorMap* map) {
    if (at % 1024 == 0 && map->box_width * map->size == 128) return;
    fprintf(stderr, "emulator: a swizzled box of 128 bytes a row starts at a multiple of 1024 bytes, not %u\n", at);
    abort();
}
static uint32_t in_box(uint32_t row, uint32_t byte) { return row * 128 + (byte ^ (row % 8) << 4); }

void tma_load(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t bar) {
    swizzled_box(dst, map);
    const uint32_t size = (uint32_t)map->size;
    for (uint32_t row = 0; row < map->box_rows; row++)
        for (uint32_t n = 0; n < map->box_width; n++) {
            const long long r = (long long)y + row, c = (long long)x + n;
            const bool inside = r >= 0 && c >= 0 && r < (long long)map->rows && c < (long long)map->width;
            char* to = shared(dst + in_box(row, n * size));
            if (inside) memcpy(to, map->base + r * map->stride + c * size, size);
            else memset(to, 0, size);
        }
    came(bar, map->box_rows * 128);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
    if (dst % 16 != 0 || (uintptr_t)src % 16 != 0 || bytes % 16 != 0) {
        fprintf(stderr, "emulator: a bulk copy is of whole 16 bytes\n");
        abort();
    }
    memcpy(shared(dst), src, bytes);
    came(bar, bytes);
}

namespace {

// A copy from shared memory that a thread has asked for: of a box, or of bytes.
struct Leaving {
    const CUtensorMap* map;
    int x, y;
    void* dst;
    uint32_t src, bytes;
    bool committed;
};
struct Leavings {
    uint64_t block = ~0ull;
    std::vector<Leaving> all;
};
thread_local std::vector<Leavings> leavings(1024);

std::vector<Leaving>& leaving() {
    Leavings& l = leavings[threadIdx.x];
    if (l.block != emulator::block_number()) {
        // Copies that a kernel did not wait for never came.
        l.all.clear();
        l.block = emulator::block_number();
    }
    return l.all;
}

void leave(const Leaving& l) {
    if (!l.map) {
        memcpy(l.dst, shared(l.src), l.bytes);
        return;
    }
    for (uint32_t row = 0; row < l.map->box_rows; row++)
        for (uint32_t n = 0; n < l.map->box_width; n++) {
            const long long r = (long long)l.y + row, c = (long long)l.x + n;
            const uint32_t size = (uint32_t)l.map->size;
            if (r < 0 || c < 0 || r >= (long long)l.map->rows || c >= (long long)l.map->width) continue;
            memcpy((char*)l.map->base + r * l.map->stride + c * size, shared(l.src + in_box(row, n * size)), size);
        }
}

}  // namespace

void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
    if (src % 16 != 0 || (uintptr_t)dst % 16 != 0 || bytes % 16 != 0) {
        fprintf(stderr, "emulator: a bulk copy is of whole 16 bytes\n");
        abort();
    }
    leaving().push_back({nullptr, 0, 0, dst, src, bytes, false});
}

void tma_store(const CUtensorMap* map, int x, int y, uint32_t src) {
    swizzled_box(src, map);
    leaving().push_back({map, x, y, nullptr, src, 0, false});
}

void bulk_commit() {
    for (Leaving& l : leaving()) l.committed = true;
}

void bulk_wait_read() {
    std::vector<Leaving>& all = leaving();
    size_t n = 0;
    for (; n < all.size() && all[n].committed; n++) leave(all[n]);
    all.erase(all.begin(), all.begin() + n);
}

// Lane l gives the address of row l % 8 of block l / 8.
static uint32_t* rows(uint32_t addr) {
    uint32_t* all = (uint32_t*)emulator::warp_memory(32 * sizeof(uint32_t));
    all[emulator::lane()] = addr;
    emulator::wait_warp();
    return all;
}

void ldsm_trans(uint32_t (&r)[4], uint32_t addr) {
    const uint32_t *all = rows(addr), i = emulator::lane() / 4, j = emulator::lane() % 4;
    for (int b = 0; b < 4; b++) {
        uint16_t lo, hi;
        memcpy(&lo, shared(all[8 * b + 2 * j]) + 2 * i, 2);
        memcpy(&hi, shared(all[8 * b + 2 * j + 1]) + 2 * i, 2);
        r[b] = lo | (uint32_t)hi << 16;
    }
    emulator::wait_warp();
}

void stsm(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t *all = rows(addr), i = emulator::lane() / 4, j = emulator::lane() % 4, r[4] = {r0, r1, r2, r3};
    for (int b = 0; b < 4; b++) memcpy(shared(all[8 * b + i]) + 4 * j, &r[b], 4);
    emulator::wait_warp();
}

void stsm_trans(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t *all = rows(addr), i = emulator::lane() / 4, j = emulator::lane() % 4, r[4] = {r0, r1, r2, r3};
    for (int b = 0; b < 4; b++) {
        memcpy(shared(all[8 * b + 2 * j]) + 2 * i, &r[b], 2);
        memcpy(shared(all[8 * b + 2 * j + 1]) + 2 * i, (const char*)&r[b] + 2, 2);
    }
    emulator::wait_warp();
}

// ---- products ------------------------------------------------------------------------------------------------------

namespace {

struct Waiting {
    Product p;
    float a[2][16];  // this thread's rows of A: i, i + 8 of its warp's 16
    bool last;       // of its group
};

// Of a thread of the block: what it has asked for and not waited for.
struct Queue {
    uint64_t block = ~0ull;
    std::deque<Waiting> waiting;
};
thread_local std::vector<Queue> queues(1024);

Queue& queue() {
    Queue& q = queues[threadIdx.x];
    if (q.block != emulator::block_number()) {
        // A kernel that ends with products under way has not used them.
        q.waiting.clear();
        q.block = emulator::block_number();
    }
    return q;
}

float number(uint16_t x, bool half) { return half ? F16::number(x) : Bf16::number(x); }

// 16 numbers along the reduced dimension of row or column n of an operand.
void operand(float (&out)[16], uint64_t desc, int n, bool trans, bool half) {
    const uint32_t start = (uint32_t)(desc & 0x3fff) << 4, lead = (uint32_t)(desc >> 16 & 0x3fff) << 4, stride = (uint32_t)(desc >> 32 & 0x3fff) << 4;
    const bool swizzled = desc >> 62 == 1;
    for (int k = 0; k < 16; k++) {
        uint32_t at;
        if (!swizzled) at = start + k / 8 * lead + n / 8 * stride + n % 8 * 16 + k % 8 * 2;
        else if (!trans) at = start + n / 8 * stride + n % 8 * 128 + k * 2;
        else at = start + n / 64 * lead + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
        if (swizzled) at ^= (at >> 7 & 7) << 4;
        uint16_t x;
        memcpy(&x, shared(at), 2);
        out[k] = number(x, half);
    }
}

void compute(const Waiting& w) {
    const Product& p = w.p;
    const int warp = threadIdx.x % 128 / 32, i = emulator::lane() / 4, j = emulator::lane() % 4;
    float a[2][16];
    memcpy(a, w.a, sizeof a);
    if (!p.a) {
        operand(a[0], p.desc_a, 16 * warp + i, p.trans_a, p.half);
        operand(a[1], p.desc_a, 16 * warp + i + 8, p.trans_a, p.half);
    }
    for (int b = 0; b < p.columns / 8; b++)
        for (int e = 0; e < 2; e++) {
            float x[16];
            operand(x, p.desc_b, 8 * b + 2 * j + e, p.trans, p.half);
            for (int r = 0; r < 2; r++) {
                float sum = p.add ? p.d[4 * b + 2 * r + e] : 0.f;
                for (int k = 0; k < 16; k++) sum += a[r][k] * x[k];
                p.d[4 * b + 2 * r + e] = sum;
            }
        }
}

}  // namespace

void wgmma(const Product& p) {
    Waiting w{p, {}, false};
    if (p.a) {
        uint32_t* all = (uint32_t*)emulator::warp_memory(32 * 16);
        memcpy(all + 4 * emulator::lane(), p.a, 16);
        emulator::wait_warp();
        const int i = emulator::lane() / 4;
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < 16; k++) {
                const uint32_t word = all[4 * (4 * i + k % 8 / 2) + k / 8 * 2 + r];
                w.a[r][k] = number((uint16_t)(word >> 16 * (k % 2)), p.half);
            }
        emulator::wait_warp();
    }
    queue().waiting.push_back(w);
}

void wgmma_commit() {
    Queue& q = queue();
    if (!q.waiting.empty()) q.waiting.back().last = true;
}

void wgmma_wait_all_but(uint32_t groups) {
    Queue& q = queue();
    size_t ends = 0;
    for (const Waiting& w : q.waiting) ends += w.last;
    while (ends > groups) {
        const Waiting w = q.waiting.front();
        q.waiting.pop_front();
        compute(w);
        ends -= w.last;
    }
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
        uint32_t a[4], b[2];
    };
    Operands* all = (Operands*)emulator::warp_memory(32 * sizeof(Operands));
    memcpy(all[emulator::lane()].a, a, 16);
    all[emulator::lane()].b[0] = b0, all[emulator::lane()].b[1] = b1;
    emulator::wait_warp();
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int e = 0; e < 4; e++) {
        const int column = 2 * t + e % 2;
        for (int k = 0; k < 8; k++)
            d[e] += __uint_as_float(all[4 * g + k % 4].a[e / 2 + k / 4 * 2]) * __uint_as_float(all[4 * column + k % 4].b[k / 4]);
    }
    emulator::wait_warp();
}

}  // namespace hopper
