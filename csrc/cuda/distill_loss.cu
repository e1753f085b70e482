// distill_loss on CUDA devices; kernels/distill_loss/__init__.py has the formula and the letters.
// Nothing chooses it yet: the Triton implementation comes first there, and this twin runs in tests and benchmarks only.
// As template parameters T is an element's type, V how many elements are read together, R how many rows.
//
// A block's threads hold rows of up to MAX_WIDTH in registers, as they came, COLUMNS of each row in a thread, read 16
// bytes at a time. A thread has the same columns of every row, so sums over rows are its own, and only a row's squares
// are summed across the block: for ROWS of them together, which is one wait for up to 128 bytes from each thread.
//   sum_chunks   a block for each chunk: sums the rows of those of long spans, over CHUNK tokens, to slots
//   finish       a block for each group of spans: sums a short span's rows or a long one's slots, compares the means
//   add_up       the groups' moments and errors to the results
//   backward     a block for each chunk of the student: what comes from the means is the same for all its rows
// Bytes: forward reads each state once, partners once more, and writes 4 P D for backward; the slots of long spans are
// at most one row of fp32 in 32 tokens, the groups' sums 8 D each. Backward reads the student's states once, partners
// too, and writes the gradient. No atomics, every order of summation is fixed: the same arguments give the same bits.
// Registers: at most 128, which is what THREADS of them leave, and no spills, on sm_80 and sm_90a. bf16 takes as many
// as fp32, for ptxas keeps unpacked what it will need again after a barrier.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "distill_loss.h"

namespace {

constexpr int COLUMNS = 16;
constexpr int THREADS = MAX_WIDTH / COLUMNS;  // at most
constexpr int ADDERS = 8;                     // warps that share a column's groups in add_up

template <class T, int V, bool ALIGNED>
constexpr int ROWS = V == 1 ? 1 : (ALIGNED ? 4 : 8) / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void assign(float x, float& y) { y = x; }
__device__ __forceinline__ void assign(double x, double& y) { y = x; }
__device__ __forceinline__ void assign(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void assign(float x, __half& y) { y = __float2half_rn(x); }

// ---- A thread's columns of a row ----------------------------------------------------------------------------------

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T x[V];
};

// Neighbouring threads have neighbouring packs, but single elements come together, which takes fewer addresses.
template <int V>
__device__ __forceinline__ int first_column(int pack) {
  return V > 1 ? (pack * blockDim.x + threadIdx.x) * V : threadIdx.x * COLUMNS + pack;
}

template <class T, int V>
struct Columns {
  Pack<T, V> packs[COLUMNS / V];

  __device__ __forceinline__ float operator[](int i) const { return to_float(packs[i / V].x[i % V]); }

  // Zeros beyond the width, which V divides, and for a row that is not there.
  __device__ __forceinline__ void load(const void* rows, int64_t row, int D, bool exists = true) {
    const T* row_D = static_cast<const T*>(rows) + row * D;
#pragma unroll
    for (int p = 0; p < COLUMNS / V; ++p) {
      const int column = first_column<V>(p);
      packs[p] = exists && column < D ? *reinterpret_cast<const Pack<T, V>*>(row_D + column) : Pack<T, V>{};
    }
  }
};

template <class T, int V, class F>
__device__ __forceinline__ void store(void* rows, int64_t row, int D, const F& value) {
  T* row_D = static_cast<T*>(rows) + row * D;
#pragma unroll
  for (int p = 0; p < COLUMNS / V; ++p) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) assign(value(p * V + v), pack.x[v]);
    const int column = first_column<V>(p);
    if (column < D) *reinterpret_cast<Pack<T, V>*>(row_D + column) = pack;
  }
}

// ---- Sums over the block ------------------------------------------------------------------------------------------

// N of them at a time, the same in all threads. There are two boards for the warps' sums, by turns: who writes on one
// has passed the barrier of the other, which all reach who have read this one.
template <class T, int N>
class BlockSum {
 public:
  struct Boards {
    alignas(16) T sums[2][THREADS / 32][N];
  };

  __device__ __forceinline__ explicit BlockSum(Boards& boards) : boards_(boards) {}

  __device__ __forceinline__ void operator()(T (&values)[N]) {
    T(*const board)[N] = boards_.sums[turn_];
    turn_ ^= 1;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        values[n] += __shfl_xor_sync(0xffffffffu, values[n], distance);
      if (threadIdx.x % 32 == 0) board[threadIdx.x / 32][n] = values[n];
      values[n] = 0;
    }
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += board[warp][n];
    }
  }

 private:
  Boards& boards_;
  int turn_ = 0;
};

template <class T, int V, int R>
__device__ __forceinline__ void inverse_rms(const Columns<T, V> (&x)[R], int D, float eps, float (&scale)[R],
                                            BlockSum<float, R>& sum_block) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    scale[r] = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) scale[r] += x[r][i] * x[r][i];
  }
  sum_block(scale);
#pragma unroll
  for (int r = 0; r < R; ++r) scale[r] = rsqrtf(scale[r] / D + eps);
}

// ---- Forward ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int start_of(const Side& side, int span) { return side.bounds_P2[2 * span]; }
__device__ __forceinline__ int end_of(const Side& side, int span) { return side.bounds_P2[2 * span + 1]; }
__device__ __forceinline__ int length_of(const Side& side, int span) {
  return end_of(side, span) - start_of(side, span);
}

__device__ __forceinline__ int slot_of(const Side& side, int span, int token) {
  return start_of(side, span) / (CHUNK / 2) + (token - start_of(side, span)) / CHUNK;
}

// Adds rows, normalised but for w, to the sum. Returns this thread's share of the error of those that have partners.
template <class T, int V, int R, bool COMPARED>
__device__ __forceinline__ float add_rows(const ForwardArguments& a, const Side& side, int start, int end,
                                          float (&sum)[COLUMNS], BlockSum<float, R>& sum_block) {
  float error = 0;
  for (int first = start; first < end; first += R) {
    Columns<T, V> x[R];
    float x_scale[R];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r].load(side.rows_SD, first + r, a.D, first + r < end);
    inverse_rms(x, a.D, a.eps, x_scale, sum_block);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) sum[i] += first + r < end ? x_scale[r] * x[r][i] : 0;
    }
    if constexpr (COMPARED) {
      Columns<T, V> z[R];
      Columns<float, V> w;
      float z_scale[R];
      int partner[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        partner[r] = first + r < end ? a.aligned_S[first + r] : -1;
        z[r].load(a.teacher.rows_SD, partner[r], a.D, partner[r] >= 0);
      }
      inverse_rms(z, a.D, a.eps, z_scale, sum_block);
      w.load(a.norm_weight_D, 0, a.D);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const float difference = w[i] * (x_scale[r] * x[r][i] - z_scale[r] * z[r][i]);
          error += partner[r] >= 0 ? difference * difference : 0;
        }
      }
    }
  }
  return error;
}

template <class T, int V, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) sum_chunks(const ForwardArguments a) {
  constexpr int R = ROWS<T, V, ALIGNED>;
  const bool is_student = blockIdx.x < a.student.num_chunks;
  const Side& side = is_student ? a.student : a.teacher;
  const int chunk = is_student ? blockIdx.x : blockIdx.x - a.student.num_chunks;
  const int* const row = side.chunks_C3 + 3 * chunk;
  const int span = row[0], start = row[1], end = row[2];
  const bool is_summed = span >= 0 && length_of(side, span) > CHUNK;
  const bool is_compared = ALIGNED && is_student && (is_summed || span < 0);

  __shared__ typename BlockSum<float, R>::Boards boards;
  __shared__ BlockSum<double, 1>::Boards error_boards;
  BlockSum<float, R> sum_block(boards);
  float sum[COLUMNS] = {};
  if (is_compared) {
    double error[1] = {add_rows<T, V, R, true>(a, side, start, end, sum, sum_block)};
    BlockSum<double, 1> sum_error(error_boards);
    sum_error(error);
    if (threadIdx.x == 0) a.token_error_C[chunk] = error[0];
  } else if (is_summed) {
    add_rows<T, V, R, false>(a, side, start, end, sum, sum_block);
  }
  if (ALIGNED && is_student && !is_compared && threadIdx.x == 0) a.token_error_C[chunk] = 0;
  if (is_summed) store<float, V>(side.slots, slot_of(side, span, start), a.D, [&](int i) { return sum[i]; });
}

template <class T, int V, int R, bool COMPARED>
__device__ __forceinline__ float add_span(const ForwardArguments& a, const Side& side, int span, float (&sum)[COLUMNS],
                                          BlockSum<float, R>& sum_block) {
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) sum[i] = 0;
  const int start = start_of(side, span), end = end_of(side, span);
  if (end - start <= CHUNK) return add_rows<T, V, R, COMPARED>(a, side, start, end, sum, sum_block);
  const int last = slot_of(side, span, end - 1);
#pragma unroll 2
  for (int slot = slot_of(side, span, start); slot <= last; ++slot) {
    Columns<float, V> part;
    part.load(side.slots, slot, a.D);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sum[i] += part[i];
  }
  return 0;
}

__device__ void add_moments(double weight, const double (&products)[5], double (&totals)[5]) {
  constexpr double least = 1e-16;  // of a squared norm: torch.cosine_similarity's eps, squared
  totals[0] += weight;
  totals[1] += weight * products[0];
  totals[2] += weight * products[1] / sqrt(fmax(products[2], least) * fmax(products[3], least));
  totals[3] += weight * products[3];
  totals[4] += products[4];
}

template <class T, int V, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) finish(const ForwardArguments a) {
  constexpr int R = ROWS<T, V, ALIGNED>;
  __shared__ typename BlockSum<float, R>::Boards boards;
  __shared__ BlockSum<double, 5>::Boards product_boards;
  __shared__ double totals[5];         // the first thread's
  extern __shared__ double scratch[];  // 12 bytes for each column
  BlockSum<float, R> sum_block(boards);
  BlockSum<double, 5> sum_products(product_boards);
  // this thread's columns are every blockDim.x-th
  double* const teacher_sum = scratch + threadIdx.x;
  float* const student = reinterpret_cast<float*>(scratch + COLUMNS * blockDim.x) + threadIdx.x;
  for (int i = 0; i < COLUMNS; ++i) teacher_sum[i * blockDim.x] = 0;
  if (threadIdx.x == 0) {
    for (double& total : totals) total = 0;
  }
  const int64_t group = blockIdx.x, W = gridDim.x;
  for (int span = group * a.P / W; span < (group + 1) * a.P / W; ++span) {
    float sum[COLUMNS];
    double products[5] = {};  // of the difference, across, of the student, of the teacher; the tokens' error
    products[4] = add_span<T, V, R, ALIGNED>(a, a.student, span, sum, sum_block);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) student[i * blockDim.x] = sum[i];
    add_span<T, V, R, false>(a, a.teacher, span, sum, sum_block);
    const float student_scale = 1.f / length_of(a.student, span), teacher_scale = 1.f / length_of(a.teacher, span);
    const double weight = a.weight_P[span];
    Columns<float, V> w;
    w.load(a.norm_weight_D, 0, a.D);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const float s32 = w[i] * (student_scale * student[i * blockDim.x]), t32 = w[i] * (teacher_scale * sum[i]);
      const double s = s32, t = t32;
      sum[i] = s32 - t32;
      products[0] += (s - t) * (s - t);
      products[1] += s * t;
      products[2] += s * s;
      products[3] += t * t;
      teacher_sum[i * blockDim.x] += weight * t;
    }
    if (a.error_PD) store<float, V>(a.error_PD, span, a.D, [&](int i) { return sum[i]; });
    sum_products(products);
    if (threadIdx.x == 0) add_moments(weight, products, totals);
  }
  store<double, V>(a.teacher_WD, group, a.D, [&](int i) { return teacher_sum[i * blockDim.x]; });
  if (threadIdx.x == 0) {
    for (int m = 0; m < 5; ++m) a.totals_W5[5 * group + m] = totals[m];
  }
}

__device__ void add_columns(const ForwardArguments& a, int W) {
  __shared__ double sums[ADDERS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  double sum = 0;
  if (column < a.D) {
#pragma unroll 8
    for (int group = warp; group < W; group += ADDERS) sum += a.teacher_WD[static_cast<int64_t>(group) * a.D + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= a.D) return;
  for (int other = 1; other < ADDERS; ++other) sum += sums[other][lane];
  a.moments[4 + column] = sum;
}

__device__ void add_scalars(const ForwardArguments& a, int W) {
  double sums[5] = {};
  for (int group = threadIdx.x; group < W; group += blockDim.x) {
    for (int m = 0; m < 5; ++m) sums[m] += a.totals_W5[5 * group + m];
  }
  if (a.aligned_S) {
#pragma unroll 8
    for (int chunk = threadIdx.x; chunk < a.student.num_chunks; chunk += blockDim.x) sums[4] += a.token_error_C[chunk];
  }
  __shared__ BlockSum<double, 5>::Boards boards;
  BlockSum<double, 5> sum_block(boards);
  sum_block(sums);
  if (threadIdx.x > 0) return;
  for (int m = 0; m < 4; ++m) a.moments[m] = sums[m];
  *a.pooled_error = sums[1];
  *a.token_error = sums[4];
}

// 32 columns of the teacher's moments in each block, all else in the last.
__global__ void __launch_bounds__(32 * ADDERS) add_up(const ForwardArguments a, int W) {
  if (blockIdx.x + 1 < gridDim.x)
    add_columns(a, W);
  else
    add_scalars(a, W);
}

// ---- Backward -----------------------------------------------------------------------------------------------------

// With y = x / rms(x) and u the gradient with respect to it: (u - y <u, y> / D) / rms(x).
template <class T, int V, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) backward(const BackwardArguments a) {
  constexpr int R = ROWS<T, V, ALIGNED>;
  __shared__ typename BlockSum<float, R>::Boards boards;
  BlockSum<float, R> sum_block(boards);
  const int* const row = a.student.chunks_C3 + 3 * blockIdx.x;
  const int span = row[0], start = row[1], end = row[2];
  const float scale = span >= 0 ? 2 * *a.pooled_grad * a.weight_P[span] / length_of(a.student, span) : 0;
  const float token_scale = ALIGNED ? 2 * *a.token_grad : 0;
  Columns<float, V> w, error;
  const auto load_error = [&]() {
    w.load(a.norm_weight_D, 0, a.D);
    error.load(a.error_PD, span, a.D, span >= 0);
  };
  if (!ALIGNED) load_error();

  for (int first = start; first < end; first += R) {
    Columns<T, V> x[R], z[R];
    float x_scale[R], z_scale[R], along[R];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r].load(a.student.rows_SD, first + r, a.D, first + r < end);
    bool has_partner[R];
    if constexpr (ALIGNED) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int partner = first + r < end ? a.aligned_S[first + r] : -1;
        has_partner[r] = partner >= 0;
        z[r].load(a.teacher_TD, partner, a.D, has_partner[r]);
      }
      inverse_rms(z, a.D, a.eps, z_scale, sum_block);
    }
    inverse_rms(x, a.D, a.eps, x_scale, sum_block);
    if (ALIGNED) load_error();  // again each time, from the cache: there are no registers left to keep it
    const auto gradient = [&](int r, int i) {
      float up = scale * error[i];
      if (ALIGNED && has_partner[r]) up += token_scale * w[i] * (x_scale[r] * x[r][i] - z_scale[r] * z[r][i]);
      return w[i] * up;
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      along[r] = 0;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) along[r] += gradient(r, i) * x[r][i];
    }
    sum_block(along);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r >= end) break;
      const float back = x_scale[r] * x_scale[r] * along[r] / a.D;
      store<T, V>(a.grad_SD, first + r, a.D, [&](int i) { return x_scale[r] * (gradient(r, i) - back * x[r][i]); });
    }
  }
}

// ---- Launches -----------------------------------------------------------------------------------------------------

int threads_of(int D) { return ((D + COLUMNS - 1) / COLUMNS + 31) / 32 * 32; }

template <class T>
bool takes_vectors(int D, std::initializer_list<const void*> pointers) {
  bool all = D * sizeof(T) % 16 == 0;
  for (const void* pointer : pointers) all = all && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return all;
}

// Calls launch<T, V, ALIGNED>: V elements of 16 bytes together where all rows begin at a multiple of that, else one.
template <class T, class F>
void choose(bool vectors, bool aligned, const F& launch) {
  const auto with = [&](auto width) {
    if (aligned)
      launch(T{}, width, std::true_type{});
    else
      launch(T{}, width, std::false_type{});
  };
  if (vectors)
    with(std::integral_constant<int, 16 / sizeof(T)>{});
  else
    with(std::integral_constant<int, 1>{});
}

template <class F>
void choose_type(Type type, const F& launch) {
  switch (type) {
    case Type::float32:
      return launch(float{});
    case Type::bfloat16:
      return launch(__nv_bfloat16{});
    case Type::float16:
      return launch(__half{});
  }
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* mtllm_distill_loss_forward(const ForwardArguments* arguments, void* stream_handle) {
  const ForwardArguments& a = *arguments;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int threads = threads_of(a.D), num_chunks = a.student.num_chunks + a.teacher.num_chunks, W = num_groups(a.P);
  const int scratch_bytes = threads * COLUMNS * (sizeof(double) + sizeof(float));
  choose_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = takes_vectors<T>(a.D, {a.student.rows_SD, a.teacher.rows_SD, a.norm_weight_D});
    choose<T>(vectors, a.aligned_S != nullptr, [&](auto, auto width, auto aligned) {
      sum_chunks<T, width(), aligned()><<<num_chunks, threads, 0, stream>>>(a);
      const auto kernel = finish<T, width(), aligned()>;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, scratch_bytes);
      kernel<<<W, threads, scratch_bytes, stream>>>(a);
    });
  });
  add_up<<<(a.D + 31) / 32 + 1, 32 * ADDERS, 0, stream>>>(a, W);
  return last_error();
}

const char* mtllm_distill_loss_backward(const BackwardArguments* arguments, void* stream_handle) {
  const BackwardArguments& a = *arguments;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  choose_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = takes_vectors<T>(a.D, {a.student.rows_SD, a.teacher_TD, a.norm_weight_D});
    choose<T>(vectors, a.aligned_S != nullptr, [&](auto, auto width, auto aligned) {
      backward<T, width(), aligned()><<<a.student.num_chunks, threads_of(a.D), 0, stream>>>(a);
    });
  });
  return last_error();
}
