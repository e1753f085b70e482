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

// Both activations are x sigmoid(argument(x)), with slope(x) = x argument'(x).
struct Silu {
  static float argument(float x) { return x; }
  static float slope(float x) { return x; }
};

// 1 + tanh(z) is 2 sigmoid(2 z), which cancels nothing. Beyond 11 the sigmoid is 0 or 1 in fp32, and a cube could be
// infinite, which backward would multiply by 0.
struct GeluTanh {
  static constexpr float linear = 1.59576912f, cubic = 0.0713548163f;

  static float clamped(float x) { return x > 11 ? 11 : x < -11 ? -11 : x; }
  static float argument(float x) { return (linear + cubic * clamped(x) * clamped(x)) * clamped(x); }
  static float slope(float x) { return (linear + 3 * cubic * clamped(x) * clamped(x)) * clamped(x); }
};

template <class Activation>
inline float activated(Activation, float gate) {
  return gate / (1 + exponential(-Activation::argument(gate)));
}

template <class Activation>
inline void differentiate(Activation, float dy, float gate, float up, float& dgate, float& dup) {
  const float sigmoid = 1 / (1 + exponential(-Activation::argument(gate)));
  dgate = dy * up * sigmoid * (1 + Activation::slope(gate) * (1 - sigmoid));
  dup = dy * gate * sigmoid;
}

// A loop for each: no template, of which some compilers make no clones.
VECTORISED void forward(Silu, const float* gate_F, const float* up_F, float* y_F, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) y_F[i] = activated(Silu{}, gate_F[i]) * up_F[i];
}

VECTORISED void forward(GeluTanh, const float* gate_F, const float* up_F, float* y_F, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) y_F[i] = activated(GeluTanh{}, gate_F[i]) * up_F[i];
}

VECTORISED void backward(Silu, const float* dy_F, const float* gate_F, const float* up_F, float* dgate_F, float* dup_F,
                         int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) differentiate(Silu{}, dy_F[i], gate_F[i], up_F[i], dgate_F[i], dup_F[i]);
}

VECTORISED void backward(GeluTanh, const float* dy_F, const float* gate_F, const float* up_F, float* dgate_F,
                         float* dup_F, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) differentiate(GeluTanh{}, dy_F[i], gate_F[i], up_F[i], dgate_F[i], dup_F[i]);
}

template <class F>
void with_activation(bool is_gelu, const F& f) {
  is_gelu ? f(GeluTanh{}) : f(Silu{});
}

}  // namespace

Tensor swiglu_forward(const Tensor& gate_up_SF, bool is_gelu) {
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
        store(out + i * F, F, buffer_F.data(), [&](float* y_F) {
          with_activation(is_gelu, [&](auto activation) { forward(activation, gate_F, gate_F + F, y_F, F); });
        });
      }
    });
  });
  return y_SF;
}

Tensor swiglu_backward(const Tensor& dy_SF, const Tensor& gate_up_SF, bool is_gelu) {
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
        store(out + i * 2 * F, 2 * F, buffer_F.data(), [&](float* dgate_F) {
          with_activation(is_gelu, [&](auto activation) {
            backward(activation, dy_F, gate_F, gate_F + F, dgate_F, dgate_F + F, F);
          });
        });
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
