// What the host hands to every CUDA kernel, and the shape of a launch; read by both compilers.
#pragma once

namespace querypatch {
namespace cuda {

constexpr int max_levels = 64;
constexpr int lanes_per_warp = 32;
constexpr int max_warps_per_block = 4;
constexpr int max_threads_per_block = max_warps_per_block * lanes_per_warp;

struct LevelSize {
  int rows;
  int columns;
  int start;  // token of row 0, column 0
};

// Numbers as problem.h counts them, for the kernels that choose a type at run time.
enum NumberTag : int { float32_tag, bfloat16_tag, float16_tag, float64_tag };

// Pointers to tensors as problem.h lays them out; what a kernel does not need may be nullptr.
struct Arguments {
  const void* value;
  const void* references;
  const void* points;
  const void* weights;
  const void* grad_output;
  void* output;
  void* grad_value;      // sums: float32 (float64 for float64 values), or whole numbers
  void* grad_points;
  void* grad_weights;
  void* grad_locations;  // batch, queries, heads, levels, points, 2: for the references' gradient
  void* grad_references;
  unsigned long long* bounds;  // per image: largest |grad_output| and |weight|, as bits of float64

  long long elements;  // what an elementwise kernel goes over, in one image
  int first_image;     // of this launch; blockIdx.y counts from it
  int tokens;
  int heads;
  int channels;
  int queries;
  int levels;
  int points_per_level;
  int coordinates;
  int point_tag;
  int weight_tag;
  LevelSize level[max_levels];
};

// Lanes that share one head of one query, each with 16 bytes of its channels; 0 where the channels
// do not part like that, and the kernel for any number of channels takes 32 lanes of one channel.
constexpr int lanes_per_head(int channels, int value_bytes) {
  const int bytes = channels * value_bytes;
  const int lanes = bytes / 16;
  const bool even = bytes % 16 == 0 && lanes >= 1 && lanes <= lanes_per_warp;
  return even && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

// The same in a backward, where a lane has 16 bytes of the float32 sums: what the lanes of a head
// add with one instruction is one stretch of memory. Halves of 32 bytes take as long as wholes
// (measured on an H200). Where a head had more lanes than a warp, as in a forward.
constexpr int lanes_per_head_backward(int channels, int value_bytes) {
  const int lanes = lanes_per_head(channels, 4);
  return lanes > 0 ? lanes : lanes_per_head(channels, value_bytes);
}

// Heads with few lanes are many in a block, and each needs its room in shared memory.
constexpr int warps_per_block(int lanes_of_a_head) {
  return lanes_of_a_head < max_warps_per_block ? lanes_of_a_head : max_warps_per_block;
}

// Samples of a head that the kernels with fixed numbers keep at once.
constexpr int max_fixed_samples = 16;

}  // namespace cuda
}  // namespace querypatch
