// The operators as torch knows them, in the namespace `querypatch`; loading the library adds them.
//
// Sizes of levels are integers, not tensors, so that no call waits for the device. Gradients that
// nobody needs come back as tensors of no elements.
#include <dlfcn.h>

#include <string>

#include "arguments.h"
#include "cpu.h"
#include "embedded.h"
#include "problem.h"
#include "shim.h"

namespace querypatch {

namespace {

using shim::Tensor;

// The numbers of schema and of C functions change together with models/ops/library.py.
constexpr int32_t schema_number = 1;

constexpr const char* classic_schema =
    "deformable_attention(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor";
constexpr const char* classic_backward_schema =
    "deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] shapes, "
    "Tensor locations, Tensor weights, bool needs_value, bool needs_locations, "
    "bool needs_weights, bool deterministic) -> (Tensor, Tensor, Tensor)";
constexpr const char* fused_schema =
    "fused_deformable_attention(Tensor value, SymInt[] shapes, Tensor references, Tensor offsets, "
    "Tensor logits) -> Tensor";
constexpr const char* fused_backward_schema =
    "fused_deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] shapes, "
    "Tensor references, Tensor offsets, Tensor logits, bool needs_value, bool needs_references, "
    "bool needs_offsets, bool needs_logits, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)";

bool on_cuda(const Arguments& a) { return a.device_type == aoti_torch_device_type_cuda(); }

// torch's current stream. The function lies in libtorch_cuda, which a CPU torch does not have: it
// is looked up when the first CUDA tensor comes, and then that library is loaded.
void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* where = torch_cuda ? torch_cuda : RTLD_DEFAULT;
    return reinterpret_cast<Getter>(dlsym(where, "aoti_torch_get_current_cuda_stream"));
  }();
  if (!get) throw std::runtime_error("querypatch: this torch cannot say its current CUDA stream");
  void* stream = nullptr;
  shim::check(get(device, &stream), "say its current CUDA stream");
  return stream;
}

void require(const char* failure) {
  if (failure) throw std::runtime_error(std::string("querypatch: ") + failure);
}

Tensor run_forward(const Arguments& a) {
  const Problem& p = a.problem;
  Tensor output = shim::empty({p.batch, p.queries, p.heads * p.channels}, a.value_dtype,
                              a.device_type, a.device_index);
  const ForwardTensors tensors = {a.value.data(), a.references_data(), a.points.data(),
                                  a.weights.data(), output.mutable_data()};
  if (p.batch * p.queries * p.heads * p.channels == 0) return output;
  if (on_cuda(a))
    require(cuda_forward(p, tensors, {a.device_index, current_stream(a.device_index)}));
  else
    require(cpu_kernels().forward(p, tensors));
  return output;
}

struct Gradients {
  Tensor value, references, points, weights;
};

// Room for the gradient of `of`, or nothing where it is not needed.
Tensor room_for(const Tensor& of, bool needed, const Arguments& a) {
  return shim::empty(needed ? of.sizes() : std::vector<int64_t>{0}, of.dtype(), a.device_type,
                     a.device_index);
}

struct Needs {
  bool value, references, points, weights;
};

Gradients run_backward(const Tensor& grad_output, const Arguments& a, Needs needs) {
  const Problem& p = a.problem;
  Gradients grads{room_for(a.value, needs.value, a), Tensor(),
                  room_for(a.points, needs.points, a), room_for(a.weights, needs.weights, a)};
  if (p.coordinates) grads.references = room_for(a.references, needs.references, a);
  BackwardTensors tensors = {grad_output.data(), a.value.data(), a.references_data(),
                             a.points.data(), a.weights.data(), nullptr, nullptr, nullptr, nullptr,
                             nullptr};
  if (needs.value) tensors.grad_value = grads.value.mutable_data();
  if (needs.references) tensors.grad_references = grads.references.mutable_data();
  if (needs.points) tensors.grad_points = grads.points.mutable_data();
  if (needs.weights) tensors.grad_weights = grads.weights.mutable_data();
  if (!needs.value && !needs.references && !needs.points && !needs.weights) return grads;
  if (!on_cuda(a)) {
    require(cpu_kernels().backward(p, tensors));
    return grads;
  }
  Tensor workspace = shim::empty({cuda_backward_workspace(p, tensors)}, aoti_torch_dtype_uint8(),
                                 a.device_type, a.device_index);
  tensors.workspace = workspace.mutable_data();
  require(cuda_backward(p, tensors, {a.device_index, current_stream(a.device_index)}));
  return grads;
}

bool flag(StableIValue value) {
  bool set = false;
  std::memcpy(&set, &value, sizeof set);
  return set;
}

void classic(StableIValue* stack, uint64_t, uint64_t) {
  Tensor value(stack[0]), locations(stack[2]), weights(stack[3]);
  const std::vector<int64_t> shapes = shim::take_list(stack[1]);
  stack[0] = run_forward(check_arguments(std::move(value), shapes, nullptr, std::move(locations),
                                         std::move(weights)))
                 .to_stack();
}

void fused(StableIValue* stack, uint64_t, uint64_t) {
  Tensor value(stack[0]), references(stack[2]), offsets(stack[3]), logits(stack[4]);
  const std::vector<int64_t> shapes = shim::take_list(stack[1]);
  stack[0] = run_forward(check_arguments(std::move(value), shapes, &references, std::move(offsets),
                                         std::move(logits)))
                 .to_stack();
}

void classic_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), value(stack[1]), locations(stack[3]), weights(stack[4]);
  const std::vector<int64_t> shapes = shim::take_list(stack[2]);
  const Needs needs = {flag(stack[5]), false, flag(stack[6]), flag(stack[7])};
  Arguments a = check_arguments(std::move(value), shapes, nullptr, std::move(locations),
                                std::move(weights));
  a.problem.deterministic = flag(stack[8]);
  grad = check_grad_output(std::move(grad), a);
  Gradients grads = run_backward(grad, a, needs);
  stack[0] = grads.value.to_stack();
  stack[1] = grads.points.to_stack();
  stack[2] = grads.weights.to_stack();
}

void fused_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad(stack[0]), value(stack[1]), references(stack[3]), offsets(stack[4]), logits(stack[5]);
  const std::vector<int64_t> shapes = shim::take_list(stack[2]);
  const Needs needs = {flag(stack[6]), flag(stack[7]), flag(stack[8]), flag(stack[9])};
  Arguments a = check_arguments(std::move(value), shapes, &references, std::move(offsets),
                                std::move(logits));
  a.problem.deterministic = flag(stack[10]);
  grad = check_grad_output(std::move(grad), a);
  Gradients grads = run_backward(grad, a, needs);
  stack[0] = grads.value.to_stack();
  stack[1] = grads.references.to_stack();
  stack[2] = grads.points.to_stack();
  stack[3] = grads.weights.to_stack();
}

void implement(const char* key) {
  TorchLibraryHandle library = nullptr;
  shim::check(aoti_torch_library_init_impl("querypatch", key, __FILE__, __LINE__, &library),
              "open the operators' namespace");
  const auto add = [&](const char* name, BoxedKernel kernel) {
    shim::check(torch_library_impl(library, name, kernel, shim::torch_version), "add a kernel");
  };
  add("deformable_attention", classic);
  add("deformable_attention_backward", classic_backward);
  add("fused_deformable_attention", fused);
  add("fused_deformable_attention_backward", fused_backward);
}

// The library's handles live as long as the process: what they registered goes with them.
__attribute__((constructor)) void register_operators() {
  TorchLibraryHandle library = nullptr;
  shim::check(aoti_torch_library_init_def("querypatch", __FILE__, __LINE__, &library),
              "make the operators' namespace");
  for (const char* schema :
       {classic_schema, classic_backward_schema, fused_schema, fused_backward_schema})
    shim::check(aoti_torch_library_def(library, schema), "define an operator");
  implement("CPU");
  implement("CUDA");
}

}  // namespace

}  // namespace querypatch

QUERYPATCH_EXPORT int32_t querypatch_schema() { return querypatch::schema_number; }
QUERYPATCH_EXPORT const char* querypatch_cuda_program() { return querypatch::cuda_program; }
QUERYPATCH_EXPORT int32_t querypatch_num_cubins() { return querypatch::num_cubins; }
QUERYPATCH_EXPORT int32_t querypatch_cubin_architecture(int32_t number) {
  return querypatch::cubins[number].architecture;
}
