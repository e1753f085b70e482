// What the CPU's ops share: number formats, rows of tensors, sharing out work. D is the width of any row here.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/bit_cast.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

// On a plain loop: compiled for each of these instruction sets, of which loading takes the machine's best.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

namespace mtllm {

using torch::headeronly::bit_cast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Formats of 16 bits, in integer arithmetic that vectorises on any machine.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float value = bit_cast<float>(magnitude) * 0x1p112f;  // of a subnormal number too
  const uint32_t bits = value < 65536.f ? bit_cast<uint32_t>(value) : magnitude | 0x7f800000u;  // else inf or nan
  return bit_cast<float>(bits | sign);
}

// Both round to nearest, ties to even.
inline void from_float(float value, BFloat16& x) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  x.bits = static_cast<uint16_t>(value == value ? (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16 : 0x7fc0u);
}

inline void from_float(float value, Float16& x) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  // 0.5's last bit is worth what fp16's is when subnormal: adding it rounds there
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  x.bits = static_cast<uint16_t>((magnitude < 0x477ff000u ? finite : infinite) | ((bits >> 16) & 0x8000u));
}

VECTORISED static void convert(const BFloat16* x_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = to_float(x_D[i]);
}

VECTORISED static void convert(const Float16* x_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = to_float(x_D[i]);
}

VECTORISED static void convert(const float* x_D, BFloat16* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) from_float(x_D[i], out_D[i]);
}

VECTORISED static void convert(const float* x_D, Float16* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) from_float(x_D[i], out_D[i]);
}

// A row of a tensor as fp32: where it lies, or in the buffer.
template <class T>
const float* load(const T* row_D, int64_t D, float* buffer_D) {
  if constexpr (std::is_same_v<T, float>) {
    return row_D;
  } else {
    convert(row_D, buffer_D, D);
    return buffer_D;
  }
}

// Rows of a tensor as fp32: where they lie, or in a buffer that holds the last one asked for.
template <class T>
class Rows {
 public:
  Rows(const T* rows_SD, int64_t D) : rows_SD_(rows_SD), D_(D), buffer_D_(std::is_same_v<T, float> ? 0 : D) {}

  const float* operator[](int64_t row) { return load(rows_SD_ + row * D_, D_, buffer_D_.data()); }

 private:
  const T* rows_SD_;
  int64_t D_;
  std::vector<float> buffer_D_;
};

// Writes a row of a tensor: `fill` writes it as fp32, there or into the buffer.
template <class T, class F>
void store(T* row_D, int64_t D, float* buffer_D, const F& fill) {
  if constexpr (std::is_same_v<T, float>) {
    fill(row_D);
  } else {
    fill(buffer_D);
    convert(buffer_D, row_D, D);
  }
}

template <class T>
T* data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Calls f with a zero of the tensor's element type.
template <class F>
void with_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, "no such type here: ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Calls f(unit) once for each unit, in parallel where `work` (elements gone through) is worth it. Whoever is free takes
// the next one, so f writes only what is the unit's own: then results do not depend on the threads.
template <class F>
void share_out(int64_t units, int64_t work, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 15;
  const int64_t threads = std::clamp<int64_t>(units, 1, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::clamp<int64_t>(work / worth_a_thread, 1, threads), 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit);
  });
}

// Calls f(first, last) for blocks of rows of `width` elements, in parallel: f writes its own rows only.
template <class F>
void share_rows(int64_t rows, int64_t width, const F& f) {
  constexpr int64_t elements = 1 << 14;  // of a block: many times what it costs to take one
  const int64_t block = std::max<int64_t>(1, elements / std::max<int64_t>(1, width));
  share_out((rows + block - 1) / block, rows * width,
            [&](int64_t unit) { f(unit * block, std::min(rows, (unit + 1) * block)); });
}

}  // namespace mtllm
