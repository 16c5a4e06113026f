// What adding to memory costs, by how many numbers an instruction adds: rows of 32 channels, as the
// backward of deformable attention adds them. gpu_session.py times these from sm_90 on.

// `lanes` neighbours share a row; each adds 32 / lanes numbers of it.
#define QUERYPATCH_ADDITIONS(NAME, TYPE, LANES, STATEMENT)                                         \
  extern "C" __global__ void NAME(TYPE* sums, const int* rows, long long count) {                  \
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x / LANES;                 \
    const long long start =                                                                        \
        (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;                   \
    for (long long i = start; i < count; i += step) {                                              \
      TYPE* to = sums + static_cast<long long>(rows[i]) * 32 + threadIdx.x % LANES * (32 / LANES); \
      STATEMENT;                                                                                   \
    }                                                                                              \
  }

QUERYPATCH_ADDITIONS(one, float, 32, atomicAdd(to, 1.f))
QUERYPATCH_ADDITIONS(two, float, 16,
                     asm volatile("red.global.add.v2.f32 [%0], {%1, %1};" ::"l"(to), "f"(1.f)))
QUERYPATCH_ADDITIONS(four, float, 8,
                     asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(to),
                                  "f"(1.f)))
QUERYPATCH_ADDITIONS(eight_bfloats, unsigned short, 4,
                     asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};" ::"l"(to),
                                  "r"(0x3f803f80u)))
QUERYPATCH_ADDITIONS(one_whole, unsigned long long, 32, atomicAdd(to, 1ull))
