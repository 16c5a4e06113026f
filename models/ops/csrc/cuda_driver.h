// The CUDA driver without CUDA's headers or libraries: opened at first use, so that one library
// serves machines with and without a GPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_arguments.cuh"
#include "embedded.h"

namespace querypatch::cuda {

// One line that says what failed and the way out; cuda_forward and cuda_backward return its text.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A device's own context, current while this lives.
class Context {
 public:
  explicit Context(int32_t device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// A kernel by its name in cuda_kernels.cu. `compiled_by` is what NVRTC is to compile it from, where
// no embedded machine code has it. nullptr where neither has it; `why` then says so. Kept per
// device.
void* find_kernel(int32_t device, const std::string& name, const std::string& compiled_by,
                  std::string& why);

struct Grid {
  int64_t blocks;  // of each image, in blockIdx.x
  int64_t images;  // in blockIdx.y
  int32_t threads = max_threads_per_block;
};

void launch(void* kernel, Grid grid, Arguments arguments, void* stream);

void fill_zero(void* data, int64_t bytes, void* stream);

}  // namespace querypatch::cuda

// How Python's models/ops/nvrtc.py lends its compiler. The compiler answers from within its call,
// by one of the two functions below it; no answer is an error too.
using QuerypatchCompiler = void (*)(const char* kernels, int32_t architecture);
QUERYPATCH_EXPORT void querypatch_cuda_set_compiler(QuerypatchCompiler compiler);
QUERYPATCH_EXPORT void querypatch_cuda_accept(const void* cubin, uint64_t size);
QUERYPATCH_EXPORT void querypatch_cuda_refuse(const char* reason);
