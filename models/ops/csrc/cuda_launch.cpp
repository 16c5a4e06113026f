// From a checked call to launches of kernels: which ones, over how many blocks, in which memory.
#include <initializer_list>
#include <iterator>
#include <string>

#include "cuda_driver.h"
#include "problem.h"

namespace querypatch {
namespace {

using cuda::Arguments;
using cuda::Error;

std::string number(int64_t value) { return std::to_string(value); }

const char* name_of(Number type) {
  switch (type) {
    case Number::float32: return "f32";
    case Number::bfloat16: return "bf16";
    case Number::float16: return "f16";
    case Number::float64: return "f64";
  }
  return "";
}

int64_t bytes_of(Number type) {
  switch (type) {
    case Number::float32: return 4;
    case Number::bfloat16: return 2;
    case Number::float16: return 2;
    case Number::float64: return 8;
  }
  return 0;
}

// Of what is computed: float64 for float64, float32 for the others.
int64_t real_bytes(const Problem& p) { return p.value_type == Number::float64 ? 8 : 4; }

int64_t samples_of(const Problem& p) { return p.levels * p.points; }
int64_t pairs_of(const Problem& p) { return p.queries * p.heads; }
int64_t value_elements(const Problem& p) { return p.batch * p.tokens * p.heads * p.channels; }
int64_t sample_elements(const Problem& p) { return p.batch * pairs_of(p) * samples_of(p); }
int64_t reference_elements(const Problem& p) {
  return p.batch * p.queries * p.levels * p.coordinates;
}

bool samples_nothing(const Problem& p) {
  return value_elements(p) == 0 || sample_elements(p) == 0;
}

int64_t blocks_for(int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; }

// The kernels count in 32 bits where that is enough for every use that was seen.
void check_size(const Problem& p) {
  constexpr int64_t most = int64_t{1} << 30;
  const auto refuse = [](const std::string& what, int64_t is, int64_t limit) {
    if (is > limit)
      throw Error(what + " = " + number(is) + ", but the CUDA kernels take at most " +
                  number(limit));
  };
  refuse("levels", p.levels, cuda::max_levels);
  refuse("tokens", p.tokens, most);
  refuse("queries * heads", pairs_of(p), most);
  refuse("queries * levels", p.queries * p.levels, most);
  refuse("levels * points", samples_of(p), most);
  refuse("bytes of a token", p.heads * p.channels * bytes_of(p.value_type), most);
}

Arguments arguments_of(const Problem& p) {
  Arguments a{};
  a.tokens = static_cast<int>(p.tokens);
  a.heads = static_cast<int>(p.heads);
  a.channels = static_cast<int>(p.channels);
  a.queries = static_cast<int>(p.queries);
  a.levels = static_cast<int>(p.levels);
  a.points_per_level = static_cast<int>(p.points);
  a.coordinates = p.coordinates;
  a.point_tag = static_cast<int>(p.point_type);
  a.weight_tag = static_cast<int>(p.weight_type);
  for (int64_t i = 0; i < p.levels; i++)
    a.level[i] = {static_cast<int>(p.level[i].rows), static_cast<int>(p.level[i].columns),
                  static_cast<int>(p.level[i].start)};
  return a;
}

// A kernel of samples, and how many lanes a head of a query has in it.
struct Kernel {
  void* function;
  int32_t lanes;
};

// Throws where there is none: neither built in nor compiled.
void* kernel_for_any(int32_t device, const std::string& what, Number type) {
  std::string why;
  const std::string name = what + "_" + name_of(type);
  const std::string from = std::string("QUERYPATCH_ANY(") + name_of(type) + ")";
  void* function = cuda::find_kernel(device, name, from, why);
  if (!function)
    throw Error("no CUDA kernel " + name + " for cuda:" + number(device) + ": " + why);
  return function;
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

int32_t fixed_lanes(const Problem& p, bool forward) {
  const int value_bytes = static_cast<int>(bytes_of(p.value_type));
  const int channels = static_cast<int>(p.channels);
  return forward ? cuda::lanes_per_head(channels, value_bytes)
                 : cuda::lanes_per_head_backward(channels, value_bytes);
}

// Whether a kernel for these very numbers can be: see Fixed in cuda_sampling.cuh.
bool can_be_fixed(const Problem& p) {
  return p.value_type != Number::float64 && samples_of(p) <= cuda::max_fixed_samples &&
         fixed_lanes(p, true) > 0;
}

// "forward" or "backward": the kernel for these numbers where it can be had, else the one for any.
Kernel kernel_of(const Problem& p, const std::string& what, bool fixed, int32_t device) {
  if (fixed && can_be_fixed(p)) {
    const std::string parts[] = {name_of(p.value_type),  name_of(p.point_type),
                                 name_of(p.weight_type), number(p.channels),
                                 number(p.levels),       number(p.points)};
    std::string name = what, from = "QUERYPATCH_FIXED(";
    for (const std::string& part : parts) {
      name += "_" + part;
      from += part + (&part == std::end(parts) - 1 ? ")" : ",");
    }
    std::string why;  // whoever refuses to compile says so in the log
    if (void* function = cuda::find_kernel(device, name, from, why))
      return {function, fixed_lanes(p, what == "forward")};
  }
  return {kernel_for_any(device, what, p.value_type), cuda::lanes_per_warp};
}

void launch_samples(const Problem& p, const Kernel& kernel, const Arguments& a, void* stream) {
  const int32_t threads = cuda::warps_per_block(kernel.lanes) * cuda::lanes_per_warp;
  const int64_t blocks = blocks_for(pairs_of(p), threads / kernel.lanes);
  cuda::launch(kernel.function, {blocks, p.batch, threads}, a, stream);
}

// What the backward keeps beside its results, in this order; each part starts at a multiple of 256.
struct Workspace {
  int64_t sums = 0;       // bytes of the values' gradient in float32 or in whole numbers
  int64_t locations = 0;  // of the locations' gradient
  int64_t bounds = 0;

  static int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  int64_t total() const { return rounded(sums) + rounded(locations) + rounded(bounds); }
};

bool whole_numbers(const Problem& p, const BackwardTensors& t) {
  return p.deterministic && t.grad_value;
}

Workspace workspace_of(const Problem& p, const BackwardTensors& t) {
  Workspace w;
  if (samples_nothing(p)) return w;
  if (whole_numbers(p, t)) {
    w.sums = value_elements(p) * (p.value_type == Number::float64 ? 16 : 8);
    w.bounds = p.batch * 2 * static_cast<int64_t>(sizeof(unsigned long long));
  } else if (t.grad_value && bytes_of(p.value_type) == 2) {
    w.sums = value_elements(p) * 4;
  }
  if (t.grad_references) w.locations = sample_elements(p) * 2 * real_bytes(p);
  return w;
}

void forward_on_device(const Problem& p, const ForwardTensors& t, CudaPlace place) {
  const cuda::Context context(place.device);
  if (samples_nothing(p)) {
    const int64_t elements = p.batch * pairs_of(p) * p.channels;
    cuda::fill_zero(t.output, elements * bytes_of(p.value_type), place.stream);
    return;
  }
  check_size(p);
  Arguments a = arguments_of(p);
  a.value = t.value;
  a.references = t.references;
  a.points = t.points;
  a.weights = t.weights;
  a.output = t.output;
  const bool fixed = aligned({t.value, t.points, t.weights, t.output});
  const Kernel kernel = kernel_of(p, "forward", fixed, place.device);
  launch_samples(p, kernel, a, place.stream);
}

void fill_gradients_with_zero(const Problem& p, const BackwardTensors& t, void* stream) {
  cuda::fill_zero(t.grad_value, value_elements(p) * bytes_of(p.value_type), stream);
  cuda::fill_zero(t.grad_references, reference_elements(p) * real_bytes(p), stream);
  cuda::fill_zero(t.grad_points, sample_elements(p) * 2 * bytes_of(p.point_type), stream);
  cuda::fill_zero(t.grad_weights, sample_elements(p) * bytes_of(p.weight_type), stream);
}

// The values' gradient in its own type, from sums in the workspace.
void round_sums(const Problem& p, const BackwardTensors& t, Arguments a, CudaPlace place) {
  a.output = t.grad_value;
  if (whole_numbers(p, t)) {
    a.elements = value_elements(p) / p.batch;
    const int64_t blocks = blocks_for(a.elements, 1024);
    cuda::launch(kernel_for_any(place.device, "rounded_whole", p.value_type), {blocks, p.batch}, a,
                 place.stream);
  } else if (bytes_of(p.value_type) == 2) {
    a.elements = value_elements(p);
    const int64_t blocks = blocks_for(a.elements, 4 * cuda::max_threads_per_block);
    cuda::launch(kernel_for_any(place.device, "rounded", p.value_type), {blocks, 1}, a,
                 place.stream);
  }
}

void find_bounds(const Problem& p, const Arguments& a, int64_t bytes, CudaPlace place) {
  cuda::fill_zero(a.bounds, bytes, place.stream);
  const int64_t elements = pairs_of(p) * p.channels;
  const int64_t blocks = blocks_for(elements, 4096) < 256 ? blocks_for(elements, 4096) : 256;
  cuda::launch(kernel_for_any(place.device, "bounds", p.value_type), {blocks, p.batch}, a,
               place.stream);
}

Arguments backward_arguments(const Problem& p, const BackwardTensors& t, const Workspace& w) {
  char* workspace = static_cast<char*>(t.workspace);
  Arguments a = arguments_of(p);
  a.value = t.value;
  a.references = t.references;
  a.points = t.points;
  a.weights = t.weights;
  a.grad_output = t.grad_output;
  a.grad_value = w.sums ? workspace : t.grad_value;
  a.grad_points = t.grad_points;
  a.grad_weights = t.grad_weights;
  a.grad_references = t.grad_references;
  if (w.locations) a.grad_locations = workspace + Workspace::rounded(w.sums);
  if (w.bounds)
    a.bounds = reinterpret_cast<unsigned long long*>(workspace + Workspace::rounded(w.sums) +
                                                     Workspace::rounded(w.locations));
  return a;
}

void backward_on_device(const Problem& p, const BackwardTensors& t, CudaPlace place) {
  const cuda::Context context(place.device);
  if (samples_nothing(p)) return fill_gradients_with_zero(p, t, place.stream);
  check_size(p);
  const Workspace w = workspace_of(p, t);
  const Arguments a = backward_arguments(p, t, w);
  const bool whole = whole_numbers(p, t);
  const int64_t sums = w.sums ? w.sums : value_elements(p) * bytes_of(p.value_type);
  cuda::fill_zero(a.grad_value, sums, place.stream);
  if (whole) find_bounds(p, a, w.bounds, place);
  const bool fixed = !whole && aligned({t.value, t.points, t.weights, t.grad_output, t.grad_value,
                                        t.grad_points, t.grad_weights, t.workspace});
  const Kernel kernel = kernel_of(p, whole ? "backward_whole" : "backward", fixed, place.device);
  launch_samples(p, kernel, a, place.stream);
  if (t.grad_value) round_sums(p, t, a, place);
  if (!t.grad_references) return;
  const int64_t blocks = blocks_for(p.queries * p.levels, cuda::max_threads_per_block);
  cuda::launch(kernel_for_any(place.device, "references", p.value_type), {blocks, p.batch}, a,
               place.stream);
}

thread_local std::string last_error;

template <class Work>
const char* told(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

}  // namespace

const char* cuda_forward(const Problem& problem, const ForwardTensors& tensors, CudaPlace place) {
  return told([&] { forward_on_device(problem, tensors, place); });
}

int64_t cuda_backward_workspace(const Problem& problem, const BackwardTensors& tensors) {
  return workspace_of(problem, tensors).total();
}

const char* cuda_backward(const Problem& problem, const BackwardTensors& tensors, CudaPlace place) {
  return told([&] { backward_on_device(problem, tensors, place); });
}

}  // namespace querypatch
