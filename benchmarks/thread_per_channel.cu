// A stand-in for the algorithm of the public CUDA kernels, written from its description: one thread
// for each channel of each head of each query, float32, locations and weights given. Only what
// gpu_session.py compares with; nothing else uses it. The public kernels themselves are faster.

struct Level {
  int rows, columns, start;
};

struct Problem {
  const float *value, *locations, *weights, *grad_output;
  float *output, *grad_value, *grad_locations, *grad_weights;
  int batch, tokens, heads, channels, queries, levels, points;
  Level level[4];
};

__device__ float cell(const Problem& p, const float* value, const Level& level, int row, int column) {
  const bool inside = row >= 0 && column >= 0 && row < level.rows && column < level.columns;
  const long long token = level.start + row * level.columns + column;
  return inside ? value[token * p.heads * p.channels] : 0.f;
}

extern "C" __global__ void forward(Problem p) {
  const long long number = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long pair = number / p.channels;
  if (pair >= static_cast<long long>(p.batch) * p.queries * p.heads) return;
  const int channel = number % p.channels, head = pair % p.heads;
  const long long image = pair / p.heads / p.queries;
  const float* value = p.value + (image * p.tokens * p.heads + head) * p.channels + channel;
  float sum = 0.f;
  for (int sample = 0; sample < p.levels * p.points; sample++) {
    const long long at = pair * p.levels * p.points + sample;
    const Level level = p.level[sample / p.points];
    const float x = p.locations[2 * at] * level.columns - .5f;
    const float y = p.locations[2 * at + 1] * level.rows - .5f;
    if (!(x > -1 && y > -1 && x < level.columns && y < level.rows)) continue;
    const int column = floorf(x), row = floorf(y);
    const float right = x - column, down = y - row;
    const float top = cell(p, value, level, row, column) * (1 - right) +
                      cell(p, value, level, row, column + 1) * right;
    const float bottom = cell(p, value, level, row + 1, column) * (1 - right) +
                         cell(p, value, level, row + 1, column + 1) * right;
    sum += p.weights[at] * (top * (1 - down) + bottom * down);
  }
  p.output[number] = sum;
}

__device__ void add(const Problem& p, float* grad, const Level& level, int row, int column,
                    float amount) {
  if (row < 0 || column < 0 || row >= level.rows || column >= level.columns) return;
  const long long token = level.start + row * level.columns + column;
  atomicAdd(grad + token * p.heads * p.channels, amount);
}

// A block for each head of each query, a thread for each channel.
extern "C" __global__ void backward(Problem p) {
  __shared__ float parts[3][1024];
  const long long pair = blockIdx.x;
  const int channel = threadIdx.x, head = pair % p.heads;
  const long long first = (pair / p.heads / p.queries * p.tokens * p.heads + head) * p.channels;
  const float* value = p.value + first + channel;
  float* grad = p.grad_value + first + channel;
  const float g = p.grad_output[pair * p.channels + channel];
  for (int sample = 0; sample < p.levels * p.points; sample++) {
    const long long at = pair * p.levels * p.points + sample;
    const Level level = p.level[sample / p.points];
    const float x = p.locations[2 * at] * level.columns - .5f;
    const float y = p.locations[2 * at + 1] * level.rows - .5f, weight = p.weights[at];
    const bool inside = x > -1 && y > -1 && x < level.columns && y < level.rows;
    const int column = inside ? floorf(x) : -2, row = inside ? floorf(y) : -2;
    const float right = x - column, down = y - row;
    const float v00 = cell(p, value, level, row, column);
    const float v01 = cell(p, value, level, row, column + 1);
    const float v10 = cell(p, value, level, row + 1, column);
    const float v11 = cell(p, value, level, row + 1, column + 1);
    add(p, grad, level, row, column, weight * g * (1 - right) * (1 - down));
    add(p, grad, level, row, column + 1, weight * g * right * (1 - down));
    add(p, grad, level, row + 1, column, weight * g * (1 - right) * down);
    add(p, grad, level, row + 1, column + 1, weight * g * right * down);
    parts[0][channel] = inside ? g * weight * level.columns *
                                     ((v01 - v00) * (1 - down) + (v11 - v10) * down) : 0.f;
    parts[1][channel] = inside ? g * weight * level.rows *
                                     ((v10 - v00) * (1 - right) + (v11 - v01) * right) : 0.f;
    parts[2][channel] = inside ? g * ((v00 * (1 - right) + v01 * right) * (1 - down) +
                                      (v10 * (1 - right) + v11 * right) * down) : 0.f;
    __syncthreads();
    if (channel == 0) {
      float sums[3] = {};
      for (int of = 0; of < 3; of++)
        for (int c = 0; c < p.channels; c++) sums[of] += parts[of][c];
      p.grad_locations[2 * at] = sums[0];
      p.grad_locations[2 * at + 1] = sums[1];
      p.grad_weights[at] = sums[2];
    }
    __syncthreads();
  }
}
