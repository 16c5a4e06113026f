// libtorch's stable C interface, declared here so that building needs no torch (torch 2.11 and newer).
//
// Only functions that torch 2.11 exports and promises to keep for two years are used. A function that
// fails has already written its reason to stderr, hence the short errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using StableListHandle = StableListOpaque*;
using StableIValue = uint64_t;
using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

int32_t aoti_torch_library_init_def(const char* name_space, const char* file, uint32_t line,
                                    TorchLibraryHandle* library);
int32_t aoti_torch_library_init_impl(const char* name_space, const char* key, const char* file,
                                     uint32_t line, TorchLibraryHandle* library);
int32_t aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
int32_t torch_library_impl(TorchLibraryHandle library, const char* name, BoxedKernel kernel,
                           uint64_t torch_version);

int32_t aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dimensions);
int32_t aoti_torch_get_size(AtenTensorHandle tensor, int64_t dimension, int64_t* size);
int32_t aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
int32_t aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type);
int32_t aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index);
int32_t aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* contiguous);
int32_t aoti_torch_copy_(AtenTensorHandle target, AtenTensorHandle source, int32_t non_blocking);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
int32_t aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 AtenTensorHandle* tensor);
int32_t torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
int32_t torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();

int32_t torch_list_size(StableListHandle list, size_t* size);
int32_t torch_list_get_item(StableListHandle list, size_t index, StableIValue* item);
int32_t torch_delete_list(StableListHandle list);

int32_t torch_get_num_threads(uint32_t* threads);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t begin, int64_t end, void* context), void* context);
}

namespace querypatch::shim {

// The oldest torch whose calling convention the kernels use: 2.11.
constexpr uint64_t torch_version = (uint64_t{2} << 56) | (uint64_t{11} << 48);

inline void check(int32_t failed, const char* what) {
  if (failed) throw std::runtime_error(std::string("querypatch: libtorch could not ") + what);
}

// An owned reference to a tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  explicit Tensor(StableIValue value) { std::memcpy(&handle_, &value, sizeof handle_); }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dimensions() const {
    int64_t count = 0;
    check(aoti_torch_get_dim(handle_, &count), "count a tensor's dimensions");
    return count;
  }

  std::vector<int64_t> sizes() const {
    std::vector<int64_t> all(static_cast<size_t>(dimensions()));
    for (size_t d = 0; d < all.size(); d++)
      check(aoti_torch_get_size(handle_, static_cast<int64_t>(d), &all[d]), "read a size");
    return all;
  }

  int32_t dtype() const {
    int32_t type = 0;
    check(aoti_torch_get_dtype(handle_, &type), "read a dtype");
    return type;
  }

  int32_t device_type() const {
    int32_t type = 0;
    check(aoti_torch_get_device_type(handle_, &type), "read a device");
    return type;
  }

  int32_t device_index() const {
    int32_t index = 0;
    check(aoti_torch_get_device_index(handle_, &index), "read a device index");
    return index;
  }

  bool contiguous() const {
    bool is = false;
    check(aoti_torch_is_contiguous(handle_, &is), "read strides");
    return is;
  }

  const void* data() const {
    const void* pointer = nullptr;
    check(torch_get_const_data_ptr(handle_, &pointer), "reach a tensor's data");
    return pointer;
  }

  void* mutable_data() {
    void* pointer = nullptr;
    check(torch_get_mutable_data_ptr(handle_, &pointer), "reach a tensor's data");
    return pointer;
  }

  void copy_from(const Tensor& source) {
    check(aoti_torch_copy_(handle_, source.handle_, 0), "copy a tensor");
  }

  AtenTensorHandle release() {
    AtenTensorHandle handle = handle_;
    handle_ = nullptr;
    return handle;
  }

  StableIValue to_stack() {
    StableIValue value = 0;
    AtenTensorHandle handle = release();
    std::memcpy(&value, &handle, sizeof handle);
    return value;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type,
                    int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype, device_type, device_index, &handle),
        "allocate a tensor");
  return Tensor(handle);
}

// The numbers of an int[] argument; the list on the stack is ours to delete.
inline std::vector<int64_t> take_list(StableIValue value) {
  StableListHandle list = nullptr;
  std::memcpy(&list, &value, sizeof list);
  size_t size = 0;
  int32_t failed = torch_list_size(list, &size);
  std::vector<int64_t> numbers(size);
  for (size_t i = 0; i < size && !failed; i++) {
    StableIValue item = 0;
    failed = torch_list_get_item(list, i, &item);
    std::memcpy(&numbers[i], &item, sizeof item);
  }
  torch_delete_list(list);
  check(failed, "read a list of integers");
  return numbers;
}

inline int64_t num_threads() {
  uint32_t threads = 1;
  check(torch_get_num_threads(&threads), "count its threads");
  return threads;
}

// body(begin, end) on ranges of [0, count), on torch's own threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  check(torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)), "run in parallel");
}

}  // namespace querypatch::shim
