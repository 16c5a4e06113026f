// A call of the operator after its arguments were checked: kernels trust every number in here.
//
// Deformable DETR (Zhu et al., ICLR 2021), equation 3, without the projections; what is computed is
// written down in models/ops/reference.py. All tensors are contiguous and lie on one device.
#pragma once

#include <cstdint>

namespace querypatch {

enum class Number : int32_t { float32, bfloat16, float16, float64 };

struct Level {
  int64_t rows;
  int64_t columns;
  int64_t start;  // token of row 0, column 0
};

// `coordinates` says which operator it is: 0 is the classic one, whose points are sampling locations
// and whose weights are attention weights; 2 (x, y) and 4 (cx, cy, w, h) are the fused one, whose
// points are raw offsets and whose weights are logits. The sizes may all be zero.
//
// Types: value, output and their gradients are `value_type`. Locations and references are float32,
// float64 where value_type is float64. Offsets are `point_type` (for the classic operator it is the
// locations' type), weights and logits `weight_type`; each is value_type or float32. A gradient has
// the type of what it is the gradient of.
struct Problem {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t channels;  // of one head
  int64_t queries;
  int64_t points;  // of one level
  int64_t levels;
  const Level* level;  // `levels` of them, on the host
  int32_t coordinates;
  Number value_type;
  Number point_type;
  Number weight_type;
  // The CUDA backward of the values adds in any order, so its last bits differ from run to run; true
  // makes it add whole numbers instead, bit-equal every time and slower. The CPU always is.
  bool deterministic = false;
};

struct ForwardTensors {
  const void* value;       // batch, tokens, heads, channels
  const void* references;  // batch, queries, levels, coordinates; nullptr for the classic operator
  const void* points;      // batch, queries, heads, levels, points, 2
  const void* weights;     // batch, queries, heads, levels, points
  void* output;            // batch, queries, heads * channels
};

// A gradient that nobody needs is nullptr. The others are written whole: what lies in them before
// is not zero. `workspace` has the bytes that were asked for, aligned to 256.
struct BackwardTensors {
  const void* grad_output;
  const void* value;
  const void* references;
  const void* points;
  const void* weights;
  void* grad_value;
  void* grad_references;
  void* grad_points;
  void* grad_weights;
  void* workspace;
};

// Where CUDA work goes: everything is put on this stream, nothing waits for it.
struct CudaPlace {
  int32_t device;
  void* stream;
};

// The CUDA side (cuda*.cpp). A returned text is an error, one line, valid until the thread's next
// call; nullptr is success. Problems with nothing to compute come through too (queries == 0).
const char* cuda_forward(const Problem& problem, const ForwardTensors& tensors, CudaPlace place);
int64_t cuda_backward_workspace(const Problem& problem, const BackwardTensors& tensors);
const char* cuda_backward(const Problem& problem, const BackwardTensors& tensors, CudaPlace place);

}  // namespace querypatch
