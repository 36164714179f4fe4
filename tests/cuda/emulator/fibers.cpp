// Runs the blocks of a launch: a fiber per thread, all of a block on one host thread.
#include "fibers.h"

#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

__thread Thread* now;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED_BYTES = 228 << 10;
// So many bytes behind what a block shares are looked at.
constexpr size_t BEHIND = 4096;
constexpr size_t WARP_BYTES = 4096;

#if defined(__x86_64__)
// Saves what a call must preserve, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
struct Context {
    void* sp = nullptr;
};
void enter();
void start(Context& c, char* stack) {
    void** sp = (void**)(stack + STACK) - 1;
    *--sp = (void*)enter;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    c.sp = sp;
}
void go(Context& from, Context& to) { emulator_switch(&from.sp, to.sp); }
#else
struct Context {
    ucontext_t u;
};
void enter();
void start(Context& c, char* stack) {
    getcontext(&c.u);
    c.u.uc_stack.ss_sp = stack;
    c.u.uc_stack.ss_size = STACK;
    c.u.uc_link = nullptr;
    makecontext(&c.u, enter, 0);
}
void go(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
#endif

// Threads that wait for each other.
struct Meeting {
    uint32_t live = 0, here = 0;
    uint64_t round = 0;
    void open() {
        if (live > 0 && here == live) here = 0, round++;
    }
};

// A copy that has not been done.
struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    bool valid;
};

struct Fiber {
    Thread thread;
    // Groups of copies, the last one not ended.
    std::vector<std::vector<Copy>> copies;
    Context context;
    bool done;
    // What it waits for, and the round that ends the wait.
    Meeting* at;
    uint64_t round;
    // What had happened when it began to wait for anything to happen; all ones: it does not.
    uint64_t seen;
};

// What a host thread needs to run one block after another.
struct Host {
    std::vector<char*> stacks;
    std::vector<Fiber> fibers;
    Meeting block;
    Meeting warps[32];
    Meeting named[16];
    uint64_t happened = 0;
    uint64_t blocks = 0;
    char* warp_memory[32];
    char* shared;
    std::vector<std::pair<const void*, size_t>> placed;  // key, offset
    size_t used;
    size_t dynamic;  // bytes whose number the launch said
    size_t used_before = 0;
    Context scheduler;
    Fiber* current;
    void (*kernel)(const void*);
    const void* launch;

    Host() {
        shared = (char*)aligned_alloc(1024, SHARED_BYTES);
        for (char*& m : warp_memory) m = (char*)aligned_alloc(64, WARP_BYTES);
        used_before = SHARED_BYTES;
    }
    ~Host() {
        free(shared);
        for (char* m : warp_memory) free(m);
        for (char* s : stacks) munmap(s, STACK);
    }
    bool run(uint32_t threads, size_t dynamic);
};

__thread Host* host __attribute__((tls_model("initial-exec")));

void enter() {
    Host* h = host;
    h->kernel(h->launch);
    h->current->done = true;
    go(h->current->context, h->scheduler);
    abort();
}

void wait(Meeting& m) {
    Host* h = host;
    Fiber* f = h->current;
    f->at = &m;
    f->round = m.round;
    m.here++;
    m.open();
    if (m.round != f->round) return;
    go(f->context, h->scheduler);
}

// True if every thread came to its end; false if some wait for others for ever.
bool Host::run(uint32_t threads, size_t bytes) {
    dynamic = bytes;
    while (stacks.size() < threads) {
        void* s = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (s == MAP_FAILED) return false;
        stacks.push_back((char*)s);
    }
    block = {threads, 0, 0};
    for (uint32_t w = 0; w < 32; w++) warps[w] = {threads > 32 * w ? (threads - 32 * w < 32 ? threads - 32 * w : 32) : 0, 0, 0};
    for (Meeting& m : named) m = {};
    memset(shared, 0xff, used_before);
    placed.clear();
    used = dynamic;
    blocks++;
    for (uint32_t i = 0; i < threads; i++) {
        start(fibers[i].context, stacks[i]);
        fibers[i].done = false;
        fibers[i].at = nullptr;
        fibers[i].seen = ~0ull;
        fibers[i].copies.assign(1, {});
    }
    uint32_t left = threads;
    while (left > 0) {
        bool moved = false;
        for (uint32_t i = 0; i < threads; i++) {
            Fiber& f = fibers[i];
            if (f.done || (f.at && f.at->round == f.round) || f.seen == happened) continue;
            moved = true;
            f.at = nullptr;
            f.seen = ~0ull;
            current = &f;
            now = &f.thread;
            go(scheduler, f.context);
            if (f.done) {
                // A thread that has ended is not waited for.
                left--;
                block.live--, block.open();
                warps[i / 32].live--, warps[i / 32].open();
            }
        }
        if (!moved) return false;
    }
    used_before = used;
    // What lies behind the block's shared memory is nobody's.
    for (size_t i = used; i < std::min(used + BEHIND, SHARED_BYTES); i++)
        if (shared[i] != (char)0xff) {
            fprintf(stderr, "emulator: a block wrote behind its %zu bytes of shared memory\n", used);
            used_before = SHARED_BYTES;
            return false;
        }
    return true;
}

}  // namespace

void wait_block() { wait(host->block); }
void wait_warp() { wait(host->warps[now->thread.x / 32]); }

void wait_named(uint32_t id, uint32_t threads) {
    Meeting& m = host->named[id];
    m.live = threads;
    wait(m);
}
void poll() {
    Fiber* f = host->current;
    f->seen = host->happened;
    go(f->context, host->scheduler);
}

void aligned(const void* p, size_t bytes) {
    if ((uintptr_t)p % bytes == 0) return;
    fprintf(stderr, "emulator: %p is no multiple of %zu bytes\n", p, bytes);
    abort();
}
void copy_later(void* shared, const void* global, uint32_t bytes, bool valid) {
    aligned(shared, bytes);
    aligned(global, bytes);
    host->current->copies.back().push_back({shared, global, bytes, valid});
}
void copies_end() { host->current->copies.emplace_back(); }
void copies_wait(uint32_t left) {
    auto& groups = host->current->copies;
    // What is not ended is no group yet.
    const size_t done = groups.size() - 1 > left ? groups.size() - 1 - left : 0;
    for (size_t i = 0; i < done; i++)
        for (const Copy& c : groups[i]) {
            if (c.valid) memcpy(c.to, c.from, c.bytes);
            else memset(c.to, 0, c.bytes);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}
void happen() { host->happened++; }
uint64_t block_number() { return host->blocks; }
char* shared_base(size_t bytes) {
    if (bytes > host->dynamic) {
        fprintf(stderr, "emulator: a block shares %zu bytes, its launch says %zu\n", bytes, host->dynamic);
        abort();
    }
    return host->shared;
}

void* warp_memory(size_t bytes) {
    if (bytes > WARP_BYTES) abort();
    return host->warp_memory[now->thread.x / 32];
}

void* shared_memory(const void* key, size_t bytes) {
    Host* h = host;
    for (auto& [k, at] : h->placed)
        if (k == key) return h->shared + at;
    const size_t at = (h->used + 127) / 128 * 128;
    if (at + bytes > SHARED_BYTES) {
        fprintf(stderr, "emulator: a block shares more than %zu bytes\n", SHARED_BYTES);
        abort();
    }
    h->placed.push_back({key, at});
    h->used = at + bytes;
    return h->shared + at;
}

bool run_grid(void (*kernel)(const void*), const void* launch, const uint32_t grid[3], uint32_t threads, size_t dynamic) {
    if (dynamic > SHARED_BYTES) return false;
    const uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    std::atomic<uint64_t> next{0};
    std::atomic<bool> right{true};
    auto work = [&](Host& h) {
        host = &h;
        h.kernel = kernel;
        h.launch = launch;
        h.fibers.resize(threads);
        for (uint64_t b; right && (b = next++) < blocks;) {
            const uint3 at = {(uint32_t)(b % grid[0]), (uint32_t)(b / grid[0] % grid[1]), (uint32_t)(b / grid[0] / grid[1])};
            for (uint32_t i = 0; i < threads; i++)
                h.fibers[i].thread = {{i, 0, 0}, at, {threads, 1, 1}, {grid[0], grid[1], grid[2]}};
            if (!h.run(threads, dynamic)) right = false;
        }
    };
    // One launch at a time: the caller holds the device's lock.
    static Host* hosts[16];
    const uint64_t processors = std::thread::hardware_concurrency();
    uint64_t n = processors < 1 ? 1 : processors > 16 ? 16 : processors;
    if (blocks < n) n = blocks;
    for (uint64_t i = 0; i < n; i++)
        if (!hosts[i]) hosts[i] = new Host;
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < n; i++) others.emplace_back([&, i] { work(*hosts[i]); });
    work(*hosts[0]);
    for (auto& t : others) t.join();
    return right;
}

float half_to_float(uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}

uint16_t float_to_half(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}

uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
