// What an operator was called with, checked: a wrong argument is one line that names it.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"
#include "shim.h"

namespace querypatch {

// The tensors are contiguous and on the device of `value`; `problem.level` points into `levels`.
struct Arguments {
  Problem problem;
  std::vector<Level> levels;
  shim::Tensor value;
  shim::Tensor references;  // none for the classic operator
  shim::Tensor points;
  shim::Tensor weights;
  int32_t device_type;
  int32_t device_index;
  int32_t value_dtype;

  const void* references_data() const { return problem.coordinates ? references.data() : nullptr; }
};

// Throws std::runtime_error. `references` is nullptr for the classic operator.
Arguments check_arguments(shim::Tensor value, const std::vector<int64_t>& shapes,
                          shim::Tensor* references, shim::Tensor points, shim::Tensor weights);

// The gradient of the output, contiguous, or the error that says what is wrong with it.
shim::Tensor check_grad_output(shim::Tensor grad, const Arguments& arguments);

}  // namespace querypatch
