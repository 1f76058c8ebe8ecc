// A CUDA driver without a GPU: device memory is host memory. Queued work runs when a caller waits for it, or is
// recorded while the stream is captured, as with a real driver. Calls are counted, and some of them can be made
// to fail.
#include "cuda_on_host.h"
#include "crop_kernel.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

typedef std::function<void()> Work;
static std::map<std::string, long> calls, refused;
static std::map<uint64_t, size_t> device_memory;
static std::vector<Work>*captured = nullptr, pending;
static long retained = 0, bytes_up = 0, contexts = 0, integrated = 0, major = 8, minor = 7, cores = 16, gigabytes = 31;
static size_t largest = SIZE_MAX;
static const int OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_CONTEXT = 201, CAPTURING = 900;

static int count(const char* name) { ++calls[name]; return OK; }
static void work_off() {
    std::vector<Work> now;
    now.swap(pending);
    for (auto& work : now) work();
}
static int queue(Work work) {
    (captured ? *captured : pending).push_back(work);
    return OK;
}
// Whether [at, at + size) lies in one allocation; otherwise a real device would fault.
static bool is_device(uint64_t at, size_t size) {
    auto next = device_memory.upper_bound(at);
    if (next == device_memory.begin()) return false;
    --next;
    return at + size <= next->first + next->second;
}
static void run_kernel(int gx, int gy, int gz, int bx, int by, const Window* windows, void* images, int size,
                       int as_bytes, const float* n) {
    blockDim = {bx, by, 1};
    for (int b = 0; b < gx * gy * gz; ++b) {
        blockIdx = {b % gx, b / gx % gy, b / (gx * gy)};
        for (int t = 0; t < bx * by; ++t) {
            threadIdx = {t % bx, t / bx, 0};
            asymtrack_crop(windows, images, size, as_bytes, n[0], n[1], n[2], n[3], n[4], n[5]);
        }
    }
}
#define NEEDS_CONTEXT if (contexts < 1) return NO_CONTEXT
// Calls that a thread must not make while it captures.
#define NOT_CAPTURED NEEDS_CONTEXT; if (captured) return CAPTURING
#define CAN_FAIL(name) if (refused[name]) return (int)refused[name]

extern "C" {
long fake_calls(const char* name) { return calls[name]; }
long fake_bytes_up() { return bytes_up; }
long fake_contexts() { return contexts; }
long fake_allocated() { return (long)device_memory.size(); }
long fake_retained() { return retained; }
long fake_pending() { return (long)pending.size(); }
void fake_forget() { calls.clear(); bytes_up = 0; }
void fake_refuse(const char* name, long code) { refused[name] = code; }
void fake_largest(long bytes) { largest = bytes < 0 ? SIZE_MAX : (size_t)bytes; }
void fake_gpu(long is_integrated, long capability, long multiprocessors, long memory) {
    integrated = is_integrated; major = capability / 10; minor = capability % 10; cores = multiprocessors; gigabytes = memory;
}
void fake_crop(const int* g, const Window* windows, void* images, int size, int as_bytes, const float* n) {
    run_kernel(g[0], g[1], g[2], g[3], g[4], windows, images, size, as_bytes, n);
}
int fake_host_function(void (*function)(long), long argument) {
    count("enqueue");
    return queue([=] { function(argument); });
}

int cuInit(unsigned) { return OK; }
int cuDeviceGetCount(int* n) { *n = 1; return OK; }
int cuDeviceGet(int* device, int index) { *device = index; return OK; }
int cuDeviceGetName(char* name, int size, int) { strncpy(name, "Imitation", size); return OK; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    std::map<int, long> known = {{75, major}, {76, minor}, {18, integrated}, {16, cores}};
    *value = (int)known[attribute];
    return OK;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = (size_t)gigabytes << 30; return OK; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = *total = (size_t)gigabytes << 30;
    for (auto& entry : device_memory) *free -= entry.second;
    return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)7; ++retained; return count("cuDevicePrimaryCtxRetain"); }
int cuDevicePrimaryCtxRelease_v2(int) { --retained; return count("cuDevicePrimaryCtxRelease"); }
int cuCtxPushCurrent_v2(void* c) { if (c != (void*)7) return INVALID; ++contexts; return OK; }
int cuCtxPopCurrent_v2(void** c) { if (contexts < 1) return NO_CONTEXT; --contexts; *c = (void*)7; return OK; }
int cuCtxGetCurrent(void** c) { *c = contexts ? (void*)7 : nullptr; return OK; }
int cuCtxSynchronize() { NOT_CAPTURED; work_off(); return count("cuCtxSynchronize"); }
int cuMemAlloc_v2(uint64_t* address, size_t size) {
    NOT_CAPTURED;
    if (!size) return INVALID;
    if (size > largest) return OUT_OF_MEMORY;
    *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
    device_memory[*address] = size;
    memset((void*)*address, 0xAA, size);
    return count("cuMemAlloc");
}
int cuMemFree_v2(uint64_t address) {
    NOT_CAPTURED;
    work_off();
    if (!device_memory.erase(address)) return INVALID;
    free((void*)address);
    return OK;
}
int cuMemHostAlloc(void** host, size_t size, unsigned flags) {
    NOT_CAPTURED;
    if (!size) return INVALID;
    *host = aligned_alloc(256, (size + 255) / 256 * 256);
    if (flags & 2) device_memory[(uint64_t)*host] = size;
    return count("cuMemHostAlloc");
}
int cuMemHostGetDevicePointer_v2(uint64_t* address, void* host, unsigned) {
    if (!device_memory.count((uint64_t)host)) return INVALID;
    *address = (uint64_t)host;
    return OK;
}
int cuMemFreeHost(void* host) { NOT_CAPTURED; work_off(); device_memory.erase((uint64_t)host); free(host); return OK; }
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t size, void*) {
    NEEDS_CONTEXT;
    if (!is_device(at, size)) return INVALID;
    return queue([=] { memset((void*)at, value, size); });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void*) {
    NEEDS_CONTEXT;
    CAN_FAIL("upload");
    if (!is_device(to, size)) return INVALID;
    return queue([=] { count("upload"); bytes_up += size; memcpy((void*)to, from, size); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void*) {
    NEEDS_CONTEXT;
    CAN_FAIL("download");
    if (!is_device(from, size)) return INVALID;
    return queue([=] { count("download"); memcpy(to, (void*)from, size); });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void*) {
    NEEDS_CONTEXT;
    if (!is_device(to, size) || !is_device(from, size)) return INVALID;
    return queue([=] { count("copy"); memcpy((void*)to, (void*)from, size); });
}
int cuStreamCreate(void** stream, unsigned) { NEEDS_CONTEXT; *stream = (void*)5; return count("cuStreamCreate"); }
int cuStreamDestroy_v2(void*) { NOT_CAPTURED; return count("cuStreamDestroy"); }
int cuStreamSynchronize(void*) {
    NOT_CAPTURED;
    work_off();
    return count("cuStreamSynchronize");
}
int cuStreamWaitEvent(void*, void*, unsigned) { NEEDS_CONTEXT; return count("cuStreamWaitEvent"); }
int cuEventCreate(void** event, unsigned) { *event = (void*)6; return OK; }
int cuEventRecord(void*, void*) { NEEDS_CONTEXT; return count("cuEventRecord"); }
int cuEventDestroy_v2(void*) { return OK; }
int cuModuleLoadData(void** module, const void*) { NOT_CAPTURED; *module = (void*)8; return count("cuModuleLoadData"); }
int cuModuleUnload(void*) { NOT_CAPTURED; return count("cuModuleUnload"); }
int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = (void*)9;
    return strcmp(name, "asymtrack_crop") ? 500 : OK;
}
int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void*, void** p, void**) {
    NEEDS_CONTEXT;
    CAN_FAIL("kernel");
    auto windows = *(uint64_t*)p[0], images = *(uint64_t*)p[1];
    int size = *(int*)p[2], as_bytes = *(int*)p[3];
    std::vector<float> n;
    for (int i = 4; i < 10; ++i) n.push_back(*(float*)p[i]);
    size_t bytes = gz * (as_bytes ? 3ul : 12ul) * size * size;
    if (!is_device(windows, gz * sizeof(Window)) || !is_device(images, bytes)) return INVALID;
    return queue([=] {
        count("kernel");
        run_kernel(gx, gy, gz, bx, by, (Window*)windows, (void*)images, size, as_bytes, n.data());
    });
}
int cuStreamBeginCapture_v2(void*, int mode) {
    NOT_CAPTURED;
    CAN_FAIL("begin capture");
    if (mode < 0 || mode > 2) return INVALID;
    captured = new std::vector<Work>();
    return count("capture");
}
int cuStreamEndCapture(void*, void** graph) {
    if (!captured) return INVALID;
    *graph = captured;
    captured = nullptr;
    CAN_FAIL("end capture");
    return OK;
}
int cuGraphInstantiateWithFlags(void** runnable, void* graph, unsigned long long) {
    CAN_FAIL("instantiate");
    *runnable = new std::vector<Work>(*(std::vector<Work>*)graph);
    return OK;
}
int cuGraphLaunch(void* runnable, void*) {
    NEEDS_CONTEXT;
    count("cuGraphLaunch");
    for (auto& work : *(std::vector<Work>*)runnable) queue(work);
    return OK;
}
int cuGraphDestroy(void* graph) { delete (std::vector<Work>*)graph; return OK; }
int cuGraphExecDestroy(void* graph) { delete (std::vector<Work>*)graph; return count("cuGraphExecDestroy"); }
int cuGetErrorName(int code, const char** text) {
    static std::string name;
    name = "ERROR_" + std::to_string(code);
    *text = name.c_str();
    return OK;
}
}
