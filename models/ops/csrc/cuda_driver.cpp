#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#ifndef QUERYPATCH_LIBCUDA
#define QUERYPATCH_LIBCUDA "libcuda.so.1"
#endif

namespace querypatch::cuda {
namespace {

using Status = int;
using Module = void*;
using Function = void*;

// The driver's functions that are needed; their signatures have not changed since CUDA 10.
struct Driver {
  Status (*init)(unsigned);
  Status (*error_text)(Status, const char**);
  Status (*device)(int*, int);
  Status (*device_attribute)(int*, int, int);
  Status (*retain_context)(void**, int);
  Status (*push_context)(void*);
  Status (*pop_context)(void**);
  Status (*exchange_capture_mode)(int*);
  Status (*load_module)(Module*, const void*);
  Status (*unload_module)(Module);
  Status (*function)(Function*, Module, const char*);
  Status (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void*, void**, void**);
  Status (*fill)(uint64_t, unsigned char, size_t, void*);
};

template <class Signature>
void take(void* library, const char* name, Signature& function) {
  function = reinterpret_cast<Signature>(dlsym(library, name));
  if (!function)
    throw Error(std::string("this NVIDIA driver lacks ") + name +
                "; update it to one for CUDA 12 or newer");
}

Driver open_driver() {
  void* library = dlopen(QUERYPATCH_LIBCUDA, RTLD_NOW);
  if (!library)
    throw Error(std::string("the NVIDIA driver cannot be opened (") + dlerror() +
                "); install it, or move the tensors to the CPU");
  Driver driver;
  take(library, "cuInit", driver.init);
  take(library, "cuGetErrorString", driver.error_text);
  take(library, "cuDeviceGet", driver.device);
  take(library, "cuDeviceGetAttribute", driver.device_attribute);
  take(library, "cuDevicePrimaryCtxRetain", driver.retain_context);
  take(library, "cuCtxPushCurrent_v2", driver.push_context);
  take(library, "cuCtxPopCurrent_v2", driver.pop_context);
  take(library, "cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode);
  take(library, "cuModuleLoadData", driver.load_module);
  take(library, "cuModuleUnload", driver.unload_module);
  take(library, "cuModuleGetFunction", driver.function);
  take(library, "cuLaunchKernel", driver.launch);
  take(library, "cuMemsetD8Async", driver.fill);
  return driver;
}

// Opened once; where that failed, tried and told again at each call.
const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

void check(Status status, const std::string& what) {
  if (status == 0) return;
  const char* text = nullptr;
  driver().error_text(status, &text);
  throw Error("CUDA could not " + what + ": " + (text ? text : "unknown error") + " (" +
              std::to_string(status) + ")");
}

struct Device {
  void* context = nullptr;
  int32_t architecture = 0;  // 90 is sm_90
};

Device open_device(int32_t index) {
  check(driver().init(0), "start");
  int handle = 0, major = 0, minor = 0;
  const std::string name = "cuda:" + std::to_string(index);
  check(driver().device(&handle, index), "find " + name);
  constexpr int compute_capability_major = 75, compute_capability_minor = 76;
  check(driver().device_attribute(&major, compute_capability_major, handle), "ask " + name);
  check(driver().device_attribute(&minor, compute_capability_minor, handle), "ask " + name);
  Device device;
  device.architecture = major * 10 + minor;
  check(driver().retain_context(&device.context, handle), "take the context of " + name);
  return device;
}

std::mutex devices_mutex;
std::map<int32_t, Device> devices;

Device device_of(int32_t index) {
  const std::lock_guard<std::mutex> lock(devices_mutex);
  const auto known = devices.find(index);
  if (known != devices.end()) return known->second;
  return devices[index] = open_device(index);
}

// Lets modules be loaded while another thread, or this one, records a CUDA graph.
class Unrecorded {
 public:
  Unrecorded() { check(driver().exchange_capture_mode(&mode_), "leave a graph's capture"); }
  ~Unrecorded() { driver().exchange_capture_mode(&mode_); }
  Unrecorded(const Unrecorded&) = delete;
  Unrecorded& operator=(const Unrecorded&) = delete;

 private:
  int mode_ = 2;  // relaxed
};

Module load(const void* cubin, const std::string& what) {
  const Unrecorded unrecorded;
  Module module = nullptr;
  check(driver().load_module(&module, cubin), "load " + what);
  return module;
}

// nullptr where the module has no such kernel.
Function function_in(Module module, const std::string& name) {
  constexpr Status not_found = 500;
  Function function = nullptr;
  const Status status = driver().function(&function, module, name.c_str());
  if (status == not_found) return nullptr;
  check(status, "find the kernel " + name);
  return function;
}

std::mutex modules_mutex;
std::map<int32_t, Module> embedded_modules;                     // by device
std::map<std::pair<int32_t, std::string>, Module> own_modules;  // by device and what they are from
std::map<std::pair<int32_t, std::string>, Function> kernels;    // by device and name

// The machine code of the library that runs on an architecture: of the same major number, of no
// later minor one.
const Cubin* embedded_for(int32_t architecture) {
  const Cubin* best = nullptr;
  for (int32_t i = 0; i < num_cubins; i++) {
    const int32_t candidate = cubins[i].architecture;
    const bool runs = candidate / 10 == architecture / 10 && candidate <= architecture;
    if (runs && (!best || candidate > best->architecture)) best = &cubins[i];
  }
  return best;
}

// nullptr where the library has none for the device. Called with `modules_mutex` held.
Module embedded_module(int32_t index, int32_t architecture) {
  const auto known = embedded_modules.find(index);
  if (known != embedded_modules.end()) return known->second;
  const Cubin* cubin = embedded_for(architecture);
  const std::string what = "the built-in kernels for sm_" + std::to_string(architecture);
  return embedded_modules[index] = cubin ? load(cubin->data, what) : nullptr;
}

std::atomic<QuerypatchCompiler> compiler{nullptr};

// What the compiler answered to this thread's question.
struct Answer {
  std::vector<char> cubin;
  std::string refusal;
};
thread_local std::optional<Answer> answer;

// Empty where there is no compiler or it refused; `why` then says so. No lock is held: the compiler
// waits for Python, and another thread may hold Python while it waits for us.
std::vector<char> compile(const std::string& from, int32_t architecture, std::string& why) {
  const QuerypatchCompiler ask = compiler;
  if (!ask) {
    why = "models.ops.nvrtc did not lend its compiler";
    return {};
  }
  answer.emplace();
  ask(from.c_str(), architecture);
  Answer given = std::move(*answer);
  answer.reset();
  if (given.cubin.empty())
    why = given.refusal.empty() ? "the compiler gave no answer" : given.refusal;
  return std::move(given.cubin);
}

Function remember(int32_t index, const std::string& name, Function function) {
  kernels[{index, name}] = function;
  return function;
}

// The kernel, where it was used before or is built in.
Function known_kernel(int32_t index, int32_t architecture, const std::string& name,
                      const std::string& from) {
  const std::lock_guard<std::mutex> lock(modules_mutex);
  const auto known = kernels.find({index, name});
  if (known != kernels.end()) return known->second;
  if (const Module module = embedded_module(index, architecture))
    if (const Function function = function_in(module, name)) return remember(index, name, function);
  const auto own = own_modules.find({index, from});
  if (own == own_modules.end()) return nullptr;
  return remember(index, name, function_in(own->second, name));
}

}  // namespace

Context::Context(int32_t device) {
  check(driver().push_context(device_of(device).context),
        "use cuda:" + std::to_string(device));
}

Context::~Context() {
  void* popped = nullptr;
  driver().pop_context(&popped);
}

void* find_kernel(int32_t device, const std::string& name, const std::string& compiled_by,
                  std::string& why) {
  const int32_t architecture = device_of(device).architecture;
  if (const Function known = known_kernel(device, architecture, name, compiled_by)) return known;
  const std::vector<char> cubin = compile(compiled_by, architecture, why);
  if (cubin.empty()) return nullptr;
  {
    const std::lock_guard<std::mutex> lock(modules_mutex);
    const std::pair<int32_t, std::string> key{device, compiled_by};
    // Two threads may have compiled the same; the first one's is kept.
    if (!own_modules.count(key)) own_modules[key] = load(cubin.data(), compiled_by);
  }
  const Function function = known_kernel(device, architecture, name, compiled_by);
  if (!function) throw Error(compiled_by + " has no kernel " + name);
  return function;
}

void launch(void* kernel, Grid grid, Arguments arguments, void* stream) {
  constexpr int64_t most_images = 65535;  // of blockIdx.y
  constexpr int64_t most_blocks = 2147483647;
  if (grid.blocks > most_blocks)
    throw Error("blocks=" + std::to_string(grid.blocks) +
                " are more than a launch takes (2147483647); call with fewer queries at once");
  for (int64_t image = 0; grid.blocks > 0 && image < grid.images; image += most_images) {
    const int64_t now = std::min(grid.images - image, most_images);
    arguments.first_image = static_cast<int>(image);
    void* parameters[] = {&arguments};
    check(driver().launch(kernel, static_cast<unsigned>(grid.blocks), static_cast<unsigned>(now), 1,
                          static_cast<unsigned>(grid.threads), 1, 1, 0, stream, parameters,
                          nullptr),
          "launch a kernel");
  }
}

void fill_zero(void* data, int64_t bytes, void* stream) {
  if (!data || bytes <= 0) return;
  check(driver().fill(reinterpret_cast<uint64_t>(data), 0, static_cast<size_t>(bytes), stream),
        "fill " + std::to_string(bytes) + " bytes with zeros");
}

}  // namespace querypatch::cuda

using querypatch::cuda::answer;

void querypatch_cuda_set_compiler(QuerypatchCompiler compiler) {
  querypatch::cuda::compiler = compiler;
}

void querypatch_cuda_accept(const void* cubin, uint64_t size) {
  const char* bytes = static_cast<const char*>(cubin);
  if (answer) answer->cubin.assign(bytes, bytes + size);
}

void querypatch_cuda_refuse(const char* reason) {
  if (answer) answer->refusal = reason;
}
