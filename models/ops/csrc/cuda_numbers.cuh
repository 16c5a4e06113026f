// Numbers in memory and in registers: float32, bfloat16, float16 and float64, one by one or packed.
//
// Half precision is only ever stored: everything is computed in float32, float64 for float64. What
// is particular to the device stands in the first section; tests/models/ops/emulation.h gives a
// processor's version of it.
#pragma once

#include "cuda_arguments.cuh"

namespace querypatch {
namespace cuda {

#ifndef QUERYPATCH_EMULATION

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}

__device__ __forceinline__ unsigned two_halves(float low, float high) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ unsigned two_bfloats(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Adds four neighbours in memory; 16-byte aligned. One instruction from sm_90 on.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d));
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.f, x); }

#endif

__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// e to the power of x. exp2 of the scaled number is one instruction where exp is ten.
__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.442695041f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

__device__ __forceinline__ float least(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double least(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float greatest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double greatest(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float floored(float a) { return floorf(a); }
__device__ __forceinline__ double floored(double a) { return floor(a); }

// How a type of number lies in memory (`Stored`), what it is computed in (`Real`), and how `word`s
// of 32 bits are taken apart and put together.
struct f32 {
  using Stored = float;
  using Real = float;
  static constexpr int per_word = 1;
  static __device__ __forceinline__ void unpack(unsigned word, Real* to) {
    *to = __uint_as_float(word);
  }
  static __device__ __forceinline__ unsigned pack(const Real* from) {
    return __float_as_uint(*from);
  }
  static __device__ __forceinline__ Real read(Stored stored) { return stored; }
  static __device__ __forceinline__ Stored write(Real number) { return number; }
};

struct bf16 {
  using Stored = unsigned short;
  using Real = float;
  static constexpr int per_word = 2;
  static __device__ __forceinline__ void unpack(unsigned word, Real* to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const Real* from) {
    return two_bfloats(from[0], from[1]);
  }
  static __device__ __forceinline__ Real read(Stored stored) {
    return __uint_as_float(static_cast<unsigned>(stored) << 16);
  }
  static __device__ __forceinline__ Stored write(Real number) {
    return static_cast<Stored>(two_bfloats(number, 0.f));
  }
};

struct f16 {
  using Stored = unsigned short;
  using Real = float;
  static constexpr int per_word = 2;
  static __device__ __forceinline__ void unpack(unsigned word, Real* to) {
    to[0] = half_to_float(static_cast<unsigned short>(word));
    to[1] = half_to_float(static_cast<unsigned short>(word >> 16));
  }
  static __device__ __forceinline__ unsigned pack(const Real* from) {
    return two_halves(from[0], from[1]);
  }
  static __device__ __forceinline__ Real read(Stored stored) { return half_to_float(stored); }
  static __device__ __forceinline__ Stored write(Real number) {
    return static_cast<Stored>(two_halves(number, 0.f));
  }
};

struct f64 {
  using Stored = double;
  using Real = double;
  static __device__ __forceinline__ Real read(Stored stored) { return stored; }
  static __device__ __forceinline__ Stored write(Real number) { return number; }
};

// A type that is known only at run time, by its tag; for the kernels of any shape.
template <class Real>
__device__ __forceinline__ Real read_tagged(const void* from, long long index, int tag) {
  switch (tag) {
    case bfloat16_tag: return bf16::read(__ldg(static_cast<const unsigned short*>(from) + index));
    case float16_tag: return f16::read(__ldg(static_cast<const unsigned short*>(from) + index));
    case float64_tag: return static_cast<Real>(__ldg(static_cast<const double*>(from) + index));
    default: return __ldg(static_cast<const float*>(from) + index);
  }
}

template <class Real>
__device__ __forceinline__ void write_tagged(void* to, long long index, int tag, Real number) {
  switch (tag) {
    case bfloat16_tag:
      static_cast<unsigned short*>(to)[index] = bf16::write(static_cast<float>(number));
      return;
    case float16_tag:
      static_cast<unsigned short*>(to)[index] = f16::write(static_cast<float>(number));
      return;
    case float64_tag: static_cast<double*>(to)[index] = number; return;
    default: static_cast<float*>(to)[index] = static_cast<float>(number);
  }
}

// `count` neighbours in as few instructions as their number allows; `from` is aligned to their
// size, 16 bytes at the most.
template <class Number, int count>
__device__ __forceinline__ void read_many(const typename Number::Stored* from,
                                          typename Number::Real* to) {
  constexpr int bytes = count * static_cast<int>(sizeof(typename Number::Stored));
  if constexpr (count == 1) {
    *to = Number::read(__ldg(from));
  } else if constexpr (bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < bytes / 16; i++) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from) + i);
      typename Number::Real* part = to + i * 4 * Number::per_word;
      Number::unpack(words.x, part);
      Number::unpack(words.y, part + Number::per_word);
      Number::unpack(words.z, part + 2 * Number::per_word);
      Number::unpack(words.w, part + 3 * Number::per_word);
    }
  } else if constexpr (bytes == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    Number::unpack(words.x, to);
    Number::unpack(words.y, to + Number::per_word);
  } else if constexpr (bytes == 4) {
    Number::unpack(__ldg(reinterpret_cast<const unsigned*>(from)), to);
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) to[i] = Number::read(__ldg(from + i));
  }
}

template <class Number, int count>
__device__ __forceinline__ void write_many(typename Number::Stored* to,
                                           const typename Number::Real* from) {
  constexpr int bytes = count * static_cast<int>(sizeof(typename Number::Stored));
  if constexpr (count == 1) {
    *to = Number::write(*from);
  } else if constexpr (bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < bytes / 16; i++) {
      const typename Number::Real* part = from + i * 4 * Number::per_word;
      uint4 words;
      words.x = Number::pack(part);
      words.y = Number::pack(part + Number::per_word);
      words.z = Number::pack(part + 2 * Number::per_word);
      words.w = Number::pack(part + 3 * Number::per_word);
      reinterpret_cast<uint4*>(to)[i] = words;
    }
  } else if constexpr (bytes == 8) {
    uint2 words;
    words.x = Number::pack(from);
    words.y = Number::pack(from + Number::per_word);
    *reinterpret_cast<uint2*>(to) = words;
  } else if constexpr (bytes == 4) {
    *reinterpret_cast<unsigned*>(to) = Number::pack(from);
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) to[i] = Number::write(from[i]);
  }
}

}  // namespace cuda
}  // namespace querypatch
