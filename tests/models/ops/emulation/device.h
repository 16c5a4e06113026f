// A warp of a CUDA device on an ordinary processor: enough of CUDA's words for cuda_kernels.cu.
//
// The 32 lanes of a warp are fibers. Each runs until it meets the others, at a shuffle or a
// __syncwarp, or until it ends; the order in which they run can be changed, so that what one lane
// wrongly takes from another before they met comes out differently. Loads are checked: each must lie
// in memory that was allowed, at a multiple of its own size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define QUERYPATCH_EMULATION
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
  unsigned x, y, z;
};

enum class Meeting { shuffle, warp };

// Ends the lane's turn; returns when every lane has come to the same kind of meeting.
void meet(Meeting kind);
int current_lane();
// Values that lanes hand to each other: two rows by turns, so that one meeting a shuffle is enough.
char* slot(int lane, unsigned turn);
unsigned next_turn();
void check_load(const void* from, size_t bytes);
void check_add(const void* to, size_t bytes);

}  // namespace emulation

extern emulation::Index blockIdx, threadIdx, blockDim, gridDim;

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline unsigned __float_as_uint(float number) { return bits_of<unsigned>(number); }
inline float __uint_as_float(unsigned bits) { return bits_of<float>(bits); }
inline long long __double_as_longlong(double number) { return bits_of<long long>(number); }
inline double __longlong_as_double(long long bits) { return bits_of<double>(bits); }
inline long long __double2ll_rn(double number) { return std::llrint(number); }

inline void __syncwarp() { emulation::meet(emulation::Meeting::warp); }

template <class T>
T __shfl_xor_sync(unsigned, T mine, int other) {
  const unsigned turn = emulation::next_turn();
  std::memcpy(emulation::slot(emulation::current_lane(), turn), &mine, sizeof mine);
  emulation::meet(emulation::Meeting::shuffle);
  T theirs;
  std::memcpy(&theirs, emulation::slot(emulation::current_lane() ^ other, turn), sizeof theirs);
  return theirs;
}

template <class T>
T __ldg(const T* from) {
  emulation::check_load(from, sizeof(T));
  return *from;
}

template <class T>
T atomicAdd(T* to, T number) {
  emulation::check_add(to, sizeof(T));
  const T before = *to;
  *to = before + number;
  return before;
}

inline unsigned long long atomicMax(unsigned long long* to, unsigned long long number) {
  emulation::check_add(to, sizeof *to);
  const unsigned long long before = *to;
  if (number > before) *to = number;
  return before;
}

namespace querypatch {
namespace cuda {

inline float half_to_float(unsigned short bits) { return bits_of<_Float16>(bits); }

inline unsigned two_halves(float low, float high) {
  const unsigned upper = bits_of<unsigned short>(static_cast<_Float16>(high));
  return upper << 16 | bits_of<unsigned short>(static_cast<_Float16>(low));
}

inline unsigned bfloat_bits(float number) {
  const unsigned bits = bits_of<unsigned>(number);
  if (std::isnan(number)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

inline unsigned two_bfloats(float low, float high) {
  return bfloat_bits(high) << 16 | bfloat_bits(low);
}

inline void add_four(float* to, float a, float b, float c, float d) {
  emulation::check_add(to, 16);
  const float numbers[] = {a, b, c, d};
  for (int i = 0; i < 4; i++) to[i] += numbers[i];
}

inline float reciprocal(float x) { return 1.f / x; }

}  // namespace cuda
}  // namespace querypatch
