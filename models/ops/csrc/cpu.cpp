// Which CPU kernels run here, and what they need of torch and the C library.
#include "cpu.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "embedded.h"
#include "shim.h"

namespace querypatch {

namespace {

constexpr const char* variable = "QUERYPATCH_CPU_ISA";

struct Choice {
  const char* name;
  bool runs_here;
  const CpuKernels& (*kernels)();
};

const CpuKernels& choose_kernels() {
  const Choice choices[] = {
#ifdef QUERYPATCH_X86
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       cpu_kernels_v4},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"),
       cpu_kernels_v3},
#endif
      {"baseline", true, cpu_kernels_baseline},
  };
  const char* wanted = std::getenv(variable);
  std::string known;
  for (const Choice& choice : choices) {
    known += (known.empty() ? "" : ", ") + std::string(choice.name);
    if (wanted && *wanted && std::strcmp(wanted, choice.name) != 0) continue;
    if (choice.runs_here) return choice.kernels();
    if (wanted && *wanted)
      throw std::runtime_error(std::string(variable) + "=" + wanted +
                               ": this processor cannot run it; unset the variable");
  }
  throw std::runtime_error(std::string(variable) + "=" + wanted + " is none of " + known +
                           "; unset the variable");
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose_kernels();
  return kernels;
}

void run_parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  if (count > 0) shim::check(torch_parallel_for(0, count, grain, body, context), "run in parallel");
}

int64_t count_threads() {
  uint32_t threads = 1;
  shim::check(torch_get_num_threads(&threads), "count its threads");
  return threads;
}

void* allocate(int64_t bytes) {
  constexpr size_t huge_page = size_t{1} << 21;
  const size_t alignment = static_cast<size_t>(bytes) >= huge_page ? huge_page : 64;
  const size_t rounded = (static_cast<size_t>(bytes) / alignment + 1) * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
#ifdef MADV_HUGEPAGE
  // A gather touches pages at random; where it fails nothing is lost.
  if (memory && alignment == huge_page) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace querypatch

QUERYPATCH_EXPORT const char* querypatch_cpu_isa() {
  try {
    return querypatch::cpu_kernels().isa;
  } catch (const std::runtime_error&) {
    return "";
  }
}
