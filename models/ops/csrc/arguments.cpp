#include "arguments.h"

#include <string>

namespace querypatch {

namespace {

constexpr int64_t any = -1;
constexpr int64_t most_tokens = int64_t{1} << 40;  // so that products of sizes fit 64 bits

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("querypatch: " + what); }

// One expected size: a number, or a word for a free one.
struct Size {
  int64_t number;
  const char* word;
};

std::string written(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

std::string written(const std::vector<Size>& sizes) {
  std::string text;
  for (const Size& size : sizes)
    text += (text.empty() ? "" : ", ") +
            (size.number == any ? std::string(size.word) : std::to_string(size.number));
  return "(" + text + ")";
}

std::vector<int64_t> checked_sizes(const char* name, const shim::Tensor& tensor,
                                   const std::vector<Size>& expected) {
  const std::vector<int64_t> sizes = tensor.sizes();
  bool fits = sizes.size() == expected.size();
  for (size_t d = 0; fits && d < sizes.size(); d++)
    fits = expected[d].number == any || expected[d].number == sizes[d];
  if (!fits)
    refuse(std::string(name) + " has the shape " + written(sizes) + ", expected " +
           written(expected));
  return sizes;
}

std::string dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  return "neither float32, bfloat16, float16 nor float64";
}

Number number_of(const char* name, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Number::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Number::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return Number::float16;
  if (dtype == aoti_torch_dtype_float64()) return Number::float64;
  refuse(std::string(name) + " is " + dtype_name(dtype));
}

// The type of a tensor that takes part: that of value, or float32 (never beside float64).
Number checked_type(const char* name, const shim::Tensor& tensor, int32_t value_dtype) {
  const int32_t dtype = tensor.dtype();
  const bool mixed =
      dtype == aoti_torch_dtype_float32() && value_dtype != aoti_torch_dtype_float64();
  if (dtype != value_dtype && !mixed)
    refuse(std::string(name) + " is " + dtype_name(dtype) + " beside a value of " +
           dtype_name(value_dtype) + "; give the value's dtype" +
           (value_dtype == aoti_torch_dtype_float64() ? "" : " or float32"));
  return number_of(name, dtype);
}

// Locations and references keep float32: half precision moves samples by whole cells.
void check_precise(const char* name, const shim::Tensor& tensor, int32_t value_dtype) {
  const bool wide = value_dtype == aoti_torch_dtype_float64();
  const int32_t expected = wide ? value_dtype : aoti_torch_dtype_float32();
  if (tensor.dtype() != expected)
    refuse(std::string(name) + " is " + dtype_name(tensor.dtype()) + ", expected " +
           dtype_name(expected) + (wide ? "" : "; in half precision samples move by whole cells"));
}

void check_device(const char* name, const shim::Tensor& tensor, const Arguments& a) {
  if (tensor.device_type() != a.device_type || tensor.device_index() != a.device_index)
    refuse(std::string(name) + " lies on another device than value; move it there");
}

std::vector<Level> checked_levels(const std::vector<int64_t>& shapes, int64_t tokens) {
  if (shapes.size() % 2)
    refuse("shapes holds " + std::to_string(shapes.size()) +
           " numbers, expected rows and columns of each level");
  std::vector<Level> levels(shapes.size() / 2);
  int64_t start = 0;
  for (size_t l = 0; l < levels.size(); l++) {
    const int64_t rows = shapes[2 * l], columns = shapes[2 * l + 1];
    if (rows < 0 || columns < 0 || rows > most_tokens || columns > most_tokens ||
        (rows && columns > most_tokens / rows))
      refuse("shapes holds a level of " + std::to_string(rows) + " x " + std::to_string(columns) +
             " cells");
    levels[l] = {rows, columns, start};
    start += rows * columns;
    if (start > most_tokens) refuse("shapes holds more than 2^40 cells");
  }
  if (start != tokens)
    refuse("value has " + std::to_string(tokens) + " tokens, shapes " + written(shapes) + " hold " +
           std::to_string(start));
  return levels;
}

shim::Tensor contiguous(shim::Tensor tensor, const Arguments& a) {
  if (tensor.contiguous()) return tensor;
  shim::Tensor copy = shim::empty(tensor.sizes(), tensor.dtype(), a.device_type, a.device_index);
  copy.copy_from(tensor);
  return copy;
}

}  // namespace

Arguments check_arguments(shim::Tensor value, const std::vector<int64_t>& shapes,
                          shim::Tensor* references, shim::Tensor points, shim::Tensor weights) {
  Arguments a;
  Problem& p = a.problem;
  const char* points_name = references ? "offsets" : "locations";
  const char* weights_name = references ? "logits" : "weights";
  const std::vector<int64_t> sizes = checked_sizes(
      "value", value, {{any, "batch"}, {any, "tokens"}, {any, "heads"}, {any, "channels"}});
  a.device_type = value.device_type();
  a.device_index = value.device_index();
  a.value_dtype = value.dtype();
  p.batch = sizes[0];
  p.tokens = sizes[1];
  p.heads = sizes[2];
  p.channels = sizes[3];
  p.value_type = number_of("value", a.value_dtype);
  a.levels = checked_levels(shapes, p.tokens);
  p.levels = static_cast<int64_t>(a.levels.size());
  p.level = a.levels.data();
  const std::vector<int64_t> at = checked_sizes(
      points_name, points,
      {{p.batch, ""}, {any, "queries"}, {p.heads, ""}, {p.levels, ""}, {any, "points"}, {2, ""}});
  p.queries = at[1];
  p.points = at[4];
  checked_sizes(weights_name, weights,
                {{p.batch, ""}, {p.queries, ""}, {p.heads, ""}, {p.levels, ""}, {p.points, ""}});
  check_device(points_name, points, a);
  check_device(weights_name, weights, a);
  p.weight_type = checked_type(weights_name, weights, a.value_dtype);
  p.coordinates = 0;
  if (references) {
    p.point_type = checked_type(points_name, points, a.value_dtype);
    const std::vector<int64_t> from = checked_sizes(
        "references", *references,
        {{p.batch, ""}, {p.queries, ""}, {p.levels, ""}, {any, "2 or 4"}});
    if (from[3] != 2 && from[3] != 4)
      refuse("references has " + std::to_string(from[3]) +
             " coordinates, expected 2 (x, y) or 4 (cx, cy, w, h)");
    p.coordinates = static_cast<int32_t>(from[3]);
    check_device("references", *references, a);
    check_precise("references", *references, a.value_dtype);
    a.references = contiguous(std::move(*references), a);
  } else {
    check_precise(points_name, points, a.value_dtype);
    p.point_type = number_of(points_name, points.dtype());
  }
  a.value = contiguous(std::move(value), a);
  a.points = contiguous(std::move(points), a);
  a.weights = contiguous(std::move(weights), a);
  return a;
}

shim::Tensor check_grad_output(shim::Tensor grad, const Arguments& a) {
  const Problem& p = a.problem;
  checked_sizes("grad_output", grad, {{p.batch, ""}, {p.queries, ""}, {p.heads * p.channels, ""}});
  check_device("grad_output", grad, a);
  if (grad.dtype() != a.value_dtype)
    refuse("grad_output is " + dtype_name(grad.dtype()) + ", expected the value's " +
           dtype_name(a.value_dtype));
  return contiguous(std::move(grad), a);
}

}  // namespace querypatch
