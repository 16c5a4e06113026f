// Stands in for the CUDA side where a build has none.
#include "problem.h"

namespace querypatch {

constexpr const char* absent = "this build of querypatch_ops has no CUDA kernels";

const char* cuda_forward(const Problem&, const ForwardTensors&, CudaPlace) { return absent; }
int64_t cuda_backward_workspace(const Problem&, const BackwardTensors&) { return 0; }
const char* cuda_backward(const Problem&, const BackwardTensors&, CudaPlace) { return absent; }

}  // namespace querypatch
