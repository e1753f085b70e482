// The root mean square of a row.
#pragma once
#include <cmath>

#include "rows.h"

namespace mtllm {

VECTORISED static float dot(const float* x_D, const float* y_D, int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; ++i) sum += x_D[i] * y_D[i];
  return sum;
}

inline float inverse_rms(const float* x_D, float eps, int64_t D) {
  return 1 / std::sqrt(dot(x_D, x_D, D) / static_cast<float>(D) + eps);
}

}  // namespace mtllm
