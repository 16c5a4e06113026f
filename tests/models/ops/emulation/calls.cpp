// The CUDA side of the library without torch, for Python's ctypes.
#include "embedded.h"
#include "problem.h"

namespace querypatch {
const Cubin* const cubins = nullptr;
const int32_t num_cubins = 0;
}  // namespace querypatch

using namespace querypatch;

const char* program = "";

QUERYPATCH_EXPORT void emulated_program(const char* text) { program = text; }
QUERYPATCH_EXPORT const char* querypatch_cuda_program() { return program; }

QUERYPATCH_EXPORT const char* emulated_forward(const Problem* problem, const ForwardTensors* tensors,
                                               int32_t device) {
  return cuda_forward(*problem, *tensors, {device, nullptr});
}

QUERYPATCH_EXPORT int64_t emulated_workspace(const Problem* problem,
                                             const BackwardTensors* tensors) {
  return cuda_backward_workspace(*problem, *tensors);
}

QUERYPATCH_EXPORT const char* emulated_backward(const Problem* problem,
                                                const BackwardTensors* tensors, int32_t device) {
  return cuda_backward(*problem, *tensors, {device, nullptr});
}
