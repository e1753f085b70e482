// rms_norm on the CPU; kernels/rms_norm/__init__.py has the formula. A row stays in the cache from its addition to its
// last product, so that every byte moves once.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rms.h"
#include "rows.h"

namespace mtllm {
namespace {

VECTORISED void add(const float* x_D, const float* y_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = x_D[i] + y_D[i];
}

VECTORISED void scale(const float* x_D, float factor, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = x_D[i] * factor;
}

VECTORISED void scale(const float* x_D, float factor, const float* w_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = x_D[i] * factor * w_D[i];
}

VECTORISED void multiply(const float* x_D, const float* y_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = x_D[i] * y_D[i];
}

VECTORISED float dot(const float* x_D, const float* y_D, const float* z_D, int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; ++i) sum += x_D[i] * y_D[i] * z_D[i];
  return sum;
}

// dx = rstd * dy * w - along * h + dh
VECTORISED void backward(const float* dy_D, const float* w_D, float rstd, const float* h_D, float along,
                         const float* dh_D, float* dx_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) dx_D[i] = rstd * (dy_D[i] * w_D[i]) - along * h_D[i] + dh_D[i];
}

VECTORISED void backward(const float* dy_D, const float* w_D, float rstd, const float* h_D, float along, float* dx_D,
                         int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) dx_D[i] = rstd * (dy_D[i] * w_D[i]) - along * h_D[i];
}

template <class T>
struct Forward {
  const T *x_SD, *residual_SD;  // the latter or null: then h is x
  const float* w_D;
  float eps;
  bool rounds_once;  // as Gemma does
  T *y_SD, *hidden_SD;
  float* rstd_S;
  int64_t D;

  void operator()(int64_t first, int64_t last) const {
    Rows<T> x(x_SD, D), residual(residual_SD, D), hidden(residual_SD ? hidden_SD : x_SD, D), scaled(y_SD, D);
    std::vector<float> buffer_D(D);
    for (int64_t i = first; i < last; ++i) {
      if (residual_SD) {
        const float *x_D = x[i], *residual_D = residual[i];
        store(hidden_SD + i * D, D, buffer_D.data(), [&](float* h_D) { add(x_D, residual_D, h_D, D); });
      }
      const float* h_D = hidden[i];  // as stored, for so backward sees it
      rstd_S[i] = inverse_rms(h_D, eps, D);
      if (rounds_once) {
        store(y_SD + i * D, D, buffer_D.data(), [&](float* y_D) { scale(h_D, rstd_S[i], w_D, y_D, D); });
        continue;
      }
      store(y_SD + i * D, D, buffer_D.data(), [&](float* y_D) { scale(h_D, rstd_S[i], y_D, D); });
      const float* scaled_D = scaled[i];  // rounded, as Llama does before it multiplies
      store(y_SD + i * D, D, buffer_D.data(), [&](float* y_D) { multiply(scaled_D, w_D, y_D, D); });
    }
  }
};

template <class T>
struct Backward {
  const T *dy_SD, *dhidden_SD;  // the latter or null
  const T* hidden_SD;
  const float *w_D, *rstd_S;
  T* dx_SD;
  int64_t D;

  void operator()(int64_t first, int64_t last) const {
    Rows<T> dy(dy_SD, D), dhidden(dhidden_SD, D), hidden(hidden_SD, D);
    std::vector<float> buffer_D(D);
    for (int64_t i = first; i < last; ++i) {
      const float *dy_D = dy[i], *h_D = hidden[i], *dh_D = dhidden_SD ? dhidden[i] : nullptr;
      const float rstd = rstd_S[i], along = rstd * rstd * rstd * dot(dy_D, w_D, h_D, D) / static_cast<float>(D);
      store(dx_SD + i * D, D, buffer_D.data(), [&](float* dx_D) {
        if (dh_D)
          backward(dy_D, w_D, rstd, h_D, along, dh_D, dx_D, D);
        else
          backward(dy_D, w_D, rstd, h_D, along, dx_D, D);
      });
    }
  }
};

}  // namespace

// Without a residual there is no hidden_SD but an empty one: h is x.
std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x_SD, const Tensor& weight_D, double eps,
                                                    const std::optional<Tensor>& residual_SD, bool rounds_once) {
  const int64_t S = x_SD.size(0), D = x_SD.size(1);
  Tensor y_SD = torch::stable::empty_like(x_SD), rstd_S = torch::stable::new_empty(weight_D, {S});
  Tensor hidden_SD = torch::stable::new_empty(x_SD, {residual_SD ? S : 0, D});
  with_type(x_SD, [&](auto zero) {
    using T = decltype(zero);
    share_rows(S, D, Forward<T>{data<const T>(x_SD), optional_data<const T>(residual_SD), data<const float>(weight_D),
                                static_cast<float>(eps), rounds_once, data<T>(y_SD), data<T>(hidden_SD),
                                data<float>(rstd_S), D});
  });
  return {y_SD, hidden_SD, rstd_S};
}

Tensor rms_norm_backward(const Tensor& dy_SD, const std::optional<Tensor>& dhidden_SD, const Tensor& hidden_SD,
                         const Tensor& weight_D, const Tensor& rstd_S) {
  const int64_t S = hidden_SD.size(0), D = hidden_SD.size(1);
  Tensor dx_SD = torch::stable::empty_like(hidden_SD);
  with_type(hidden_SD, [&](auto zero) {
    using T = decltype(zero);
    share_rows(S, D, Backward<T>{data<const T>(dy_SD), optional_data<const T>(dhidden_SD), data<const T>(hidden_SD),
                                 data<const float>(weight_D), data<const float>(rstd_S), data<T>(dx_SD), D});
  });
  return dx_SD;
}

}  // namespace mtllm

STABLE_TORCH_LIBRARY_IMPL(mtllm, CPU, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&mtllm::rms_norm_forward));
  library.impl("rms_norm_backward", TORCH_BOX(&mtllm::rms_norm_backward));
}
