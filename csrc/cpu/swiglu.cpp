// swiglu on the CPU; kernels/swiglu/__init__.py has the formula. Each way every byte moves once.
#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace mtllm {
namespace {

// Within 2 units in the last place, in arithmetic that vectorises: e^x = 2^n e^r with |r| <= ln(2) / 2.
inline float exponential(float x) {
  x = x > 88.8f ? 88.8f : x < -87.f ? -87.f : x;  // to inf and to almost 0; a NaN stays
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // rounds to an integer, which is in the last bits
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln(2) in two parts: n times the first is exact
  float sum = 1.f / 5040;
  for (float coefficient : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * r + coefficient;
  return sum * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127) << 23);
}

VECTORISED void forward(const float* gate_F, const float* up_F, float* y_F, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) y_F[i] = gate_F[i] / (1 + exponential(-gate_F[i])) * up_F[i];
}

VECTORISED void backward(const float* dy_F, const float* gate_F, const float* up_F, float* dgate_F, float* dup_F,
                         int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float gate = gate_F[i], sigmoid = 1 / (1 + exponential(-gate));
    dgate_F[i] = dy_F[i] * up_F[i] * sigmoid * (1 + gate * (1 - sigmoid));
    dup_F[i] = dy_F[i] * gate * sigmoid;
  }
}

}  // namespace

Tensor swiglu_forward(const Tensor& gate_up_SF) {
  const int64_t S = gate_up_SF.size(0), F = gate_up_SF.size(1) / 2;
  Tensor y_SF = torch::stable::new_empty(gate_up_SF, {S, F});
  with_type(gate_up_SF, [&](auto zero) {
    using T = decltype(zero);
    const T* source = data<const T>(gate_up_SF);
    T* out = data<T>(y_SF);
    share_rows(S, 2 * F, [&](int64_t first, int64_t last) {
      Rows<T> rows(source, 2 * F);
      std::vector<float> buffer_F(F);
      for (int64_t i = first; i < last; ++i) {
        const float* gate_F = rows[i];
        store(out + i * F, F, buffer_F.data(), [&](float* y_F) { forward(gate_F, gate_F + F, y_F, F); });
      }
    });
  });
  return y_SF;
}

Tensor swiglu_backward(const Tensor& dy_SF, const Tensor& gate_up_SF) {
  const int64_t S = gate_up_SF.size(0), F = gate_up_SF.size(1) / 2;
  Tensor dgate_up_SF = torch::stable::empty_like(gate_up_SF);
  with_type(gate_up_SF, [&](auto zero) {
    using T = decltype(zero);
    const T *upstream = data<const T>(dy_SF), *source = data<const T>(gate_up_SF);
    T* out = data<T>(dgate_up_SF);
    share_rows(S, 3 * F, [&](int64_t first, int64_t last) {
      Rows<T> dy(upstream, F), rows(source, 2 * F);
      std::vector<float> buffer_F(2 * F);
      for (int64_t i = first; i < last; ++i) {
        const float *dy_F = dy[i], *gate_F = rows[i];
        store(out + i * 2 * F, 2 * F, buffer_F.data(),
              [&](float* dgate_F) { backward(dy_F, gate_F, gate_F + F, dgate_F, dgate_F + F, F); });
      }
    });
  });
  return dgate_up_SF;
}

}  // namespace mtllm

STABLE_TORCH_LIBRARY_IMPL(mtllm, CPU, library) {
  library.impl("swiglu_forward", TORCH_BOX(&mtllm::swiglu_forward));
  library.impl("swiglu_backward", TORCH_BOX(&mtllm::swiglu_backward));
}
