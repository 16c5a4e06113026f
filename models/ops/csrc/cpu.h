// The CPU kernels: the same source compiled for several instruction sets, chosen at run time.
//
// The files compiled for one instruction set include nothing that could leave a shared inline
// function behind (no std templates): the linker keeps one copy, and it might be AVX-512's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace querypatch {

struct CpuKernels {
  const char* isa;
  // Both answer an error text or nullptr.
  const char* (*forward)(const Problem&, const ForwardTensors&);
  const char* (*backward)(const Problem&, const BackwardTensors&);
};

const CpuKernels& cpu_kernels_baseline();
#ifdef QUERYPATCH_X86
const CpuKernels& cpu_kernels_v3();
const CpuKernels& cpu_kernels_v4();
#endif

// The widest set this machine has, or the one that QUERYPATCH_CPU_ISA names; throws where that
// cannot run here.
const CpuKernels& cpu_kernels();

// For the kernels: torch's threads, and memory aligned to 64 bytes (nullptr where there is none).
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t count, int64_t grain, ParallelBody body, void* context);
int64_t count_threads();
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace querypatch
