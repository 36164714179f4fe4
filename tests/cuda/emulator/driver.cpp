// The functions of the CUDA driver that the backend calls, over the kernels of `cuda/` compiled as C++.
//
// What it shows: that every launch asks for a kernel that exists, with as many bytes of arguments and no more threads than it
// takes; that kernels read nothing past the end of an allocation (a page without access follows it), and nothing that was not
// written (new memory and shared memory hold NaN); that copies in the background are aligned and waited for; that the numbers are right.
// What it does not show: races between threads that do not wait for each other, speed, and what the GPU's compiler makes of the sources.
//
// Memory is the host's, work is done when its call returns, and an event is the time when it was recorded. The environment says
// what else the device should be:
//   GATEDELTA_EMULATE=devices=0|version=11040|arch=75|memory=1000000|launch=719|init=100     (any of them, with commas)
// and with `tell=1` the name of each kernel goes to the standard error as it starts.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "fibers.h"
#include "hopper.h"

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
};

std::recursive_mutex device;
std::map<char*, std::pair<size_t, size_t>> allocations;  // first byte asked for -> bytes of the mapping, bytes asked for
size_t in_use = 0;

typedef std::lock_guard<std::recursive_mutex> Lock;

long setting(const char* name, long otherwise) {
    const char* all = getenv("GATEDELTA_EMULATE");
    if (!all) return otherwise;
    std::string text = std::string(",") + all, key = std::string(",") + name + "=";
    const size_t at = text.find(key);
    return at == std::string::npos ? otherwise : atol(text.c_str() + at + key.size());
}

size_t memory_bytes() { return (size_t)setting("memory", 8L << 30); }

long arch() { return setting("arch", 80); }

// What a block may share if it asks for it.
long shared_bytes() { return (arch() >= 90 ? 227 : 163) << 10; }

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Function {
    std::string name;
    void (*body)(const void*);
    uint32_t threads;
    std::vector<uint32_t> sizes;  // of its parameters
    bool several;                 // it is given a list of parameters, else the one
};

struct Event {
    double at = 0;
};

struct KernelNode {
    Function* f;
    uint32_t grid[3], block, shared;
    std::vector<std::vector<char>> params;
};

// Nodes that wait for the same ones.
struct Stage {
    std::vector<void*> after, nodes;
};
struct Graph {
    std::vector<Stage> stages;
};

// The driver's CUDA_KERNEL_NODE_PARAMS (v2).
struct KernelNodeParams {
    Function* func;
    unsigned grid[3], block[3], shared;
    void** args;
    void** extra;
    void* kern;
    void* ctx;
};

// True if all of [p, p + bytes) is device memory.
bool is_device(const void* p, size_t bytes) {
    auto it = allocations.upper_bound((char*)p);
    if (it == allocations.begin()) return false;
    --it;
    // Memory may be read up to a multiple of 16, as it is on a GPU.
    return (char*)p + bytes <= it->first + (it->second.second + 15) / 16 * 16;
}

int launch(Function* f, const uint32_t grid[3], const uint32_t block[3], uint32_t shared, void* const* args) {
    if (const long failure = setting("launch", 0)) return (int)failure;
    const uint64_t sides[3] = {grid[0], grid[1], grid[2]}, most[3] = {0x7fffffff, 65535, 65535};
    for (int i = 0; i < 3; i++)
        if (sides[i] == 0 || sides[i] > most[i]) return INVALID_VALUE;
    if (block[1] != 1 || block[2] != 1 || block[0] == 0 || block[0] > f->threads) {
        fprintf(stderr, "emulator: %s takes at most %u threads, not %u x %u x %u\n", f->name.c_str(), f->threads, block[0], block[1],
                block[2]);
        return INVALID_VALUE;
    }
    if (shared > (uint32_t)shared_bytes()) return INVALID_VALUE;
    if (setting("tell", 0)) fprintf(stderr, "kernel %s\n", f->name.c_str());
    return emulator::run_grid(f->body, f->several ? (const void*)args : args[0], grid, block[0], shared) ? SUCCESS : LAUNCH_FAILED;
}

}  // namespace

#define CU extern "C" __attribute__((visibility("default"))) int

CU cuInit(unsigned) { return (int)setting("init", 0); }
CU cuDriverGetVersion(int* v) {
    *v = (int)setting("version", 13000);
    return SUCCESS;
}
CU cuDeviceGetCount(int* n) {
    *n = (int)setting("devices", 1);
    return SUCCESS;
}
CU cuDeviceGet(int* d, int i) {
    *d = i;
    return i < setting("devices", 1) ? SUCCESS : 101;
}
CU cuDeviceGetName(char* name, int n, int) {
    snprintf(name, n, "CUDA emulator");
    return SUCCESS;
}
CU cuDeviceTotalMem_v2(size_t* n, int) {
    *n = memory_bytes();
    return SUCCESS;
}
CU cuDeviceGetAttribute(int* v, int attribute, int) {
    switch (attribute) {
        case 1: *v = 1024; break;            // threads of a block
        case 8: *v = 48 << 10; break;        // shared memory of a block
        case 16: *v = 8; break;              // multiprocessors
        case 18: *v = 0; break;              // integrated
        case 75: *v = (int)arch() / 10; break;      // compute capability
        case 76: *v = (int)arch() % 10; break;
        case 97: *v = (int)shared_bytes(); break;      // shared memory of a block that asks for more
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
CU cuDevicePrimaryCtxRetain(void** c, int) {
    *c = (void*)1;
    return SUCCESS;
}
CU cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
CU cuCtxSetCurrent(void*) { return SUCCESS; }
CU cuStreamCreate(void** s, unsigned) {
    *s = (void*)1;
    return SUCCESS;
}
CU cuStreamDestroy_v2(void*) { return SUCCESS; }
CU cuStreamSynchronize(void*) { return SUCCESS; }

CU cuMemAlloc_v2(unsigned long long* p, size_t bytes) {
    Lock lock(device);
    if (bytes == 0) return INVALID_VALUE;
    const size_t page = 4096, whole = (bytes + 15) / 16 * 16, pages = (whole + page - 1) / page * page;
    if (whole > memory_bytes() - in_use) return OUT_OF_MEMORY;
    char* m = (char*)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return OUT_OF_MEMORY;
    if (mprotect(m + pages, page, PROT_NONE) != 0) return OUT_OF_MEMORY;
    char* first = m + (pages - whole);
    // Large allocations are sparse: touching all of their pages would be slow.
    if (whole <= 64 << 20) memset(first, 0xff, whole);
    allocations[first] = {pages + page, bytes};
    in_use += whole;
    *p = (unsigned long long)first;
    return SUCCESS;
}
CU cuMemFree_v2(unsigned long long p) {
    Lock lock(device);
    auto it = allocations.find((char*)p);
    if (it == allocations.end()) return INVALID_VALUE;
    const size_t whole = (it->second.second + 15) / 16 * 16, pages = it->second.first - 4096;
    munmap(it->first + whole - pages, it->second.first);
    in_use -= whole;
    allocations.erase(it);
    return SUCCESS;
}
CU cuMemGetInfo_v2(size_t* left, size_t* all) {
    Lock lock(device);
    *all = memory_bytes();
    *left = *all - in_use;
    return SUCCESS;
}
CU cuMemHostAlloc(void** p, size_t bytes, unsigned) {
    *p = malloc(bytes);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
CU cuMemFreeHost(void* p) {
    free(p);
    return SUCCESS;
}
CU cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void*) {
    Lock lock(device);
    if (!is_device((void*)to, bytes)) return INVALID_VALUE;
    memcpy((void*)to, from, bytes);
    return SUCCESS;
}
CU cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void*) {
    Lock lock(device);
    if (!is_device((void*)from, bytes)) return INVALID_VALUE;
    memcpy(to, (void*)from, bytes);
    return SUCCESS;
}

CU cuEventCreate(void** e, unsigned) {
    *e = new Event;
    return SUCCESS;
}
CU cuEventDestroy_v2(void* e) {
    delete (Event*)e;
    return SUCCESS;
}
CU cuEventRecord(void* e, void*) {
    ((Event*)e)->at = seconds();
    return SUCCESS;
}
CU cuEventQuery(void*) { return SUCCESS; }
CU cuEventSynchronize(void*) { return SUCCESS; }
CU cuEventElapsedTime(float* ms, void* a, void* b) {
    *ms = (float)((((Event*)b)->at - ((Event*)a)->at) * 1e3);
    return SUCCESS;
}

CU cuModuleLoadData(void** m, const void* image) {
    // A fat binary starts with this word.
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (magic != 0xba55ed50) return INVALID_IMAGE;
    *m = (void*)image;
    return SUCCESS;
}
CU cuModuleUnload(void*) { return SUCCESS; }
CU cuModuleGetFunction(void** f, void*, const char* name) {
    static std::map<std::string, Function> functions;
    Lock lock(device);
    Function& found = functions[name];
    if (!found.body) {
        Dl_info self;
        if (!dladdr((void*)cuModuleGetFunction, &self)) return NOT_FOUND;
        void* own = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        if (!own) return NOT_FOUND;
        void* body = dlsym(own, name);
        const uint32_t* threads = (const uint32_t*)dlsym(own, (std::string(name) + "_threads").c_str());
        const uint32_t* bytes = (const uint32_t*)dlsym(own, (std::string(name) + "_bytes").c_str());
        const uint32_t* sizes = (const uint32_t*)dlsym(own, (std::string(name) + "_sizes").c_str());
        dlclose(own);
        if (!body || !threads || (!bytes && !sizes)) {
            fprintf(stderr, "emulator: there is no kernel %s\n", name);
            return NOT_FOUND;
        }
        found = {name, (void (*)(const void*))body, *threads, {}, sizes != nullptr};
        if (sizes)
            while (*sizes) found.sizes.push_back(*sizes++);
        else found.sizes.push_back(*bytes);
    }
    *f = &found;
    return SUCCESS;
}
CU cuFuncGetParamInfo(void* f, size_t i, size_t* offset, size_t* bytes) {
    const std::vector<uint32_t>& sizes = ((Function*)f)->sizes;
    if (i >= sizes.size()) return INVALID_VALUE;
    *offset = 0;
    for (size_t n = 0; n < i; n++) *offset += sizes[n];
    *bytes = sizes[i];
    return SUCCESS;
}
CU cuFuncSetAttribute(void*, int, int) { return SUCCESS; }

// Rows of f32 or 16-bit numbers in boxes of 128 bytes a row, swizzled: what the kernels use.
CU cuTensorMapEncodeTiled(CUtensorMap* map, int type, unsigned dimensions, void* base, const uint64_t* sizes, const uint64_t* strides,
                          const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int, int fill) {
    Lock lock(device);
    const int F16 = 6, F32 = 7, BF16 = 9, SWIZZLE_128B = 3;
    const uint64_t size = type == F32 ? 4 : 2;
    if ((type != F16 && type != F32 && type != BF16) || dimensions != 2 || interleave != 0 || swizzle != SWIZZLE_128B || fill != 0) return INVALID_VALUE;
    if (steps[0] != 1 || steps[1] != 1 || box[0] * size != 128 || box[1] == 0 || box[1] > 256) return INVALID_VALUE;
    if ((uintptr_t)base % 16 != 0 || strides[0] % 16 != 0 || sizes[0] == 0 || sizes[1] == 0) return INVALID_VALUE;
    if (!is_device(base, (sizes[1] - 1) * strides[0] + sizes[0] * size)) return INVALID_VALUE;
    *map = {(const char*)base, sizes[0], sizes[1], strides[0], box[0], box[1], size, {}};
    return SUCCESS;
}
CU cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void*,
                  void** args, void**) {
    Lock lock(device);
    const uint32_t grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    return launch((Function*)f, grid, block, shared, args);
}

namespace {

void fill(KernelNode& n, const KernelNodeParams& p) {
    n.f = p.func;
    memcpy(n.grid, p.grid, sizeof n.grid);
    n.block = p.block[0];
    n.shared = p.shared;
    n.params.clear();
    for (size_t i = 0; i < p.func->sizes.size(); i++)
        n.params.emplace_back((char*)p.args[i], (char*)p.args[i] + p.func->sizes[i]);
}

}  // namespace

CU cuGraphCreate(void** g, unsigned) {
    *g = new Graph;
    return SUCCESS;
}
CU cuGraphDestroy(void* g) {
    for (const Stage& stage : ((Graph*)g)->stages)
        for (void* n : stage.nodes) delete (KernelNode*)n;
    delete (Graph*)g;
    return SUCCESS;
}
CU cuGraphAddKernelNode_v2(void** node, void* g, void* const* after, size_t count, const KernelNodeParams* p) {
    Lock lock(device);
    Graph* graph = (Graph*)g;
    // The backend's graphs are stages, one after the other: a node waits for all of the last stage, or for what its last node waits for. Any
    // other would need an order of its own.
    const std::vector<void*> waits(after, after + count);
    if (graph->stages.empty() || waits != graph->stages.back().after) {
        if (!graph->stages.empty() && waits != graph->stages.back().nodes) return INVALID_VALUE;
        if (graph->stages.empty() && count > 0) return INVALID_VALUE;
        graph->stages.push_back({waits, {}});
    }
    KernelNode* n = new KernelNode;
    fill(*n, *p);
    graph->stages.back().nodes.push_back(n);
    *node = n;
    return SUCCESS;
}
CU cuGraphInstantiateWithFlags(void** exec, void* g, unsigned long long) {
    // Nodes are named by their address: the executable graph refers to those of the graph.
    *exec = g;
    return SUCCESS;
}
CU cuGraphExecKernelNodeSetParams_v2(void*, void* node, const KernelNodeParams* p) {
    Lock lock(device);
    fill(*(KernelNode*)node, *p);
    return SUCCESS;
}
CU cuGraphLaunch(void* g, void*) {
    Lock lock(device);
    // The nodes of a stage last to first: what the first one leaves cannot be missed by the others.
    for (const Stage& stage : ((Graph*)g)->stages)
        for (size_t i = stage.nodes.size(); i-- > 0;) {
            KernelNode* n = (KernelNode*)stage.nodes[i];
            const uint32_t block[3] = {n->block, 1, 1};
            std::vector<void*> args;
            for (std::vector<char>& param : n->params) args.push_back(param.data());
            if (const int e = launch(n->f, n->grid, block, n->shared, args.data())) return e;
        }
    return SUCCESS;
}
CU cuGraphExecDestroy(void*) { return SUCCESS; }

CU cuGetErrorName(int e, const char** text) {
    switch (e) {
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_IMAGE: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
        case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *text = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
CU cuGetErrorString(int, const char** text) {
    *text = "reported by the emulator";
    return SUCCESS;
}
