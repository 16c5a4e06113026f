// What cuda_driver.cpp asks of libcuda.so.1, answered by the emulated device, with the kernels inside.
//
// "Machine code" is ignored: every kernel that was compiled into this file is found by its name.
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device.h"

#include "cuda_kernels.cu"

emulation::Index blockIdx, threadIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr int lanes = 32;
constexpr size_t stack_bytes = 256 * 1024;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(stack_bytes);
  bool done = false;
  Meeting at = Meeting::warp;
  unsigned turns = 0;
};

struct Range {
  const char* first;
  const char* last;
};

std::vector<Lane> warp(lanes);
char slots[2][lanes][8];
ucontext_t scheduler;
int running = 0;
std::vector<Range> allowed;
std::mt19937 order_of_lanes(1);
bool backwards = false;  // blocks and warps from the last to the first
long long launches = 0;

using Kernel = void (*)(querypatch::cuda::Arguments);
Kernel kernel;
const querypatch::cuda::Arguments* arguments;

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "emulated device: %s (block %u,%u thread %u)\n", why.c_str(), blockIdx.x,
               blockIdx.y, threadIdx.x);
  std::abort();
}

void check(const void* at, size_t bytes, const char* what) {
  const char* first = static_cast<const char*>(at);
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail(std::string(what) + " is not aligned");
  for (const Range& range : allowed)
    if (first >= range.first && first + bytes <= range.last) return;
  fail(std::string(what) + " lies outside the tensors");
}

void lane_main() {
  kernel(*arguments);
  warp[running].done = true;
  swapcontext(&warp[running].context, &scheduler);
}

void run_warp(unsigned number) {
  std::vector<int> order(lanes);
  std::iota(order.begin(), order.end(), 0);
  for (Lane& lane : warp) {
    lane.done = false;
    lane.turns = 0;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, lane_main, 0);
  }
  for (bool done = false; !done;) {
    std::shuffle(order.begin(), order.end(), order_of_lanes);
    for (int lane : order) {
      running = lane;
      threadIdx = {number * lanes + lane, 0, 0};
      swapcontext(&scheduler, &warp[lane].context);
    }
    done = warp[0].done;
    for (const Lane& lane : warp)
      if (lane.done != done || (!done && lane.at != warp[0].at)) fail("the lanes parted");
  }
}

}  // namespace

void meet(Meeting kind) {
  warp[running].at = kind;
  swapcontext(&warp[running].context, &scheduler);
}

int current_lane() { return running; }
char* slot(int lane, unsigned turn) { return slots[turn % 2][lane]; }
unsigned next_turn() { return warp[running].turns++; }
void check_load(const void* from, size_t bytes) { check(from, bytes, "a load"); }
void check_add(const void* to, size_t bytes) { check(to, bytes, "an addition"); }

}  // namespace emulation

using namespace emulation;

extern "C" {

void emulation_allow(const void* first, size_t bytes) {
  const char* start = static_cast<const char*>(first);
  allowed.push_back({start, start + bytes});
}
void emulation_forbid_all() { allowed.clear(); }
void emulation_run_backwards(int yes) { backwards = yes; }
long long emulation_launches() { return launches; }

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int status, const char** text) {
  *text = status == 101 ? "invalid device ordinal" : "emulated failure";
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < 2 ? 0 : 101;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &scheduler;
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
int cuModuleLoadData(void** module, const void*) {
  *module = &scheduler;
  return 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    static void* const self = [] {
      Dl_info here;
      dladdr(reinterpret_cast<void*>(&cuInit), &here);
      return dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    *function = dlsym(self, name);
  }
  return *function ? 0 : 500;
}
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void*) {
  std::memset(reinterpret_cast<void*>(to), byte, bytes);
  return 0;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned, unsigned, unsigned, void*, void** parameters,
                   void**) {
  if (!grid_x || !grid_y || grid_y > 65535 || grid_z != 1 || block_x % lanes) return 1;
  launches++;
  kernel = reinterpret_cast<Kernel>(function);
  arguments = static_cast<const querypatch::cuda::Arguments*>(parameters[0]);
  gridDim = {grid_x, grid_y, 1};
  blockDim = {block_x, 1, 1};
  const unsigned warps = block_x / lanes, all = grid_x * grid_y * warps;
  for (unsigned i = 0; i < all; i++) {
    const unsigned number = backwards ? all - 1 - i : i, block = number / warps;
    blockIdx = {block % grid_x, block / grid_x, 0};
    run_warp(number % warps);
  }
  return 0;
}

}  // extern "C"
